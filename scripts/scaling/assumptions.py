"""What the tables assume and cannot measure on one machine. Each value is named here, and only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Assumption:
    """A value in its unit, and why it is that one."""

    value: float
    unit: str
    basis: str


ASSUMPTIONS: Final = {
    "gradients": Assumption(4.0, "GB", "float32, of a billion parameters"),
    "state": Assumption(12.0, "GB", "these parameters and Adam's two moments; the same on every rank"),
    "tensors": Assumption(900, "", "tensors of that state"),
    "step": Assumption(0.5, "s", "time of one step without failures"),
    "devices": Assumption(8, "ranks", "ranks on one machine"),
    "network latency": Assumption(5e-6, "s", "one message between two machines, through a few switches"),
    "network bandwidth": Assumption(12.5, "GB/s", "Ethernet of one machine, 100 Gb/s, for gloo and the store"),
    "NCCL bandwidth": Assumption(50.0, "GB/s", "one 400 Gb/s adapter per rank, for gradients on CUDA"),
    "NVMe write": Assumption(3.0, "GB/s", "sequential, one drive, until it is durable"),
    "NVMe read": Assumption(6.0, "GB/s", "sequential, one drive"),
    "device MTBF": Assumption(50_000, "h", "mean time between failures of one rank with its share of the machine"),
    "silent share": Assumption(0.1, "", "failures after which the rank does not end, but hangs"),
    "machine share": Assumption(0.2, "", "failures that take the machine and its memory with them"),
    "replacement": Assumption(600, "s", "until another machine takes the place of a lost one"),
    "checkpoint interval": Assumption(3600, "s", "between checkpoints where snapshots in memory are the first resort"),
}

SETTINGS: Final = {
    "emergency.heartbeat_timeout_s": 30.0,
    "lane.restart_pause_s": 0.1,
    "rollback.overhead_max": 0.01,
    "rollback.snapshots_max": 5,
}
"""Defaults of settings on which the figures depend."""

SIZES: Final = (2, 8, 64, 1024, 10_000)
"""Numbers of ranks."""


def assumed(name: str) -> float:
    """Returns the value of an assumption. Raises KeyError if there is none of that name."""
    return ASSUMPTIONS[name].value
