"""`SeedAggregationTracker`: merges the rows of a step's microbatches into one gradient, and gathers an epoch's metrics.

tracker.follow(states, params)                       # after seeds have changed
names = tracker.begin(step)                          # for each step
rows = source_rows(losses, shared, names=names, own=own, out=tracker.lend())
tracker.add(rows)                                    # for each microbatch
gradient = tracker.combine()
metrics = tracker.finish_epoch()                     # at the end of the epoch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from leyline.v1.seeds_pb2 import SeedState
from tolaria.gradients.accumulate import MicrobatchAccumulator, SeedGradientAccumulator, StepRows
from tolaria.gradients.flat import FlatLayout
from tolaria.gradients.gram import Rows, combine_rows, gram_matrix
from tolaria.gradients.pcgrad import MergedGradient, project, projection_order, step_generator
from tolaria.gradients.rows import OwnGradients, SourceRows
from tolaria.gradients.seed_metrics import PerLayerMetricUpdater, RowMeasurements, SeedMetricUpdater
from tolaria.gradients.weights import AttributionMode, SeedWeightResolver, SourceWeight, TeacherAttributionMixer
from tolaria.values.gradients import SeedMetricSet

_NO_SAMPLES: Final[Counter[str]] = Counter()


class GradientMode(StrEnum):
    """How the rows of a step become one gradient.

    Attributes:
        SEED: PCGrad across sources, then their mean weighted by stage.
        MICROBATCH: PCGrad across microbatches, then their sum; the sources of a microbatch are added up.
        SUM: the sum of all rows, as in plain training.
    """

    SEED = "seed"
    MICROBATCH = "microbatch"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How to merge. The order of projections is derived from the run's seed and the step."""

    mode: GradientMode
    attribution: AttributionMode
    run_seed: int | str


@dataclass(frozen=True, slots=True)
class StepGradient:
    """The gradient of one step. `merged.vector` (d,) is valid until the next `combine`.

    `own` holds, by source, the summed gradients over its own parameters, unweighted.
    """

    merged: MergedGradient
    own: OwnGradients


class SeedAggregationTracker:
    """Merges the rows of every step, and accumulates their metrics.

    Args:
        layout: of the d elements of the shared parameters, which have one dtype and device.
        settings: how to merge.
        isolation: whether germinated and training seeds have no row.
        layer_norms_top_k: layers to report for each source; 0, or microbatch mode, turns norms by layer off.
        dtype: of the rows.
        device: of the rows.
    """

    def __init__(
        self,
        layout: FlatLayout,
        settings: MergeSettings,
        *,
        isolation: bool,
        layer_norms_top_k: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._settings = settings
        self._merger = StepMerger(settings, layout.numel, dtype=dtype, device=device)
        self._resolver = SeedWeightResolver(isolation=isolation)
        self._metrics = SeedMetricUpdater()
        self._layers = PerLayerMetricUpdater(layout, top_k=layer_norms_top_k)
        self._kind = (layout.numel, dtype, device)
        self._states: tuple[SeedState, ...] = ()
        self._params: Mapping[str, int] = {}
        self._sources: tuple[SourceWeight, ...] = ()
        self._names: tuple[str, ...] = ()
        self._accumulator = self._new_accumulator()
        self._samples: Counter[str] = Counter()
        self._step = 0

    def follow(self, states: Sequence[SeedState], params: Mapping[str, int]) -> None:
        """Sets the seeds from the next step on; `params` is the number of elements of each seed's parameters."""
        self._states = tuple(states)
        self._params = dict(params)

    def begin(self, step: int) -> tuple[str, ...]:
        """Starts a global step, discards an unfinished one, and returns the sources with a row, host first.

        Raises:
            GradientWeightError: see `SeedWeightResolver.resolve`.
        """
        self._sources = self._resolver.resolve(self._states, step)
        names = tuple(source.name for source in self._sources if source.has_row)
        self._accumulator.clear()
        if names != self._names:
            self._names = names
            self._accumulator = self._new_accumulator()
        self._samples = Counter()
        self._step = step
        return names

    def lend(self) -> Tensor:
        """Returns memory (n, d) for the rows of the next microbatch, one for each name that `begin` returned."""
        return self._accumulator.lend()

    def add(self, rows: SourceRows, samples: Mapping[str, int] = _NO_SAMPLES) -> None:
        """Adds one microbatch. `samples` counts its samples by source, for attribution by the dataloader.

        Raises:
            UnknownSourceError, GradientMismatchError: the rows are not those of the names that `begin` returned.
        """
        self._accumulator.add(rows)
        self._samples.update(samples)

    def combine(self) -> StepGradient:
        """Merges the microbatches since `begin`. Synchronises once if PCGrad projects more than one row.

        Raises:
            NoGradientsError: nothing was added.
        """
        rows = self._accumulator.take()
        merged, measured = self._merger.merge(rows, self._step, self._sources, self._samples)
        self._metrics.update(self._sources, rows, merged, measured)
        if rows.names == self._names:
            self._layers.update(rows)
        return StepGradient(merged, rows.own)

    def finish_epoch(self) -> SeedMetricSet:
        """Returns the epoch's means by source and starts the next epoch. Synchronises."""
        return self._metrics.read(self._params, self._layers.read())

    def _new_accumulator(self) -> SeedGradientAccumulator | MicrobatchAccumulator:
        numel, dtype, device = self._kind
        kind = MicrobatchAccumulator if self._settings.mode is GradientMode.MICROBATCH else SeedGradientAccumulator
        return kind(self._names, numel, dtype=dtype, device=device)


class StepMerger:
    """Merges the rows of one step after the other, always into the same memory."""

    def __init__(self, settings: MergeSettings, numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._settings = settings
        self._mixer = TeacherAttributionMixer(settings.attribution)
        self._result = torch.empty(numel, dtype=dtype, device=device)

    @torch.no_grad()
    def merge(
        self, rows: StepRows, step: int, sources: Sequence[SourceWeight], samples: Mapping[str, int]
    ) -> tuple[MergedGradient, RowMeasurements]:
        """Returns the merged gradient and the measured rows. The vector is valid until the next call.

        If a single row took part, the result is that row. Synchronises once if PCGrad projects.

        Args:
            rows: the accumulated rows.
            step: the global step, for the order of projections.
            sources: all sources of the step.
            samples: number of samples by source, for attribution.
        """
        present = [row for row, part in enumerate(rows.parts) if part]
        if len(present) == 1 or self._settings.mode is GradientMode.SUM:
            return self._add(rows, present)
        generator = step_generator(self._settings.run_seed, step)
        if self._settings.mode is GradientMode.MICROBATCH:
            return self._project_microbatches(rows, generator)
        by_name = {source.name: source for source in sources}
        weights = [by_name[rows.names[row]] for row in present]
        return self._project_sources(_select(rows.matrix, present), weights, samples, generator)

    def _project_sources(
        self, given: Rows, sources: Sequence[SourceWeight], samples: Mapping[str, int], generator: torch.Generator
    ) -> tuple[MergedGradient, RowMeasurements]:
        """Attributes the teacher's row and runs PCGrad, both on dot products alone."""
        names = [source.name for source in sources]
        shares = self._mixer.shares(sources, samples)
        mixing = self._mixer.mixing(names, shares)
        gram = gram_matrix(given)
        mixed = mixing @ gram @ mixing.T
        weights = [
            source.weight if kept else 0.0 for source, kept in zip(sources, mixing.diagonal().tolist(), strict=True)
        ]
        projection = project(mixed, projection_order(len(names), generator))
        coefficients = torch.tensor(projection.merged(weights), dtype=torch.float64) @ mixing
        vector = combine_rows(given, coefficients.tolist(), out=self._result)
        merged = MergedGradient(vector, projection.conflicts, projection.participants, projected=True)
        teacher = self._mixer.teacher_shares(names, gram.diagonal().sqrt(), shares)
        norms = mixed.diagonal().clamp_min(0).sqrt()
        return merged, RowMeasurements(names, norms, teacher, projection.conflicts_by_row)

    def _project_microbatches(
        self, rows: StepRows, generator: torch.Generator
    ) -> tuple[MergedGradient, RowMeasurements]:
        projection = project(gram_matrix(rows.matrix), projection_order(len(rows.names), generator))
        vector = combine_rows(rows.matrix, projection.merged(None), out=self._result)
        merged = MergedGradient(vector, projection.conflicts, projection.participants, projected=True)
        return merged, _no_measurements(rows.matrix)

    def _add(self, rows: StepRows, present: Sequence[int]) -> tuple[MergedGradient, RowMeasurements]:
        given = _select(rows.matrix, present)
        vector = given[0] if len(present) == 1 else combine_rows(given, [1.0] * len(present), out=self._result)
        merged = MergedGradient(vector, 0, len(present), projected=False)
        if self._settings.mode is GradientMode.MICROBATCH:
            return merged, _no_measurements(rows.matrix)
        names = [rows.names[row] for row in present]
        norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in given])
        teacher = self._mixer.teacher_shares(names, norms, [0.0] * len(names))
        return merged, RowMeasurements(names, norms, teacher, [0] * len(names))


def _select(matrix: Tensor, rows: Sequence[int]) -> Rows:
    return matrix if len(rows) == len(matrix) else [matrix[row] for row in rows]


def _no_measurements(like: Tensor) -> RowMeasurements:
    """Returns empty measurements, for rows that are not those of sources."""
    nothing = torch.zeros(0, dtype=torch.float64, device=like.device)
    return RowMeasurements((), nothing, nothing, ())
