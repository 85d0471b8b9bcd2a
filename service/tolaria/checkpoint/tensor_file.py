"""Tensor files in the safetensors format: 8 bytes of header length, a JSON header, then each tensor's bytes.

https://github.com/huggingface/safetensors#format. Any safetensors library reads these files. This module does not use
the library, so that bytes move directly between the image's memory and the file, through `Filesystem`, and are hashed
while they are in the processor's cache.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tolaria.errors import RestoreAbandonedError
from tolaria.filesystem import Filesystem, read_exactly
from tolaria.images.specs import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

_PIECE_BYTES: Final = 2**20
"""Bytes read and hashed at a time; they fit into the second-level cache."""

_MADV_POPULATE_WRITE: Final = 23
"""madvise(2), Linux 5.14 and later; Python's `mmap` has no name for it. Older kernels refuse it."""


class TensorFileError(Exception):
    """Raised when a file is not the expected tensor file. `reason` is size, header or digest."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class FreshMemory:
    """Newly mapped memory, freed with the last view of `buffer`.

    Page faults take most of the time of reading a cached file. `populate` requests the pages of one piece right before
    it is filled, without a fault for each page, and they are still in the processor's cache then.
    """

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._populates = True
        self.buffer = memoryview(self._map)[:size_bytes]

    def populate(self, start: int, end: int) -> None:
        """Requests the pages from byte `start`, a multiple of the page size, to `end`. Affects only speed."""
        if self._populates and end > start:
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, start, end - start)
            except OSError:  # the pages are then mapped at the first write to each
                self._populates = False


def file_pieces(specs: Sequence[TensorSpec], buffers: Mapping[str, memoryview]) -> Iterator[memoryview]:
    """Yields the file's content in pieces, without copying the buffers."""
    ordered = _file_order(specs)
    yield memoryview(_header(ordered))
    for spec in ordered:
        yield buffers[spec.name]


def read_tensors(
    files: Filesystem,
    path: Path,
    specs: Sequence[TensorSpec],
    digests: Mapping[str, str],
    expired: Callable[[], bool] | None,
) -> dict[str, memoryview]:
    """Reads and verifies a file that must hold exactly these tensors with these digests.

    Args:
        files: the system calls.
        path: of the file.
        specs: of the expected tensors.
        digests: their xxh3_128 digests in hex.
        expired: called before each megabyte; True abandons the reading.

    Returns:
        The tensors' content by name, in the order of `specs`: views of one newly allocated buffer, aligned for their
        dtypes.

    Raises:
        TensorFileError: the file is not what was written.
        RestoreAbandonedError: `expired` returned True.
        OSError: the system refused.
    """
    ordered = _file_order(specs)
    header = _header(ordered)
    data_bytes = sum(spec.size_bytes for spec in ordered)
    descriptor = files.open(path)
    try:
        if files.size_bytes(descriptor) != len(header) + data_bytes:
            raise TensorFileError("size")
        found = bytearray(len(header))
        read_exactly(files, descriptor, memoryview(found))
        if found != header:
            raise TensorFileError("header")
        reader = _HashingReader(files, descriptor, FreshMemory(data_bytes), expired)
        by_name = {spec.name: reader.take(spec, digests[spec.name]) for spec in ordered}
    except EOFError as error:
        raise TensorFileError("size") from error
    finally:
        files.close(descriptor)
    return {spec.name: by_name[spec.name] for spec in specs}


def _file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Widest dtype first, then by name, so that every tensor is aligned for its dtype."""
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


def _header(ordered: list[TensorSpec]) -> bytes:
    """Header length and header, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {}
    offset = 0
    for spec in ordered:
        end = offset + spec.size_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _HashingReader:
    """Reads ahead in pieces and hashes each tensor's bytes while they are in the cache."""

    def __init__(
        self, files: Filesystem, descriptor: int, memory: FreshMemory, expired: Callable[[], bool] | None
    ) -> None:
        self._files = files
        self._descriptor = descriptor
        self._memory = memory
        self._bytes = memory.buffer
        self._expired = expired
        self._filled = 0
        self._offset = 0

    def take(self, spec: TensorSpec, digest: str) -> memoryview:
        start, end = self._offset, self._offset + spec.size_bytes
        hasher = spec.hasher()
        for low in range(start, end, _PIECE_BYTES):
            high = min(low + _PIECE_BYTES, end)
            self._fill_to(high)
            hasher.update(self._bytes[low:high])
        if hasher.hexdigest() != digest:
            raise TensorFileError("digest")
        self._offset = end
        return self._bytes[start:end]

    def _fill_to(self, wanted: int) -> None:
        while self._filled < wanted:
            if self._expired is not None and self._expired():
                raise RestoreAbandonedError("reading the checkpoint")
            high = min(self._filled + _PIECE_BYTES, len(self._bytes))
            self._memory.populate(self._filled, high)
            read_exactly(self._files, self._descriptor, self._bytes[self._filled : high])
            self._filled = high
