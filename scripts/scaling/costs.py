"""`Costs`: what was measured on one machine, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

FILE: Final = Path(__file__).with_name("costs.json")

HOW: Final = {
    "all_reduce_1_s": ("s", "all_reduce of 9 float64 over gloo, 1 process: the cost of a call"),
    "all_reduce_2_s": ("s", "the same, 2 processes"),
    "all_reduce_3_s": ("s", "the same, 3 processes"),
    "all_reduce_4_s": ("s", "the same, 4 processes"),
    "all_reduce_piece_s": ("s", "all_reduce of 32 MiB over gloo, 2 processes"),
    "broadcast_piece_s": ("s", "broadcast of 32 MiB over gloo, 2 processes, until it has arrived"),
    "store_get_s": ("s", "one `get` of a `TCPStore` from another process"),
    "copy_gb_s": ("GB/s", "memory copy into touched memory, one thread"),
    "hash_gb_s": ("GB/s", "xxh3_128, one thread"),
    "write_gb_s": ("GB/s", "sequential write of one file, fsync included"),
    "import_s": ("s", "new interpreter that imports torch and the lane"),
    "notice_s": ("s", "death of a rank until the service logs it, 2 ranks"),
    "start_s": ("s", "from there until the agent has started"),
    "ready_s": ("s", "from there: torch, ranks, rendezvous, build, restore of a small state"),
    "first_step_s": ("s", "from there until the first step is seen"),
}
"""Unit of each cost, and how it is measured. Times are lower quartiles: other work shares the machine."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured costs; `HOW` describes each. `machine` names what they were measured on."""

    machine: str
    all_reduce_1_s: float
    all_reduce_2_s: float
    all_reduce_3_s: float
    all_reduce_4_s: float
    all_reduce_piece_s: float
    broadcast_piece_s: float
    store_get_s: float
    copy_gb_s: float
    hash_gb_s: float
    write_gb_s: float
    import_s: float
    notice_s: float
    start_s: float
    ready_s: float
    first_step_s: float

    @classmethod
    def load(cls, path: Path = FILE) -> Self:
        """Reads a file that `save` has written. Raises TypeError if a cost is missing or unknown."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path = FILE) -> None:
        """Writes the costs, with 3 significant digits."""
        values = {
            name: value if isinstance(value, str) else float(f"{value:.3g}") for name, value in asdict(self).items()
        }
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @property
    def hop_s(self) -> float:
        """Time of one message between two ranks of a machine: two processes send two in a row, beside the call."""
        return max(0.0, self.all_reduce_2_s - self.all_reduce_1_s) / 2
