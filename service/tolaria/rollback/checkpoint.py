"""One durable checkpoint: a directory with `tensors.safetensors`, `state.json` and `manifest.json`.

Owns what is in the directory and how it comes to be there all at once. Must not know which checkpoints exist or are
kept. Nothing is pickled: a file that someone else put there can at worst be refused.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tolaria.errors import CheckpointDamagedError, CheckpointUnreadableError, CheckpointWriteError
from tolaria.rollback.arena import arena_specs
from tolaria.rollback.filesystem import Filesystem, read_all, remove_quietly, write_durably
from tolaria.rollback.manifest import Manifest, ManifestError, parse_manifest, totals_agree
from tolaria.rollback.state import StateImage
from tolaria.rollback.tensor_file import TensorFileError, file_pieces, read_tensors

TEMPORARY_PREFIX: Final = ".partial-"
_TENSORS: Final = "tensors.safetensors"
_VALUES: Final = "state.json"
_MANIFEST: Final = "manifest.json"
_MANIFEST_BYTES_MAX: Final = 2**30


def write_checkpoint(files: Filesystem, parent: Path, manifest: Manifest, image: StateImage) -> Path:
    """Write the image under `parent`: aside first, every file and directory synced, then renamed; returns its place.

    When this returns, the checkpoint survives a power cut. When it raises, nothing of it has the name of a checkpoint.

    Raises:
        CheckpointWriteError: the system refused; `stage` says at what.
    """
    aside, place = parent / f"{TEMPORARY_PREFIX}{manifest.checkpoint_id}", parent / manifest.checkpoint_id
    try:
        with _stage("create"):
            files.make_directory(aside)
        with _stage("write"):
            write_durably(files, aside / _TENSORS, file_pieces(list(manifest.specs), image.tensors))
            write_durably(files, aside / _VALUES, [memoryview(image.values)])
            write_durably(files, aside / _MANIFEST, [memoryview(manifest.to_bytes())])
            files.sync_directory(aside)
        with _stage("rename"):
            files.rename(aside, place)
    except CheckpointWriteError:
        remove_quietly(files, aside)
        raise
    try:
        with _stage("sync_parent"):
            files.sync_directory(parent)
    except CheckpointWriteError:
        remove_quietly(files, place)
        raise
    return place


def manifest_of(
    image: StateImage, *, checkpoint_id: str, run_id: str, created_at_ns: int, metric: float | None
) -> Manifest:
    """The manifest for an image; seals the image."""
    return Manifest(
        checkpoint_id=checkpoint_id,
        run_id=run_id,
        position=image.position,
        created_at_ns=created_at_ns,
        metric=metric,
        values_bytes=len(image.values),
        specs=arena_specs(image.tensors),
        fingerprint=image.seal(),
    )


def read_manifest(files: Filesystem, place: Path) -> Manifest:
    """The manifest of the checkpoint at `place`, proved whole and to be that checkpoint's.

    Raises:
        CheckpointDamagedError: it is missing, or not what was written.
        CheckpointUnreadableError: the system refused.
    """
    with _reading(place.name, "manifest"):
        try:
            manifest = parse_manifest(read_all(files, place / _MANIFEST, _MANIFEST_BYTES_MAX))
        except ManifestError as error:
            raise CheckpointDamagedError(place.name, "manifest", "format") from error
    if manifest.checkpoint_id != place.name:
        raise CheckpointDamagedError(place.name, "manifest", "format")
    return manifest


def read_checkpoint(files: Filesystem, place: Path, expired: Callable[[], bool]) -> tuple[Manifest, StateImage]:
    """The checkpoint at `place`: every digest, dtype, shape and length verified. The image is sealed, on the CPU.

    Raises:
        CheckpointDamagedError: it is not what was written.
        CheckpointUnreadableError: the system refused.
        RestoreAbandonedError: `expired`, asked before each megabyte, said so.
    """
    manifest = read_manifest(files, place)
    with _reading(place.name, "state"):
        values = read_all(files, place / _VALUES, manifest.values_bytes)
    if len(values) != manifest.values_bytes:
        raise CheckpointDamagedError(place.name, "state", "size")
    if not totals_agree(manifest, values):
        raise CheckpointDamagedError(place.name, "state", "digest")
    with _reading(place.name, "tensors"):
        tensors = read_tensors(files, place / _TENSORS, list(manifest.specs), manifest.fingerprint.tensors, expired)
    return manifest, StateImage(manifest.position, tensors, values, sealed=manifest.fingerprint)


def errno_name(error: OSError) -> str:
    """ENOSPC and the like; UNKNOWN where the system gave no number."""
    return errno.errorcode.get(error.errno or 0, "UNKNOWN")


@contextmanager
def _stage(stage: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointWriteError(stage, errno_name(error), str(error)) from error


@contextmanager
def _reading(checkpoint_id: str, stage: str) -> Iterator[None]:
    """The one place where what can go wrong while reading becomes damage or refusal."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointDamagedError(checkpoint_id, stage, "missing") from error
    except OSError as error:
        raise CheckpointUnreadableError(checkpoint_id, stage, errno_name(error)) from error
    except TensorFileError as error:
        raise CheckpointDamagedError(checkpoint_id, stage, error.reason) from error
    except (ValueError, EOFError) as error:
        raise CheckpointDamagedError(checkpoint_id, stage, "size") from error
