"""Tensors in the safetensors format: 8 bytes of header length, a JSON header, then every tensor's bytes.

https://github.com/huggingface/safetensors#format; any safetensors library reads these files. Written and read here
rather than by the library because bytes go straight between the image's memory and the file, through the `Filesystem`
seam, and are hashed while they are still in the processor's cache.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, cast

from tolaria.errors import RestoreAbandonedError
from tolaria.rollback.digest import DTYPES, TensorSpec, packed_bytes
from tolaria.rollback.filesystem import Filesystem, read_exactly
from tolaria.rollback.memory import FreshMemory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from typing_extensions import Buffer

_PIECE_BYTES: Final = 2**20
"""Read and hashed at a time: fits the second-level cache."""


class TensorFileError(Exception):
    """Raised when a file is not the tensor file that it should be. `reason` is size, header or digest."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def file_pieces(specs: list[TensorSpec], tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The file's content, piece by piece; nothing is copied for tensors on the CPU that are contiguous."""
    ordered = file_order(specs)
    yield memoryview(header_bytes(ordered))
    for spec in ordered:
        yield packed_bytes(tensors[spec.name])


def file_order(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Widest dtype first, then by name: so every tensor is aligned for its dtype."""
    return sorted(specs, key=lambda spec: (-DTYPES[spec.dtype].itemsize, spec.name))


def header_bytes(ordered: list[TensorSpec]) -> bytes:
    """Length and header; spaces bring the start of the data to a multiple of 8."""
    entries: dict[str, object] = {}
    offset = 0
    for spec in ordered:
        end = offset + spec.size_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_tensors(
    files: Filesystem, path: Path, specs: list[TensorSpec], digests: Mapping[str, str], expired: Callable[[], bool]
) -> dict[str, Tensor]:
    """Read and verify a file that must hold exactly these tensors with these digests.

    Args:
        files: the system calls.
        path: the file.
        specs: the tensors expected.
        digests: their xxh3_128, in hex.
        expired: asked before each megabyte; True gives up.

    Returns:
        Tensors on the CPU by name, in the order of `specs`, views of one buffer that nothing else uses.

    Raises:
        TensorFileError: the file is not what was written.
        RestoreAbandonedError: `expired` said so.
        OSError: the system refused.
    """
    ordered = file_order(specs)
    header = header_bytes(ordered)
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


class _HashingReader:
    """Reads ahead in pieces and hashes each tensor's bytes while they are in the cache."""

    def __init__(self, files: Filesystem, descriptor: int, memory: FreshMemory, expired: Callable[[], bool]) -> None:
        self._files = files
        self._descriptor = descriptor
        self._memory = memory
        self._bytes = memoryview(cast("Buffer", memory.tensor.numpy()))
        self._expired = expired
        self._filled = 0
        self._offset = 0

    def take(self, spec: TensorSpec, digest: str) -> Tensor:
        start, end = self._offset, self._offset + spec.size_bytes
        hasher = spec.hasher()
        for low in range(start, end, _PIECE_BYTES):
            high = min(low + _PIECE_BYTES, end)
            self._fill_to(high)
            hasher.update(self._bytes[low:high])
        if hasher.hexdigest() != digest:
            raise TensorFileError("digest")
        self._offset = end
        return self._memory.tensor[start:end].view(DTYPES[spec.dtype]).view(spec.shape)

    def _fill_to(self, wanted: int) -> None:
        while self._filled < wanted:
            if self._expired():
                raise RestoreAbandonedError("reading the checkpoint")
            high = min(self._filled + _PIECE_BYTES, len(self._bytes))
            self._memory.provide(self._filled, high)
            read_exactly(self._files, self._descriptor, self._bytes[self._filled : high])
            self._filled = high
