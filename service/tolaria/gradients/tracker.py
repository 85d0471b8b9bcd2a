"""`SeedAggregationTracker`: merges the rows of a step's microbatches into one gradient, and gathers an epoch's metrics.

The merged gradient is scale-neutral: it is the sum of w_i times projected row i, the weighted mean times the total
weight, so that rows which come and go do not change the part of the others.

`follow` sets the seeds. Each step calls `begin`, then `add` for every microbatch (its rows written into the memory
that `lend` returns), then `combine`, and `applied` once the gradient has been used; `finish_epoch` returns the metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from leyline.v1.seeds_pb2 import SeedState
from tolaria.gradients.accumulate import SeedGradientAccumulator, StepRows
from tolaria.gradients.aggregators import PCGRAD, aggregator_of
from tolaria.gradients.flat import FlatLayout
from tolaria.gradients.gram import Rows, combine_rows, gram_matrix
from tolaria.gradients.pcgrad import MergedGradient, projection_order, step_generator
from tolaria.gradients.rows import OwnGradients, SourceRows
from tolaria.gradients.seed_metrics import LayerMeasurements, PerLayerMetricUpdater, RowMeasurements, SeedMetricUpdater
from tolaria.gradients.weights import AttributionMode, SeedWeightResolver, SourceWeight, TeacherAttributionMixer
from tolaria.values.gradients import SeedMetricSet

_NO_SAMPLES: Final[Counter[str]] = Counter()


class GradientMode(StrEnum):
    """How the rows of a step become one gradient."""

    SEED = "seed"
    """The aggregator across sources, by default PCGrad, then their sum weighted by stage."""
    MICROBATCH = "microbatch"
    """The aggregator across microbatches, then their sum; the sources of a microbatch are added up."""
    SUM = "sum"
    """The sum of all rows, as in plain training."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How to merge. The order of projections is derived from the run's seed and the step."""

    mode: GradientMode
    attribution: AttributionMode
    run_seed: int | str
    aggregator: str = PCGRAD


@dataclass(frozen=True, slots=True)
class StepGradient:
    """The gradient of one step. `merged.vector` (d,) is valid until the next `combine`.

    `own` holds, by source, the summed gradients over its own parameters, unweighted.
    """

    merged: MergedGradient
    own: OwnGradients


@dataclass(frozen=True, slots=True)
class _Combined:
    """The measurements of a step that has not been applied yet."""

    rows: StepRows
    merged: MergedGradient
    measured: RowMeasurements
    layers: LayerMeasurements | None


class SeedAggregationTracker:
    """Merges the rows of every step, and accumulates their metrics.

    Args:
        layout: the layout of the d elements of the shared parameters, which have one dtype and device.
        settings: how to merge.
        isolation: whether germinated and training seeds have no row.
        layer_norms_top_k: layers to report for each source; 0, or microbatch mode, turns norms by layer off.
        dtype: the dtype of the rows.
        device: the device of the rows.
        over_shards: returns the sum of a float64 tensor over the ranks that hold the other elements of the rows; None:
            rows are whole.
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
        over_shards: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._settings = settings
        self._merger = StepMerger(settings, layout.numel, dtype=dtype, device=device, over_shards=over_shards)
        self._resolver = SeedWeightResolver(isolation=isolation)
        self._metrics = SeedMetricUpdater()
        self._layers = PerLayerMetricUpdater(layout, top_k=layer_norms_top_k, over_shards=over_shards)
        self._kind = (layout.numel, dtype, device)
        self._states: tuple[SeedState, ...] = ()
        self._params: Mapping[str, int] = {}
        self._sources: tuple[SourceWeight, ...] = ()
        self._names: tuple[str, ...] = ()
        self._accumulator = self._new_accumulator()
        self._samples: Counter[str] = Counter()
        self._combined: _Combined | None = None
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
        self._combined = None
        self._step = step
        return names

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the rows of the step that `begin` started: 1 in modes that add rows up without weights."""
        weighted = self._settings.mode is GradientMode.SEED
        return {source.name: source.weight if weighted else 1.0 for source in self._sources if source.has_row}

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

    def combine(
        self, summed: Callable[[StepRows, Counter[str]], tuple[StepRows, Counter[str]]] | None = None
    ) -> StepGradient:
        """Merges the microbatches since `begin`. Synchronises once if PCGrad projects more than one row.

        `summed` adds rows and numbers of samples up over several processes before that.

        Raises:
            NoGradientsError: nothing was added.
        """
        rows, samples = self._accumulator.take(), self._samples
        if summed is not None:
            rows, samples = summed(rows, samples)
        merged, measured = self._merger.merge(rows, self._step, self._sources, samples)
        layers = self._layers.measure(rows) if rows.names == self._names else None
        self._combined = _Combined(rows, merged, measured, layers)
        return StepGradient(merged, rows.own)

    def applied(self) -> None:
        """Adds the last step that `combine` merged to the epoch's metrics. Does not synchronise."""
        if (step := self._combined) is not None:
            self._metrics.update(self._sources, step.rows, step.merged, step.measured)
            if step.layers is not None:
                self._layers.add(step.layers)
            self._combined = None

    def finish_epoch(self) -> SeedMetricSet:
        """Returns the epoch's means by source and starts the next epoch. Synchronises."""
        return self._metrics.read(self._params, self._layers.read())

    def _new_accumulator(self) -> SeedGradientAccumulator:
        by_microbatch = self._settings.mode is GradientMode.MICROBATCH
        numel, dtype, device = self._kind
        return SeedGradientAccumulator(self._names, numel, dtype=dtype, device=device, by_microbatch=by_microbatch)


class StepMerger:
    """Merges the rows of one step after another, always into the same memory. `over_shards`: see the tracker."""

    def __init__(
        self,
        settings: MergeSettings,
        numel: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        over_shards: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._over_shards = over_shards
        self._settings = settings
        self._mixer = TeacherAttributionMixer(settings.attribution)
        self._aggregate = aggregator_of(settings.aggregator)
        self._result = torch.empty(numel, dtype=dtype, device=device)

    @torch.no_grad()
    def merge(
        self, rows: StepRows, step: int, sources: Sequence[SourceWeight], samples: Mapping[str, int]
    ) -> tuple[MergedGradient, RowMeasurements]:
        """Returns the merged gradient and the measured rows. The vector is valid until the next call.

        If a single source had a loss, the result is its row. Synchronises once if PCGrad projects.

        Args:
            rows: the accumulated rows.
            step: the global step, for the order of projections.
            sources: all sources of the step.
            samples: number of samples by source, for attribution.
        """
        present = [row for row, part in enumerate(rows.parts) if part]
        names = [rows.names[row] for row in present]
        given = rows.matrix if len(present) == len(rows.parts) else [rows.matrix[row] for row in present]
        if len(present) == 1 or self._settings.mode is GradientMode.SUM:
            return self._add(given, names)
        order = projection_order(len(present), step_generator(self._settings.run_seed, step))
        if self._settings.mode is GradientMode.MICROBATCH:
            equal = [1.0] * len(present)
            projection = self._aggregate(self._gram(given), equal, order)
            vector = combine_rows(given, projection.combined(equal), out=self._result)
            return projection.merged(vector), _no_measurements(vector.device)
        by_name = {source.name: source for source in sources}
        return self._project_sources(given, [by_name[name] for name in names], samples, order)

    def _project_sources(
        self, given: Rows, sources: Sequence[SourceWeight], samples: Mapping[str, int], order: Sequence[Sequence[int]]
    ) -> tuple[MergedGradient, RowMeasurements]:
        """Attributes the teacher's row and runs PCGrad, both on dot products alone."""
        names = [source.name for source in sources]
        shares = self._mixer.shares(sources, samples)
        weights = [source.weight for source in sources]
        mixing = self._mixer.mixing(names, shares, weights)
        gram = self._gram(given)
        mixed = mixing @ gram @ mixing.T
        projection = self._aggregate(mixed, weights, order)
        coefficients = torch.tensor(projection.combined(weights), dtype=torch.float64) @ mixing
        vector = combine_rows(given, coefficients.tolist(), out=self._result)
        teacher = self._mixer.teacher_shares(names, gram.diagonal().sqrt(), shares)
        norms = mixed.diagonal().clamp_min(0).sqrt()
        return projection.merged(vector), RowMeasurements(names, norms, teacher, projection.conflicts_by_row)

    def _gram(self, given: Rows) -> Tensor:
        gram = gram_matrix(given)
        return gram if self._over_shards is None else self._over_shards(gram)

    def _add(self, given: Rows, names: Sequence[str]) -> tuple[MergedGradient, RowMeasurements]:
        count = len(names)
        vector = given[0] if count == 1 else combine_rows(given, [1.0] * count, out=self._result)
        merged = MergedGradient(vector, 0, count, projected=False)
        if self._settings.mode is GradientMode.MICROBATCH:
            return merged, _no_measurements(vector.device)
        norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in given])
        if self._over_shards is not None:
            norms = self._over_shards(norms.square()).sqrt()
        teacher = self._mixer.teacher_shares(names, norms, [0.0] * count)
        return merged, RowMeasurements(names, norms, teacher, [0] * count)


def _no_measurements(device: torch.device) -> RowMeasurements:
    """Returns empty measurements, for rows that are not those of sources."""
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    return RowMeasurements((), nothing, nothing, ())
