"""The format of a checkpoint: a directory with `tensors.safetensors`, `state.json` and `manifest.json`.

The manifest names run, position and tensors, and holds the digest of every piece and of itself. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import xxhash

from tolaria.checkpoint.tensor_file import TensorFileError, file_pieces, read_tensors
from tolaria.errors import CheckpointDamagedError, CheckpointUnreadableError, CheckpointWriteError
from tolaria.filesystem import Filesystem, errno_name, read_all, remove_quietly, write_durably
from tolaria.images import Fingerprint, StateImage, TensorSpec, canonical_json, combine
from tolaria.journal.rows import CheckpointRow
from tolaria.values.lineage import FIRST_ATTEMPT, Lineage
from tolaria.values.training import Position

FORMAT: Final = 1
TEMPORARY_PREFIX: Final = ".partial-"
_TENSORS: Final = "tensors.safetensors"
_VALUES: Final = "state.json"
_MANIFEST: Final = "manifest.json"
FILES: Final = (_TENSORS, _VALUES, _MANIFEST)
"""Names of the files of a checkpoint."""
_MANIFEST_BYTES_MAX: Final = 2**30


class NewerFormatError(ValueError):
    """A newer Tolaria wrote a checkpoint in a later format: it is intact, and this version cannot read it."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a state came about: its ancestors, the newest checkpoint among them, and whether the loss was rising.

    `model` is the lane's description of the model, as JSON; `metrics` are those of the newest evaluation, made at
    `evaluated_step`, -1 without one. Exports need both; manifests of earlier versions have neither.
    """

    lineage: Lineage = field(default_factory=Lineage)
    parent: str = ""
    suspect: bool = False
    model: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_step: int = -1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describes a checkpoint. `metric` decides which checkpoint is best; one without a metric never is.

    Manifests of version 0.1.0 have no provenance: those states are of the first attempt.
    """

    checkpoint_id: str
    run_id: str
    position: Position
    created_at_ns: int
    metric: float | None
    values_bytes: int
    specs: tuple[TensorSpec, ...]
    fingerprint: Fingerprint
    provenance: Provenance = field(default_factory=Provenance)

    @classmethod
    def of(
        cls,
        image: StateImage,
        *,
        checkpoint_id: str,
        run_id: str,
        created_at_ns: int,
        metric: float | None,
        provenance: Provenance | None = None,
    ) -> Manifest:
        """Returns the manifest for an image. Seals the image."""
        return cls(
            checkpoint_id=checkpoint_id,
            run_id=run_id,
            position=image.position,
            created_at_ns=created_at_ns,
            metric=metric,
            values_bytes=len(image.values),
            specs=image.specs,
            fingerprint=image.seal(),
            provenance=provenance or Provenance(),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors and other values."""
        return sum(spec.size_bytes for spec in self.specs) + self.values_bytes

    def row(self) -> CheckpointRow:
        """Returns the journal's row of the committed checkpoint."""
        return CheckpointRow(
            checkpoint_id=self.checkpoint_id,
            at_ns=self.created_at_ns,
            run_id=self.run_id,
            global_step=self.position.global_step,
            epoch=self.position.epoch,
            size_bytes=self.size_bytes,
            digest=self.fingerprint.total,
            metric=self.metric,
            attempt=self.provenance.lineage.attempt,
            forks=self.provenance.lineage.to_json(),
            parent=self.provenance.parent,
            suspect=int(self.provenance.suspect),
        )

    def to_bytes(self) -> bytes:
        """Returns canonical JSON that includes its own digest."""
        body = {
            "format": FORMAT,
            "checkpoint_id": self.checkpoint_id,
            "run_id": self.run_id,
            "global_step": self.position.global_step,
            "epoch": self.position.epoch,
            "created_at_ns": self.created_at_ns,
            "metric": self.metric,
            "values": [self.values_bytes, self.fingerprint.values],
            "tensors": [[s.name, s.dtype, list(s.shape), self.fingerprint.tensors[s.name]] for s in self.specs],
            "digest": self.fingerprint.total,
            "attempt": self.provenance.lineage.attempt,
            "forks": self.provenance.lineage.to_json(),
            "parent": self.provenance.parent,
            "suspect": self.provenance.suspect,
            "model": self.provenance.model,
            "metrics": dict(self.provenance.metrics),
            "evaluated_step": self.provenance.evaluated_step,
        }
        return canonical_json({**body, "manifest_digest": xxhash.xxh3_128_hexdigest(canonical_json(body))})

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Parses what `to_bytes` returned. Every byte is covered by the manifest's own digest.

        Raises:
            NewerFormatError: the content has a later format.
            ValueError: the content is not exactly what `to_bytes` returns.
        """
        try:
            document = cast("dict[str, Any]", json.loads(content))
            if canonical_json(document) != content:
                raise ValueError("it is not in canonical form")
            found = document.pop("manifest_digest")
            if found != xxhash.xxh3_128_hexdigest(canonical_json(document)):
                raise ValueError("its digest does not match")
            if (form := document.get("format")) != FORMAT:
                raise (NewerFormatError if isinstance(form, int) and form > FORMAT else ValueError)(f"format {form}")
            specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape, _ in document["tensors"])
            if any(spec.size_bytes < 0 for spec in specs):
                raise ValueError("a tensor has a negative size")
            values_bytes, values_digest = document["values"]
            digests = {name: digest for name, *_, digest in document["tensors"]}
            return cls(
                checkpoint_id=document["checkpoint_id"],
                run_id=document["run_id"],
                position=Position(document["global_step"], document["epoch"]),
                created_at_ns=document["created_at_ns"],
                metric=document["metric"],
                values_bytes=values_bytes,
                specs=specs,
                fingerprint=Fingerprint(digests, values_digest, document["digest"]),
                provenance=Provenance(
                    Lineage.of(document.get("attempt", FIRST_ATTEMPT), document.get("forks", "")),
                    document.get("parent", ""),
                    document.get("suspect", False),
                    document.get("model", ""),
                    document.get("metrics", {}),
                    document.get("evaluated_step", -1),
                ),
            )
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"a field is missing or has the wrong form: {error}") from error


def write_checkpoint(files: Filesystem, parent: Path, manifest: Manifest, image: StateImage) -> Path:
    """Writes an image under `parent` and returns the checkpoint's directory.

    The checkpoint survives a power failure once this returns; after an error no checkpoint of this id exists.

    Raises:
        CheckpointWriteError: an operation failed; `stage` names it.
    """
    temporary, place = parent / f"{TEMPORARY_PREFIX}{manifest.checkpoint_id}", parent / manifest.checkpoint_id
    try:
        with write_errors("create"):
            files.make_directory(temporary)
        with write_errors("write"):
            write_durably(files, temporary / _TENSORS, file_pieces(manifest.specs, image.buffers))
            write_durably(files, temporary / _VALUES, [memoryview(image.values)])
            write_durably(files, temporary / _MANIFEST, [memoryview(manifest.to_bytes())])
            files.sync_directory(temporary)
        with write_errors("rename"):
            files.rename(temporary, place)
        with write_errors("sync_parent"):
            files.sync_directory(parent)
    except CheckpointWriteError:
        for leftover in (temporary, place):
            remove_quietly(files, leftover)
        raise
    return place


def read_manifest(files: Filesystem, place: Path) -> Manifest:
    """Reads and verifies the manifest of the checkpoint in directory `place`.

    Raises:
        CheckpointDamagedError: the manifest is missing or differs from what was written.
        CheckpointUnreadableError: the operating system cannot read it, or a newer Tolaria wrote it.
    """
    with _read_errors(place.name, "manifest"):
        content = read_all(files, place / _MANIFEST, _MANIFEST_BYTES_MAX)
    try:
        manifest = Manifest.from_bytes(content)
    except NewerFormatError as error:
        raise CheckpointUnreadableError(place.name, "manifest", f"{error} of a newer Tolaria") from error
    except ValueError as error:
        raise CheckpointDamagedError(place.name, "manifest", "format") from error
    if manifest.checkpoint_id != place.name:
        raise CheckpointDamagedError(place.name, "manifest", "format")
    return manifest


def read_checkpoint(
    files: Filesystem, place: Path, expired: Callable[[], bool] | None = None
) -> tuple[Manifest, StateImage]:
    """Reads the checkpoint in directory `place` and verifies every digest, dtype, shape and length.

    Returns:
        The manifest and the sealed image, in newly allocated memory.

    Raises:
        CheckpointDamagedError: the checkpoint differs from what was written.
        CheckpointUnreadableError: the operating system cannot read it.
        RestoreAbandonedError: `expired`, called before each megabyte, returned True.
    """
    manifest = read_manifest(files, place)
    fingerprint = manifest.fingerprint
    with _read_errors(place.name, "state"):
        values = read_all(files, place / _VALUES, manifest.values_bytes)
    if len(values) != manifest.values_bytes:
        raise CheckpointDamagedError(place.name, "state", "size")
    if combine(fingerprint.tensors, values).total != fingerprint.total:
        raise CheckpointDamagedError(place.name, "state", "digest")
    with _read_errors(place.name, "tensors"):
        buffers = read_tensors(files, place / _TENSORS, manifest.specs, fingerprint.tensors, expired)
    return manifest, StateImage(manifest.position, manifest.specs, buffers, values, sealed=fingerprint)


@contextmanager
def write_errors(stage: str) -> Iterator[None]:
    """Translates the system's errors into CheckpointWriteError."""
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError(stage, errno_name(error), str(error)) from error


@contextmanager
def _read_errors(checkpoint_id: str, stage: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointDamagedError(checkpoint_id, stage, "missing") from error
    except OSError as error:
        raise CheckpointUnreadableError(checkpoint_id, stage, errno_name(error)) from error
    except TensorFileError as error:
        raise CheckpointDamagedError(checkpoint_id, stage, str(error)) from error
    except (ValueError, EOFError) as error:
        raise CheckpointDamagedError(checkpoint_id, stage, "size") from error
