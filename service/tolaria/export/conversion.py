"""The child process that does to an unfinished export what needs torch: folds seeds, writes a file of torch.save."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.errors import ExportRefusedError, TolariaError
from tolaria.export.card import CARD, TORCH_FILE, file_digest, read_card
from tolaria.export.folding import fold
from tolaria.export.loading import load, read_tensors
from tolaria.export.writing import ExportFiles, Weights, write_card, write_files
from tolaria.filesystem import write_durably
from tolaria.jobs import Batch, EvaluatingJob, JobContext, LoaderCursor, TrainingJob, build_job
from tolaria.jobs.indexed import samples_of
from tolaria.state.encoding import packed_bytes, spec_of


def fold_export(place: Path, shard_bytes: int) -> None:
    """Folds the seeds of an export in place, and notes the difference in the card.

    The model is built by the card's job, which also evaluates its first validation batch before and after.

    Raises:
        ExportRefusedError: the card names no job.
        JobError, ExportError: the job cannot be built, or its model is not that of the export.
    """
    card = read_card(place)
    if not card.job:
        raise ExportRefusedError("the run's job is not known: name it with --job, to fold")
    torch.manual_seed(card.random_seed or 0)
    job = build_job(card.job, JobContext(card.random_seed or 0, torch.device("cpu"), card.job_options))
    model = load(place, job.build_model, verify=False)
    batch = _validation_batch(job)
    before = _outputs(job, model, batch)
    found = fold(model)
    after = _outputs(job, model, batch)
    seeds = tuple(
        replace(seed, left_out=f"folded into {found.folded[seed.seed_id]}") if seed.seed_id in found.folded else seed
        for seed in card.seeds
    )
    report: dict[str, Any] = {"folded": dict(found.folded), "kept": dict(found.kept)}
    if before is not None and after is not None:
        report["largest_difference"] = float((before.double() - after.double()).abs().max())
        report["largest_output"] = float(before.double().abs().max())
    card = replace(card, seeds=seeds, fold=report, files={}, weights=())
    for path in place.iterdir():
        path.unlink()
    files = ExportFiles()
    write_card(files, place, write_files(files, place, card, _weights(model), shard_bytes))


def write_torch_file(place: Path) -> None:
    """Replaces the weights of an export by one file of torch.save, with all names of tied tensors."""
    card = read_card(place)
    names = list(card.weights)
    tensors = read_tensors(place, replace(card, files={}))
    tensors |= {name: tensors[first] for name, first in card.tied.items() if first in tensors}
    content = io.BytesIO()
    torch.save(tensors, content)
    write_durably(ExportFiles(), place / TORCH_FILE, [content.getbuffer()])
    kept = {name: digest for name, digest in card.files.items() if not name.startswith("model")}
    kept[TORCH_FILE] = file_digest(place / TORCH_FILE)
    for name in (*names, CARD, *(set(card.files) - set(kept) - set(names))):
        (place / name).unlink()
    write_card(ExportFiles(), place, replace(card, weights=(TORCH_FILE,), files=kept))


def _weights(model: nn.Module) -> Weights:
    buffers = dict(model.named_buffers())
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | buffers
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    transient = frozenset(buffers) - frozenset(model.state_dict())
    return Weights(specs, {name: packed_bytes(tensor) for name, tensor in tensors.items()}, transient)


def _validation_batch(job: TrainingJob) -> Batch | None:
    """Returns a validation batch of the job; None if it is not evaluated."""
    given: Any = job.validation_batches() if isinstance(job, EvaluatingJob) else None
    if isinstance(given, Mapping):
        given = next(iter(given.values()), None)
    if isinstance(given, LoaderCursor):
        given.begin_epoch(1)
        return given.next_batch()
    batch = None if given is None else next(iter(given), None)
    if batch is None or isinstance(batch, Batch):
        return batch if batch is None or batch.samples else None
    return Batch(batch, samples_of(batch))


def _outputs(job: TrainingJob, model: nn.Module, batch: Batch | None) -> Tensor | None:
    """Returns the tensor that the model makes of a validation batch; None if it makes another kind of output."""
    if batch is None:
        return None
    seen: list[Tensor] = []
    with _recorded(model, seen), torch.no_grad():
        if isinstance(job, EvaluatingJob):
            job.evaluate(model, batch)
    return seen[0] if seen else None


@contextmanager
def _recorded(model: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if tensors:
            seen.append(max(tensors, key=lambda tensor: tensor.numel()).clone())

    handle = model.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


def main() -> None:
    """Converts the export in the directory that the command line names; an error is the last line of stderr."""
    parser = argparse.ArgumentParser(prog="tolaria.export.conversion")
    parser.add_argument("place", type=Path)
    parser.add_argument("--fold", type=int, metavar="SHARD_BYTES", default=0)
    parser.add_argument("--torch", action="store_true")
    given = parser.parse_args()
    try:
        if given.fold:
            fold_export(given.place, given.fold)
        if given.torch:
            write_torch_file(given.place)
    except (TolariaError, OSError) as error:
        sys.exit(" ".join(str(error).splitlines()))


if __name__ == "__main__":
    main()
