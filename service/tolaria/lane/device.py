"""The device of training: its choice, threads, random seeds, moving batches to it, and its hardware context."""

from __future__ import annotations

import math
import os
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from leyline.v1.state_pb2 import HardwareContext
from tolaria.cgroups import cpu_quota
from tolaria.errors import ConfigurationError
from tolaria.jobs import Batch

_GB: Final = 1e9


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Returns the device of `training.device`; auto is the accelerator if there is one, else the CPU.

    CUDA without a number is the device of this rank among those on the machine.

    Raises ConfigurationError if the device does not exist.
    """
    found = torch.accelerator.current_accelerator(check_available=True) if wanted == "auto" else torch.device(wanted)
    device = torch.device("cpu") if found is None else found
    if device.type == "cuda":
        count, index = torch.cuda.device_count(), local_rank if wanted in {"auto", "cuda"} else device.index
        if index >= count:
            device = torch.device("cuda", index)
            raise ConfigurationError(
                [f"training.device: '{device}' is not available; this machine has {count} CUDA devices"]
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(["training.device: 'mps' is not available"])
    return device


def limit_threads(wanted: int) -> int:
    """Sets the calling thread's CPU parallelism and returns it. 0: one less than `usable_cores`, at least 1.

    OpenMP keeps the number per calling thread, so the lane's thread has to call this itself.
    """
    threads = wanted or max(1, usable_cores() - 1)
    torch.set_num_threads(threads)
    return threads


def usable_cores() -> int:
    """Returns how many cores the process may use: those it may run on, or a container's share, rounded up, if less."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else min(cores, math.ceil(quota))


def seed_everything(seed: int) -> None:
    """Seeds the global random number generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - jobs that use numpy's global generator have to be reproducible
    random.seed(seed)


def to_device(payload: Any, device: torch.device, *, pinned: bool = False) -> Any:
    """Returns `payload` with what has a method `to`, in tuples, lists and dicts, on `device`. Does not synchronise."""
    if isinstance(payload, Tensor):
        if payload.device == device:
            return payload
        if pinned and payload.device.type == "cpu":  # only a copy from pinned memory does not block
            payload = payload.pin_memory()
        return payload.to(device, non_blocking=True)
    # A PackedSequence, whose lengths stay on the CPU, or a batch of another library; not a field of that name.
    if callable(getattr(payload, "to", None)):
        return payload.to(device)
    if isinstance(payload, dict):
        return {key: to_device(value, device, pinned=pinned) for key, value in payload.items()}
    if isinstance(payload, (tuple, list)):
        moved = [to_device(value, device, pinned=pinned) for value in payload]
        return type(payload)(*moved) if hasattr(payload, "_fields") else type(payload)(moved)  # a namedtuple has fields
    return payload


def on_device(batch: Batch, device: torch.device, *, pinned: bool = False) -> Batch:
    """Returns the batch with its payload on `device`, copied through pinned memory if `pinned`; unchanged on a CPU."""
    return batch if device.type == "cpu" else replace(batch, payload=to_device(batch.payload, device, pinned=pinned))


def hardware_context(device: torch.device) -> HardwareContext:
    """Returns the device, its memory in GB, and CUDA's compute capability (90 for 9.0). Unknown figures are 0."""
    context = HardwareContext(device_type=device.type, device_id=str(device))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        context.total_memory_gb, context.available_memory_gb = total / _GB, free / _GB
        context.compute_capability = 10 * major + minor
        with suppress(ModuleNotFoundError, RuntimeError):  # NVIDIA's library is not installed, or does not say
            context.utilization_percent = torch.cuda.utilization(device)
    elif device.type == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        context.total_memory_gb = page * os.sysconf("SC_PHYS_PAGES") / _GB
        context.available_memory_gb = page * os.sysconf("SC_AVPHYS_PAGES") / _GB
        cores = os.cpu_count() or 1
        context.utilization_percent = min(100.0, 100.0 * os.getloadavg()[0] / cores)
    return context
