"""An image: a captured training state as byte buffers and canonical JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tolaria.errors import ImageDamagedError
from tolaria.images.specs import Fingerprint, TensorSpec, combine
from tolaria.values.training import Position


@dataclass(eq=False, repr=False)
class StateImage:
    """A copy of a training state.

    Attributes:
        position: of the captured state.
        specs: of the tensors, sorted by name.
        buffers: each tensor's content by name, packed in C order: flat, writable memoryviews of bytes on the host.
        values: canonical JSON of everything that is not a tensor.
        sealed: the recorded fingerprint; None before `seal`.
    """

    position: Position
    specs: tuple[TensorSpec, ...]
    buffers: Mapping[str, memoryview]
    values: bytes
    sealed: Fingerprint | None = None

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
    """A restorable snapshot. `digest` is None until the snapshot has been sealed."""

    position: Position
    size_bytes: int
    digest: str | None


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
