"""Memory to read an image into. Owns how its pages come; knows nothing of what it holds.

New pages are most of the time that reading a cached file takes. Asked for a piece at a time right before it is filled,
they come without a fault each, and are still in the processor's cache.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch

_MADV_POPULATE_WRITE: Final = 23
"""Of Linux 5.14 and later (madvise(2)); Python's `mmap` has no name for it. Older kernels refuse it."""


class FreshMemory:
    """Memory of its own, freed with the last view of `tensor`, which is flat, uint8, on the CPU and of any content."""

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._provides = True
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:size_bytes]

    def provide(self, start: int, end: int) -> None:
        """Have the pages from byte `start`, a multiple of the page size, up to `end`. A matter of speed only."""
        if self._provides and end > start:
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, start, end - start)
            except OSError:  # then they come one by one, when they are first written to
                self._provides = False
