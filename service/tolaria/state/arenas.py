"""Memory of images: arenas, and which tensors share one or have one each.

A tensor that has not changed since an earlier snapshot is found by its bytes: version counters and flags miss writes
through `.data`, numpy and extensions. Reading both takes less time than a copy with its digest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from tolaria.images import TensorSpec
from tolaria.state.encoding import tensor_view

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ALIGNMENT_BYTES: Final = 64
"""A cache line, and a multiple of every element size."""

_LARGE_BYTES: Final = 2**16
"""Size from which a tensor that is not trained has an arena to itself: copying smaller ones costs nearly nothing."""

_PROBE_BYTES: Final = 2**12
"""What is compared first: a tensor that changes differs here in most cases."""

_PART_BYTES: Final = 2**24
"""What is compared at a time afterwards, which bounds the memory for tensors on a device."""

_INTEGERS: Final = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})


class Arena:
    """Preallocated memory for tensors: a flat host buffer with an aligned view for each.

    Images alias it, so that it may belong to several.

    Args:
        specs: of the tensors, in their order.
        pinned: whether to allocate pinned memory, for copies from CUDA devices.

    Raises:
        MemoryError: the memory cannot be allocated.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], *, pinned: bool) -> None:
        self.specs, self.size_bytes = specs, arena_bytes(specs)
        try:
            memory = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:  # torch's allocators raise this, also for pinned memory
            raise MemoryError(str(error).partition("\n")[0]) from error
        content, offset = memoryview(cast("Buffer", memory.numpy())), 0
        buffers: dict[str, memoryview] = {}
        for spec in specs:
            buffers[spec.name] = content[offset : offset + spec.size_bytes]
            offset += _padded(spec.size_bytes)
        self.buffers = MappingProxyType(buffers)
        self._targets = [tensor_view(spec, buffers[spec.name]) for spec in specs]
        self._hashers = [spec.hasher() for spec in specs]
        self._digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The name of the first tensor."""
        return self.specs[0].name if self.specs else ""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors with the arena's specs into it. Allocates nothing for tensors; synchronises."""
        self._digests = {}
        if self._targets:
            with torch.no_grad():
                torch._foreach_copy_(self._targets, [tensors[spec.name].detach() for spec in self.specs])

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether the arena has these tensors' content already, bit for bit. Synchronises."""
        stored = zip(self.specs, self._targets, strict=True)
        return all(_same_bits(tensors[spec.name], target) for spec, target in stored)

    def digests(self) -> Mapping[str, str]:
        """Returns the content's digests by name, computed at the first call after a fill."""
        if not self._digests:
            for (name, buffer), begun in zip(self.buffers.items(), self._hashers, strict=True):
                hasher = begun.copy()
                hasher.update(buffer)
                self._digests[name] = hasher.hexdigest()
        return self._digests


def arena_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Returns the size of an arena for these specs, alignment included."""
    return sum(_padded(spec.size_bytes) for spec in specs)


def grouped(specs: tuple[TensorSpec, ...], trained: Collection[str]) -> list[tuple[TensorSpec, ...]]:
    """Groups specs by arena: first those of trained and of small tensors, then each of the others alone."""
    alone = [spec for spec in specs if spec.name not in trained and spec.size_bytes >= _LARGE_BYTES]
    if not alone:
        return [specs]
    names = {spec.name for spec in alone}
    return [tuple(spec for spec in specs if spec.name not in names), *((spec,) for spec in alone)]


def _same_bits(tensor: Tensor, stored: Tensor) -> bool:
    """Returns whether a tensor has the bits of a contiguous one on the CPU: NaN equals itself, 0.0 is not -0.0."""
    live = tensor.detach().resolve_conj().resolve_neg()
    width = live.element_size()
    if live.is_contiguous():
        live, stored = live.reshape(-1), stored.reshape(-1)
        if not live.nbytes % 8 and not live.storage_offset() * width % 8:
            width = 8  # fewer elements, and so less time
    live, stored = live.view(_INTEGERS[width]), stored.view(_INTEGERS[width])
    return all(torch.equal(live[part].cpu(), stored[part]) for part in _parts(len(live), live.nbytes))


def _parts(rows: int, size_bytes: int) -> Iterator[slice]:
    """Yields slices of the first dimension: a small one, then larger ones."""
    start, part_bytes = 0, _PROBE_BYTES
    while start < rows:
        stop = start + max(1, part_bytes * rows // size_bytes)
        yield slice(start, stop)
        start, part_bytes = stop, _PART_BYTES


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
