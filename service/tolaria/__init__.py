"""Tolaria: trains a PyTorch model unattended, beside a controller (Tamiyo) and an executor (Kasmina)."""

__version__ = "0.2.0.dev0"
