"""Which device training is on, and how it behaves there. Must not know what is trained."""

from __future__ import annotations

import os

import torch

from tolaria.errors import ConfigurationError


def choose_device(wanted: str) -> torch.device:
    """The device that `training.device` means; auto is the first accelerator there is, else the CPU.

    Raises:
        ConfigurationError: when the device is not there.
    """
    if wanted == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigurationError(
                [f"training.device: {wanted!r} is not there; this machine has {count} CUDA devices"]
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(["training.device: 'mps' is not there"])
    return device


def prefer_determinism() -> None:
    """Ask torch for kernels that repeat bit by bit; an operation without one raises when it is used."""
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False


def limit_threads(wanted: int) -> int:
    """Set this thread's CPU parallelism and return it. 0: one fewer than the process may use, at least 1.

    OpenMP keeps the number for each calling thread, so the lane has to call this itself.
    """
    threads = wanted or max(1, len(os.sched_getaffinity(0)) - 1)
    torch.set_num_threads(threads)
    return threads
