"""Tolaria: trains a PyTorch model unattended, beside a controller (Tamiyo) and an executor (Kasmina)."""

__version__ = "0.1.0"
