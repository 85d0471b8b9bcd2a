"""Memory of images: arenas, and which tensors share one or have one each.

A tensor that has not changed since an earlier snapshot is found by its bytes: version counters and flags miss writes
through `.data`, numpy and extensions. Reading both takes less time than a copy with its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import torch
from torch import Tensor

from tolaria.images import StateImage, TensorSpec
from tolaria.segments import Segment, image_header, placed, placed_bytes
from tolaria.shards import is_sharded
from tolaria.state.encoding import tensor_view

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LARGE_BYTES: Final = 2**16
"""Size from which a tensor that is not trained has an arena to itself: copying smaller ones costs nearly nothing."""

_PROBE_BYTES: Final = 2**12
"""What is compared first: a tensor that changes differs here in most cases."""

_PART_BYTES: Final = 2**24
"""What is compared at a time afterwards, which bounds the memory for tensors on a device."""

_INTEGERS: Final = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})


Allocate: TypeAlias = Callable[[int, bool], tuple[Tensor, Segment | None]]
"""Returns that many bytes of memory, pinned if the second argument is True, and the segment they are in, if shared.

Raises MemoryError.
"""


FillSharded: TypeAlias = "Callable[[Mapping[str, tuple[Tensor, Tensor]], Arena], object]"
"""Copies sharded tensors, by name with the whole tensors that they are to fill, into an arena, with all other ranks."""


def private_memory(size_bytes: int, pinned: bool) -> tuple[Tensor, None]:
    """Allocates memory that ends with this process. Raises MemoryError."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned), None
    except RuntimeError as error:  # torch's allocators raise this, also for pinned memory
        raise MemoryError(str(error).partition("\n")[0]) from error


class Arena:
    """Preallocated memory for tensors: a flat host buffer with an aligned view for each.

    Images alias it, so that it may belong to several.

    Args:
        specs: of the tensors, in their order.
        pinned: whether to allocate pinned memory, for copies from CUDA devices.
        allocate: allocates the memory.
        header_room: bytes to reserve for the header of an image if the memory is shared.

    Raises:
        MemoryError: the memory cannot be allocated.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        *,
        pinned: bool,
        allocate: Allocate = private_memory,
        header_room: int = 0,
    ) -> None:
        self.specs, self.size_bytes, self.header_room = specs, placed_bytes(specs), header_room
        memory, self.segment = allocate(self.size_bytes + header_room, pinned)
        content = memoryview(cast("Buffer", memory.numpy()))
        self.buffers = MappingProxyType({s.name: content[at : at + s.size_bytes] for s, at in placed(specs)})
        self._targets = [tensor_view(spec, self.buffers[spec.name]) for spec in specs]
        self._hashers = [spec.hasher() for spec in specs]
        self._digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The name of the first tensor."""
        return self.specs[0].name if self.specs else ""

    def fill(self, tensors: Mapping[str, Tensor], fill_sharded: FillSharded | None = None) -> None:
        """Copies the tensors with the arena's specs into it. Synchronises. Allocates no memory itself.

        Where some are sharded, `fill_sharded` copies these, of which other ranks have parts.

        Raises:
            ValueError: some are sharded, and there is no `fill_sharded`.
        """
        self._digests = {}
        if self.segment is not None:
            self.segment.clear()
        pairs = list(zip((tensors[spec.name] for spec in self.specs), self._targets, strict=True))
        sharded = {spec.name: (t, target) for spec, (t, target) in zip(self.specs, pairs, strict=True) if is_sharded(t)}
        if sharded:
            if fill_sharded is None:
                raise ValueError(f"{next(iter(sharded))} is sharded")
            fill_sharded(sharded, self)
        plain = [(tensor.detach(), target) for tensor, target in pairs if not is_sharded(tensor)]
        if plain:
            with torch.no_grad():
                torch._foreach_copy_([target for _, target in plain], [tensor for tensor, _ in plain])

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

    def adopt(self, digests: Mapping[str, str]) -> None:
        """Takes the content over from an earlier process, with the digests that it has recorded."""
        self._digests = {spec.name: digests[spec.name] for spec in self.specs}

    def describe(self, image: StateImage, arenas: Sequence[Arena], at_ns: int) -> None:
        """Writes the header of an image that lies in these arenas, of which this is the first, if they are shared."""
        if self.segment is not None:
            places = [(arena.segment.number, arena.specs) for arena in arenas if arena.segment is not None]
            self.segment.write_header(self.size_bytes, image_header(image, places, at_ns))


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
