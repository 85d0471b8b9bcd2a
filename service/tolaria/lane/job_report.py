"""What a job looks like to Tolaria, found by building it, a first look and a few steps: the rows of `check-job`."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from tolaria.config import Settings
from tolaria.jobs import IntervalCursor, StatefulJob, TensorCursor, TrainModeJob
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.device import limit_threads
from tolaria.lane.evaluation import evaluate
from tolaria.lane.job_callbacks import PART
from tolaria.lane.profiling import Region
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule
from tolaria.lane.weight_averages import PART as AVERAGES
from tolaria.seeds.slots import slots_of

Row = tuple[str, str]

_PROFILED_STEPS: Final = 2
_OPERATORS: Final = 3
_MIB: Final = 2**20
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(slots=True)
class _Regions:
    """The time of each region of a step in seconds, without that of regions inside; called as a step's `mark`."""

    spent_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inside_s: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def __call__(self, name: Region) -> Iterator[None]:
        started_s = time.monotonic()
        self._inside_s.append(0.0)
        yield
        whole_s = time.monotonic() - started_s
        self.spent_s[name] += whole_s - self._inside_s.pop()
        self._inside_s[-1] += whole_s


def report(settings: Settings, steps: int) -> tuple[list[Row], tuple[str, ...]]:
    """Builds the job, trains it for some steps, evaluates it once and captures its state; changes nothing on disk.

    Returns:
        Rows of a label and a text, and sentences about what works, but probably not as it is meant.

    Raises:
        JobError, ConfigurationError: as `build` does, which is what `tolaria serve` would report.
    """
    limit_threads(settings.training.threads)
    built = build(settings)
    module = built.module
    rows = [*_model_rows(built), *_data_rows(module)]
    rows += _step_rows(module, steps)
    figures, text = _evaluated(module)
    rows += [("evaluation", text), *_restore_rows(built, settings), ("resumed", _resumed(module))]
    return rows, (*built.notes, *_absent_metrics(settings, figures))


def _model_rows(built: BuiltLane) -> Iterator[Row]:
    module = built.module
    model, optimizer = module.model, module.optimizer
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    yield "job", f"{type(module.job).__name__} on {module.device}, torch {torch.__version__}"
    numbers = f"{sum(p.numel() for p in parameters):,} parameters, {sum(p.numel() for p in trained):,} of them trained"
    yield "model", f"{type(model).__name__}: {numbers}; {size_text(size)}, {dtypes}"
    slots = [f"{name} ({slot.spec.layout}, {slot.spec.features})" for name, (_, slot) in slots_of(model).items()]
    yield "slots", ", ".join(slots) or "none, so that no seed can be grafted (place a tolaria.seeds.SeedSlot)"
    rates = ", ".join(f"{name} {rate:g}" for name, rate in module.seeds.controller.learning_rates().items())
    yield "optimizer", f"{type(optimizer).__name__}, learning rates: {rates}"
    running = ", ".join(module.fast_paths.running) or "none"
    yield "fast paths", running


def _data_rows(module: TrainModule) -> Iterator[Row]:
    cursor, passes = module.cursor, ""
    if isinstance(cursor, IntervalCursor):
        cursor = cursor.data
        passes = f"; a pass over the data has {cursor.batches_per_epoch or 'an unknown number of'} batches"
    yield "epoch", f"{module.cursor.batches_per_epoch} batches, {module.steps_per_epoch} steps{passes}"
    if isinstance(cursor, TensorCursor):
        order = "a function of training.seed and the epoch"
    elif module.loader is not None:
        order = module.loader.order
    else:
        order = f"that of the job's own {type(cursor).__name__}"
    yield "data order", order


def _step_rows(module: TrainModule, steps: int) -> Iterator[Row]:
    """Trains: a first step that warms up, then `steps`, and two more under the profiler."""
    regions, durations, waits, samples = _Regions(), list[float](), list[float](), 0
    _train(module)
    for _ in range(steps):
        step = _train(module, regions)
        durations.append(step[0])
        waits.append(step[1])
        samples += step[2]
    median, whole = statistics.median(durations), sum(durations)
    epoch_s = median * module.steps_per_epoch
    rate = f"{samples / whole:.0f} samples/s; an epoch takes about {time_text(epoch_s)}"
    yield "step", f"{time_text(median)} (median of {steps}), {rate}"
    ordered = sorted(regions.spent_s.items(), key=lambda entry: -entry[1])
    shares = [f"{name} {100 * spent / whole:.0f} %" for name, spent in ordered]
    yield "of a step", ", ".join(shares) + f"; waiting for data {100 * sum(waits) / whole:.0f} %"
    profiled = profile(activities=[ProfilerActivity.CPU])
    with _silent():
        profiled.start()
    for _ in range(_PROFILED_STEPS):
        _train(module)
    with _silent():
        profiled.stop()
    averages = sorted(profiled.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total = sum(entry.self_cpu_time_total for entry in averages) or 1.0
    top = [f"{e.key} {100 * e.self_cpu_time_total / total:.0f} %" for e in averages[:_OPERATORS]]
    yield "slowest operators", ", ".join(top)


@contextmanager
def _silent() -> Iterator[None]:
    """Discards what torch's profiler writes to standard error when it starts and stops."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _train(module: TrainModule, regions: _Regions | None = None) -> tuple[float, float, int]:
    """Takes a step, of the next epoch if this one is over; returns its duration, its wait for data, its samples."""
    for _ in range(2):
        if module.progress.over:
            module.begin_epoch()
        step = train_step(module, lambda: True, *([] if regions is None else [regions]))
        if step is not None:
            return step.duration_s, step.input_wait_s, step.samples
        module.progress = module.progress.ended()
    raise AssertionError("an epoch without a step has been refused before")


def _evaluated(module: TrainModule) -> tuple[Collection[str], str]:
    """Returns the names of what an evaluation finds, and what it was."""
    places, started_s = list[int](), time.monotonic()

    def goes_on(place: int) -> bool:
        places.append(place)
        return True

    found = evaluate(module, goes_on=goes_on)
    module.train_mode()
    if found is None or not found.samples:
        return (), "none: the job gives no sample to evaluate"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in found.figures().items())
    took = time_text(time.monotonic() - started_s)
    samples = sum(one.samples for one in found.sets.values()) or found.samples
    names = f" of {', '.join(found.sets)}" if found.sets else ""
    known = tuple(found.figures())
    if module.averages is not None and module.averages.evaluated:
        known += tuple(f"{AVERAGES}/{name}" for name in known)
    text = f"{samples} samples in {len(places)} batches{names}, {took}; after these steps: {figures}"
    return known, text


def _absent_metrics(settings: Settings, figures: Collection[str]) -> Iterator[str]:
    """Yields sentences about settings that name what the evaluation has not found; a later one may find it."""
    checkpoint, named = settings.checkpoint, {"early_stopping.metric": settings.early_stopping.metric}
    if checkpoint.best != "accuracy" and not checkpoint.best_of_training:  # accuracy means the loss where none is
        named["checkpoint.best"] = checkpoint.best_name
    for setting, metric in named.items():
        if metric and figures and metric not in figures:
            yield f"{setting} is {metric}, which this evaluation has not found; there are {', '.join(sorted(figures))}"


def _restore_rows(built: BuiltLane, settings: Settings) -> Iterator[Row]:
    limit = settings.rollback.memory_mb * _MIB
    started_s = time.monotonic()
    image = built.snapshots.state.copy()
    took = time_text(time.monotonic() - started_s)
    size = image.size_bytes
    fit = min(limit // size, settings.rollback.snapshots_max)
    if fit:
        room = f"{fit} fit into rollback.memory_mb = {settings.rollback.memory_mb}"
    else:
        room = (
            f"none fits into rollback.memory_mb = {settings.rollback.memory_mb}, so that rollbacks read the disk: "
            f"set it to {2 * -(-size // _MIB)} or more"
        )
    yield "restore point", f"{size_text(size)} in memory and as a checkpoint, copied in {took}; {room}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = f"{size_text(peak)} at the peak of this process"
    if built.module.device.type == "cuda":
        memory += f", {size_text(torch.cuda.max_memory_allocated(built.module.device))} on the device"
    yield "memory", memory


def _resumed(module: TrainModule) -> str:
    """Returns what a rollback or a restart continues with."""
    parts = ["model", "optimizer", "learning rates", "random numbers", "place in the data"]
    if isinstance(module.job, StatefulJob):
        parts.append("the job's own state")
    if kept := [name.removeprefix(PART) for name in module.callbacks.parts]:
        parts.append(f"the state of {', '.join(kept)}")
    if isinstance(module.job, TrainModeJob):
        parts.append("the modes that train_mode sets")
    text = ", ".join(parts)
    return text if isinstance(module.job, StatefulJob) else f"{text}; the job has no state_dict, so nothing else of it"


def time_text(seconds: float) -> str:
    """Formats a duration in milliseconds, or from one second on in seconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size_text(size: float) -> str:
    """Formats a number of bytes in the largest fitting unit."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.4g} {unit}"
