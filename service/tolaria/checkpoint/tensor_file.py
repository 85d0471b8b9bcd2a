"""Tensor files in the safetensors format, https://github.com/huggingface/safetensors#format.

The safetensors library is not used, so that bytes move directly between the image's memory and the file, through
`Filesystem`, and are hashed while they are in the processor's cache.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tolaria.errors import RestoreAbandonedError
from tolaria.filesystem import Filesystem, read_exactly
from tolaria.images import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

_PIECE_BYTES: Final = 2**20
"""Bytes read and hashed at a time; they fit into the second-level cache."""

_MADV_POPULATE_WRITE: Final = 23
"""madvise(2), Linux 5.14 and later; Python's `mmap` has no name for it."""


class TensorFileError(Exception):
    """Raised when a file is not the expected tensor file; the message is size, header or digest."""


class FreshMemory:
    """Newly mapped memory, freed with the last view of `buffer`.

    Page faults take most of the time of reading a cached file, so `populate` requests the pages of a piece at once.
    """

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer = memoryview(self._map)[:size_bytes]

    def populate(self, start: int, end: int) -> None:
        """Requests the pages from byte `start`, a multiple of the page size, to `end`. Affects only speed."""
        with suppress(OSError):  # an older kernel maps each page at the first write to it
            self._map.madvise(_MADV_POPULATE_WRITE, start, end - start)


def file_pieces(
    specs: Sequence[TensorSpec], buffers: Mapping[str, memoryview], metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """Yields the file's content in pieces, without copying the buffers. `metadata` is for readers of other programs."""
    ordered = _file_order(specs)
    yield memoryview(_header(ordered, metadata))
    for spec in ordered:
        yield buffers[spec.name]


def read_tensors(
    files: Filesystem,
    path: Path,
    specs: Sequence[TensorSpec],
    digests: Mapping[str, str],
    expired: Callable[[], bool] | None,
) -> dict[str, memoryview]:
    """Reads and verifies a file that must hold exactly these tensors with these xxh3_128 hex digests.

    Returns:
        The tensors' content by name, in the order of `specs`: views of one newly allocated buffer, aligned for their
        dtypes.

    Raises:
        TensorFileError, EOFError: the file differs from what was written.
        RestoreAbandonedError: `expired`, called before each megabyte, returned True.
        OSError: the file cannot be read.
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
    finally:
        files.close(descriptor)
    return {spec.name: by_name[spec.name] for spec in specs}


def _file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Widest dtype first, then by name, so that every tensor is aligned for its dtype."""
    return sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))


def _header(ordered: list[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Header length and header, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for spec in ordered:
        end = offset + spec.size_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(slots=True)
class _HashingReader:
    """Reads ahead in pieces and hashes each tensor's bytes while they are in the cache."""

    files: Filesystem
    descriptor: int
    memory: FreshMemory
    expired: Callable[[], bool] | None
    filled: int = 0
    offset: int = 0

    def take(self, spec: TensorSpec, digest: str) -> memoryview:
        content, start, self.offset = self.memory.buffer, self.offset, self.offset + spec.size_bytes
        hasher = spec.hasher()
        for low in range(start, self.offset, _PIECE_BYTES):
            high = min(low + _PIECE_BYTES, self.offset)
            while self.filled < high:
                self._fill()
            hasher.update(content[low:high])
        if hasher.hexdigest() != digest:
            raise TensorFileError("digest")
        return content[start : self.offset]

    def _fill(self) -> None:
        if self.expired is not None and self.expired():
            raise RestoreAbandonedError("reading the checkpoint")
        piece = slice(self.filled, min(self.filled + _PIECE_BYTES, len(self.memory.buffer)))
        self.memory.populate(piece.start, piece.stop)
        read_exactly(self.files, self.descriptor, self.memory.buffer[piece])
        self.filled = piece.stop
