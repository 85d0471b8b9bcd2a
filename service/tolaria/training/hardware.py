"""What the controller is told of the device. Called in the lane at the end of an epoch, never on the event loop."""

from __future__ import annotations

import os

import torch

from leyline.v1.state_pb2 import HardwareContext

_GB = 1e9


def hardware_context(device: torch.device) -> HardwareContext:
    """Device, its memory in GB, and for CUDA its compute capability (90 for 9.0). Unknown figures stay 0."""
    context = HardwareContext(device_type=device.type, device_id=str(device))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        context.total_memory_gb, context.available_memory_gb = total / _GB, free / _GB
        context.compute_capability = 10 * major + minor
    elif device.type == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        context.total_memory_gb = page * os.sysconf("SC_PHYS_PAGES") / _GB
        context.available_memory_gb = page * os.sysconf("SC_AVPHYS_PAGES") / _GB
        cores = os.cpu_count() or 1
        context.utilization_percent = min(100.0, 100.0 * os.getloadavg()[0] / cores)
    return context
