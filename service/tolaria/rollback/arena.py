"""Preallocated memory for one image: a flat buffer on the CPU with an aligned view for each tensor.

Owns the layout of bytes. Images live in the host's memory also when training is on a device: its memory is for
training, and hashing and writing to disk then never wait for it. With CUDA the buffer is pinned, so that copies run at
the bus's speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch

from tolaria.rollback.digest import DTYPES, TensorSpec, spec_of
from tolaria.rollback.state import StateImage

if TYPE_CHECKING:
    from torch import Tensor

    from tolaria.rollback.state import Survey

ALIGNMENT_BYTES: Final = 64
"""A cache line, and enough for every dtype's views."""


class Arena:
    """Memory for tensors of the given specs, in their order. Copying into it allocates nothing."""

    def __init__(self, specs: tuple[TensorSpec, ...], *, pinned: bool) -> None:
        self.specs = specs
        self._buffer = torch.empty(arena_bytes(specs), dtype=torch.uint8, pin_memory=pinned)
        self._views = _views(self._buffer, specs)

    def fill(self, survey: Survey, values: bytes) -> StateImage:
        """Copy the survey's tensors, which must have the arena's specs, into it. Synchronises with their devices.

        The image that was here before is overwritten.
        """
        if self._views:
            with torch.no_grad():
                torch._foreach_copy_(list(self._views.values()), [t.detach() for t in survey.tensors.values()])
        return StateImage(survey.position, self._views, values)


def arena_specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The specs of tensors by name, in the mapping's order."""
    return tuple(spec_of(name, tensor) for name, tensor in tensors.items())


def arena_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes that an arena of these specs takes, alignment included."""
    return sum(_padded(spec.size_bytes) for spec in specs)


def _views(buffer: Tensor, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    views: dict[str, Tensor] = {}
    offset = 0
    for spec in specs:
        content = buffer[offset : offset + spec.size_bytes]
        views[spec.name] = content.view(DTYPES[spec.dtype]).view(spec.shape)
        offset += _padded(spec.size_bytes)
    return views


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
