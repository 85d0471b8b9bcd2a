"""Writes exports: picks the model's tensors out of a checkpoint, names them as the job does, and writes them whole.

Imports no torch. What needs it, a file in PyTorch's own format or folding, is done in a child process (`conversion`),
before the export gets its name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, cast

from tolaria import __version__
from tolaria.checkpoint.tensor_file import file_pieces
from tolaria.config import bare_environment
from tolaria.errors import ExportFailedError, ExportRefusedError
from tolaria.export.card import CARD, TRANSIENT_FILE, ExportCard, ExportedSeed, Format
from tolaria.export.source import Source, read_source
from tolaria.filesystem import Filesystem, remove_quietly, write_durably
from tolaria.images import TensorSpec
from tolaria.values.seeds import Ramp, alpha_at, stage_from_name

SHARD_BYTES: Final = 5 * 10**9
"""Largest file of weights, as in the exports of `transformers`. A single tensor may be larger."""

CONVERSION_S: Final = 1800.0
"""Longest time of the child process that folds, or writes a file of torch.save."""

_PARTIAL: Final = ".*.partial-*"
_POLL_S: Final = 0.2
_PREFIXES: Final = ("parameter/", "buffer/")
_AVERAGES: Final = "parts/ema/tensors/"
_METADATA: Final = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What to export: a checkpoint of a state directory (see `read_source`), in which form, and to where.

    `values` are those of the `model`, or of the average of its weights, `ema`. With `fold`, seeds that are linear maps
    are multiplied into the layer beside them. `job` and its options override those of the run, by which the model is
    built to fold.
    """

    state_dir: Path
    checkpoint: str
    format: Format
    target: Path
    fold: bool = False
    job: str = ""
    shard_bytes: int = SHARD_BYTES
    values: Literal["model", "ema"] = "model"


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name, as bytes; `transient` are names of buffers that `state_dict` leaves out."""

    specs: Mapping[str, TensorSpec]
    buffers: Mapping[str, memoryview]
    transient: frozenset[str] = frozenset()

    def only(self, names: Sequence[str]) -> tuple[list[TensorSpec], dict[str, memoryview]]:
        """Returns specs and content of these tensors."""
        return [self.specs[name] for name in names], {name: self.buffers[name] for name in names}


class ExportFiles(Filesystem):
    """The system calls for an export, whose files others may read as far as the umask allows.

    None is written to once `stop` is set: the next call raises ExportFailedError.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self._stop = stop

    def make_directory(self, path: Path) -> None:
        """Creates one directory."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Creates a new file, opens it for writing and returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Writes to a file and returns the number of bytes written, which may be fewer than given."""
        _require_wanted(self._stop)
        return super().write(descriptor, content)


def export_model(
    order: ExportOrder, files: Filesystem | None = None, stop: threading.Event | None = None
) -> ExportCard:
    """Exports the model of a checkpoint and returns the card. The target appears at once, whole and durable.

    Once `stop` is set, by another thread, the export ends soon, with its child process, and leaves nothing.

    Raises:
        ExportRefusedError: the target exists, or this model cannot be exported in this form.
        ExportFailedError: the target cannot be written, or `stop` was set.
        NoCheckpointError, CheckpointDamagedError, CheckpointUnreadableError, JournalError: see `read_source`.
    """
    files = files or ExportFiles(stop)
    _refuse_existing(order.target)
    source = read_source(order.state_dir, order.checkpoint)
    card, weights = contents(source, order)
    temporary = order.target.with_name(f".{order.target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        order.target.parent.mkdir(parents=True, exist_ok=True)
        files.make_directory(temporary)
        card = write_files(files, temporary, card, weights, order.shard_bytes)
        if order.format == "hf":
            card = _write_configs(files, temporary, card, description_of(source)["transformers"])
        write_card(files, temporary, card)
        if order.fold or order.format == "torch":
            card = _converted(temporary, order, stop)
        files.sync_directory(temporary)
        _refuse_existing(order.target)
        files.rename(temporary, order.target)
        files.sync_directory(order.target.parent)
    except OSError as error:
        raise ExportFailedError(f"{order.target} cannot be written: {error.strerror or error}") from error
    finally:
        remove_quietly(files, temporary)
    return card


def remove_partial_exports(directory: Path) -> None:
    """Removes what exports have left in a directory that did not end. Ignores errors."""
    for left in directory.glob(_PARTIAL):
        remove_quietly(Filesystem(), left)


def contents(source: Source, order: ExportOrder) -> tuple[ExportCard, Weights]:
    """Returns card and weights for a checkpoint. Raises ExportRefusedError if they cannot have this form."""
    description, seeds = description_of(source), _seeds(source)
    dropped = tuple(f".seeds.{seed.seed_id}." for seed in seeds if seed.left_out)
    specs: dict[str, TensorSpec] = {}
    buffers: dict[str, memoryview] = {}
    averages = _averages(source, order)
    for spec in source.image.specs:
        prefix, _, name = spec.name.partition("/")
        if f"{prefix}/" not in _PREFIXES or name.startswith("optimizer:") or any(d in f".{name}" for d in dropped):
            continue
        specs[name] = replace(spec, name=name)
        buffers[name] = source.image.buffers[averages.get(name, spec.name)]
    weights = Weights(specs, buffers, frozenset(description.get("transient", ())))
    tied = description.get("tied", {})
    left_out: tuple[str, ...] = ()
    if order.format == "hf":
        weights, left_out = _inside(weights, description, seeds, fold=order.fold)
        tied = {}
    manifest, training = source.manifest, source.settings.get("training", {})
    card = ExportCard(
        format=order.format,
        run_id=manifest.run_id,
        checkpoint_id=manifest.checkpoint_id,
        global_step=manifest.position.global_step,
        epoch=manifest.position.epoch,
        created_at=datetime.fromtimestamp(manifest.created_at_ns / 1e9, UTC).isoformat(timespec="seconds"),
        digest=manifest.fingerprint.total,
        metrics=manifest.provenance.metrics,
        evaluated_step=manifest.provenance.evaluated_step,
        seeds=seeds,
        slots=description.get("slots", {}),
        tied=tied,
        weights=(),
        left_out=left_out,
        job=order.job or training.get("job", ""),
        job_options=training.get("options", {}),
        random_seed=training.get("seed"),
        run_name=training.get("run_name", ""),
        tags=training.get("tags", {}),
        tolaria=__version__,
        values=order.values,
    )
    return card, weights


def _averages(source: Source, order: ExportOrder) -> dict[str, str]:
    """Returns the names in the state of the averages that are exported in place of tensors, by these tensors' names."""
    if order.values == "model":
        return {}
    names = (spec.name for spec in source.image.specs)
    found = {name.removeprefix(_AVERAGES): name for name in names if name.startswith(_AVERAGES)}
    if not found:
        raise ExportRefusedError("the checkpoint has no average of the weights: ema.decay of its run was 0")
    return found


def description_of(source: Source) -> dict[str, Any]:
    """Returns the lane's description of the model; an empty one for a checkpoint of an earlier version."""
    return cast("dict[str, Any]", json.loads(source.manifest.provenance.model or "{}"))


def write_files(files: Filesystem, place: Path, card: ExportCard, weights: Weights, shard_bytes: int) -> ExportCard:
    """Writes the weights, in several files with an index if they are large; returns the card with their digests."""
    listed = [name for name in weights.specs if name not in weights.transient]
    shards = _shards([weights.specs[name] for name in listed], shard_bytes)
    many = len(shards) > 1
    written: dict[str, list[str]] = {}
    for number, names in enumerate(shards, 1):
        written[f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"] = names
    digests = {
        name: _write(files, place / name, file_pieces(*weights.only(names), _METADATA | _aliases(card, names)))
        for name, names in written.items()
    }
    if many:
        index = {
            "metadata": {"total_size": sum(weights.specs[name].size_bytes for name in listed)},
            "weight_map": {tensor: name for name, names in written.items() for tensor in sorted(names)},
        }
        name = "model.safetensors.index.json"
        digests[name] = _write(files, place / name, _text(json.dumps(index, indent=2) + "\n"))
    if transient := sorted(weights.transient & weights.specs.keys()):
        pieces = file_pieces(*weights.only(transient), _METADATA)
        digests[TRANSIENT_FILE] = _write(files, place / TRANSIENT_FILE, pieces)
    return replace(card, weights=tuple(written), files={**card.files, **digests})


def write_card(files: Filesystem, place: Path, card: ExportCard) -> None:
    """Writes the card. Raises OSError."""
    write_durably(files, place / CARD, _text(card.to_text()))


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ExportRefusedError(f"{target} exists already; give another directory, which export creates")


def _seeds(source: Source) -> tuple[ExportedSeed, ...]:
    """Returns the seeds of the state, oldest first; those without effect on the output are left out."""
    topology, step = source.values.get("topology") or {}, source.manifest.position.global_step
    seeds = []
    for entry in topology.get("seeds", ()):
        ramp = None if entry["ramp"] is None else Ramp(**entry["ramp"])
        alpha = alpha_at(stage_from_name(entry["stage"]), ramp, step)
        reason = "" if alpha else "its alpha is 0, so that the output does not depend on it"
        seeds.append(ExportedSeed(entry["seed_id"], entry["blueprint"], entry["slot"], entry["stage"], alpha, reason))
    return tuple(seeds)


def _inside(
    weights: Weights, description: Mapping[str, Any], seeds: Sequence[ExportedSeed], *, fold: bool
) -> tuple[Weights, tuple[str, ...]]:
    """Returns the tensors of the `transformers` model inside the job's, under its names, and names of all others."""
    pretrained = description.get("transformers")
    if pretrained is None:
        raise ExportRefusedError(
            "--format hf needs a job whose model is, or contains, a model of transformers; this checkpoint names none"
        )
    grown = [seed.seed_id for seed in seeds if not seed.left_out]
    if grown or fold:
        raise ExportRefusedError(
            f"--format hf holds no seeds, which transformers does not know, and folds none; the model has "
            f"{', '.join(grown) or 'none'}: take --format safetensors, which tolaria.export.load reads"
        )
    prefix = f"{pretrained['path']}." if pretrained["path"] else ""
    inside = {name: name.removeprefix(prefix) for name in weights.specs if name.startswith(prefix)}
    inside = {name: short for name, short in inside.items() if name not in weights.transient}
    kept = Weights(
        {short: replace(weights.specs[name], name=short) for name, short in inside.items()},
        {short: weights.buffers[name] for name, short in inside.items()},
    )
    outside = (name for name in weights.specs if name not in inside and name not in weights.transient)
    return kept, tuple(sorted(outside))


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Divides the tensors, in their order, into files of at most this size, or of one tensor. At least one file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec.name)
        filled += spec.size_bytes
    return shards


def _aliases(card: ExportCard, names: Sequence[str]) -> dict[str, str]:
    """Returns the tied names for the file's metadata, where safetensors' own functions look for them."""
    kept = set(names)
    return {name: first for name, first in card.tied.items() if first in kept}


def _write_configs(files: Filesystem, place: Path, card: ExportCard, pretrained: Mapping[str, Any]) -> ExportCard:
    digests = dict(card.files)
    for key in ("config", "generation_config"):
        if pretrained.get(key) is not None:
            text = json.dumps(pretrained[key], indent=2, sort_keys=True) + "\n"
            digests[f"{key}.json"] = _write(files, place / f"{key}.json", _text(text))
    return replace(card, files=digests)


def _write(files: Filesystem, path: Path, pieces: Iterator[memoryview] | list[memoryview]) -> str:
    """Writes a file durably and returns its SHA-256."""
    hasher = sha256()

    def hashed() -> Iterator[memoryview]:
        for piece in pieces:
            hasher.update(piece)
            yield piece

    write_durably(files, path, hashed())
    return hasher.hexdigest()


def _text(text: str) -> list[memoryview]:
    return [memoryview(text.encode())]


def _converted(place: Path, order: ExportOrder, stop: threading.Event | None) -> ExportCard:
    """Has a child process fold, or write a file of torch.save; returns the card that it has written."""
    words = [
        *(["--fold", str(order.shard_bytes)] if order.fold else []),
        *(["--torch"] if order.format == "torch" else []),
    ]
    code, stderr = _run([sys.executable, "-m", "tolaria.export.conversion", str(place), *words], stop)
    if code:
        last = (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
        raise ExportRefusedError(f"the model could not be converted: {last}")
    return ExportCard.from_text((place / CARD).read_text(encoding="utf-8"), str(place))


def _run(arguments: Sequence[str], stop: threading.Event | None) -> tuple[int, str]:
    """Returns exit code and standard error of a child process, which is killed when it is late or not wanted."""
    # The job has no use for the secrets of the service. In a session apart, its data workers are killed with it.
    with subprocess.Popen(  # noqa: S603 - the words are this module's
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=bare_environment(),
        start_new_session=True,
    ) as child:
        until_s = time.monotonic() + CONVERSION_S
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    _, stderr = child.communicate(timeout=_POLL_S)
                    return child.returncode, stderr
                _require_wanted(stop)
                _require_early(until_s)
        except BaseException:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            raise


def _require_early(until_s: float) -> None:
    if time.monotonic() >= until_s:
        raise ExportFailedError(f"folding took longer than {CONVERSION_S:g} s")


def _require_wanted(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise ExportFailedError("the export was stopped before its end")
