"""Images: training states as byte buffers and JSON, their digests, and the pool that passes them on.

Does not import torch. A digest (xxh3_128) detects accidents such as bit rot, aliasing and partial writes; it is not
cryptographic. Hashing runs at memory speed, about 18 GB/s per core, and releases the GIL.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Final

import xxhash

from tolaria.errors import ImageDamagedError
from tolaria.values.training import Position

DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    dict.fromkeys(("F64", "I64", "U64", "C64"), 8)
    | dict.fromkeys(("F32", "I32", "U32"), 4)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
    | dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)
)
"""Bytes of one element for each supported dtype code. The codes are those of the safetensors format."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the packed content."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def hasher(self) -> xxhash.xxh3_128:
        """Returns a hasher of name, dtype and shape, to be updated with the content in C order."""
        return xxhash.xxh3_128(f"{self.name}\n{self.dtype}\n{self.shape}\n".encode())

    def digest(self, content: memoryview) -> str:
        """Returns the hex digest of a tensor with this spec and packed content."""
        hasher = self.hasher()
        hasher.update(content)
        return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hex digests of a whole state: one for each tensor by name, one for the other values, one over both."""

    tensors: Mapping[str, str]
    values: str
    total: str


def combine(tensor_digests: Mapping[str, str], values: bytes) -> Fingerprint:
    """Returns the fingerprint for the tensors' digests and the canonical JSON of the other values."""
    rest = xxhash.xxh3_128_hexdigest(values)
    ordered = {name: tensor_digests[name] for name in sorted(tensor_digests)}
    lines = "".join(f"{digest} {name}\n" for name, digest in ordered.items())
    return Fingerprint(MappingProxyType(ordered), rest, xxhash.xxh3_128_hexdigest(f"{lines}{rest}\n".encode()))


@dataclass(eq=False, repr=False)
class StateImage:
    """A copy of a training state.

    Attributes:
        position: the position of the captured state.
        specs: the specs of the tensors, sorted by name.
        buffers: each tensor's content by name, packed in C order: flat, writable memoryviews of bytes on the host.
        values: canonical JSON of everything that is not a tensor.
        sealed: the recorded fingerprint; None before `seal`.
        segment: number of the segment of shared memory in which the image begins; 0 in private memory.
        parts: names of tensors of which the buffer holds only the part of this rank, and that part's shape.
    """

    position: Position
    specs: tuple[TensorSpec, ...]
    buffers: Mapping[str, memoryview]
    values: bytes
    sealed: Fingerprint | None = None
    segment: int = 0
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors and JSON."""
        return sum(buffer.nbytes for buffer in self.buffers.values()) + len(self.values)

    def seal(self) -> Fingerprint:
        """Returns the image's fingerprint, computed at the first call. Thread-safe; hashing releases the GIL."""
        if self.sealed is None:
            self.sealed = self._computed()
        return self.sealed

    def verify(self) -> Fingerprint:
        """Hashes the image again and compares with the recorded fingerprint, which is recorded here if missing.

        Raises:
            ImageDamagedError: names the first tensor that differs.
        """
        sealed, found = self.seal(), self._computed()
        if found.total != sealed.total:
            differing = (name for name, digest in sealed.tensors.items() if found.tensors.get(name) != digest)
            raise ImageDamagedError(next(differing, "values"))
        return sealed

    def _computed(self) -> Fingerprint:
        return combine({spec.name: spec.digest(self.buffers[spec.name]) for spec in self.specs}, self.values)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A restorable snapshot. `digest` is None until it has been sealed; `at_ns` is its capture in Unix nanoseconds."""

    position: Position
    size_bytes: int
    digest: str | None
    at_ns: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotStatistics:
    """State of the snapshot ring. `size_bytes` includes spare buffers; counters start with the process."""

    entries: int
    size_bytes: int
    bytes_max: int
    hits: int
    misses: int
    snapshots: int
    declined: int
    evictions: int


def canonical_json(value: object) -> bytes:
    """Returns the unique encoding of `value`: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Lease:
    """The right to read an image: its memory is not reused before `release`. A context manager; thread-safe.

    Args:
        image: the leased image.
        on_release: called once, by the first `release`; None if the memory belongs to the image alone.
    """

    def __init__(self, image: StateImage, on_release: Callable[[], None] | None = None) -> None:
        self.image = image
        self._lock = threading.Lock()
        self._on_release = on_release

    def release(self) -> None:
        """Ends the lease. Further calls do nothing."""
        with self._lock:
            on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()

    def __enter__(self) -> StateImage:
        return self.image

    def __exit__(self, *_error: object) -> None:
        self.release()


class ImagePool:
    """Leased images by id, passed between lane and run. Each image is taken once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    def put(self, image: StateImage | Lease) -> int:
        """Stores an image, or takes over a lease of one, and returns its id. Ids are never reused."""
        lease = image if isinstance(image, Lease) else Lease(image)
        with self._lock:
            image_id = next(self._ids)
            self._leases[image_id] = lease
        return image_id

    def take(self, image_id: int) -> Lease:
        """Removes an image from the pool and returns its lease, which the caller must release.

        Raises:
            KeyError: the id is unknown, or the image has been taken or discarded.
        """
        with self._lock:
            return self._leases.pop(image_id)

    def discard(self, image_id: int) -> None:
        """Releases an image that has not been taken. Unknown ids are ignored."""
        with self._lock:
            lease = self._leases.pop(image_id, None)
        if lease is not None:
            lease.release()

    def __len__(self) -> int:
        return len(self._leases)
