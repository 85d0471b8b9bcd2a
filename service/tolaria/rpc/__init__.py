"""The admin RPCs: validate requests, pass them on, answer. Does not import torch."""
