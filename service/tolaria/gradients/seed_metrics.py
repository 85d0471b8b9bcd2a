"""Gradient metrics by source: accumulated step by step without synchronising, read once an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from leyline.v1 import enums_pb2
from leyline.v1.enums_pb2 import SeedLifecycleStage
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.flat import FlatLayout
from tolaria.gradients.pcgrad import MergedGradient
from tolaria.gradients.weights import SourceWeight
from tolaria.values.gradients import SeedMetrics, SeedMetricSet
from tolaria.values.training import HOST

LayerNorms: TypeAlias = tuple[tuple[str, float], ...]
"""Layers and the norms of a row within them, largest first."""

LayerMeasurements: TypeAlias = tuple[tuple[str, ...], Tensor]
"""The n sources with a row in a step, and of each the norms within the layers, then 1: shape (n, layers + 1)."""


@dataclass(frozen=True, slots=True)
class RowMeasurements:
    """The measurements of the rows of one step, on any device.

    Attributes:
        names: the n sources whose rows were measured.
        norms: shape (n,), after attribution.
        teacher: shape (n,); see `TeacherAttributionMixer.teacher_shares`.
        conflicts: for each row, the number of others that it conflicts with.
    """

    names: Sequence[str]
    norms: Tensor
    teacher: Tensor
    conflicts: Sequence[int]


@dataclass(slots=True)
class _SourceTotals:
    """The sums of one source over the epoch; `stage` and `alpha` are those of the last step."""

    stage: SeedLifecycleStage.ValueType = enums_pb2.SEED_STAGE_UNKNOWN
    alpha: float = 0.0
    weight: float = 0.0
    steps: int = 0
    rows: int = 0
    parts: int = 0
    conflicts: int = 0
    conflict_ratio: float = 0.0


@dataclass(slots=True)
class _Totals:
    """The sums of all sources over the epoch."""

    steps: int = 0
    microbatches: int = 0
    conflicts: int = 0
    conflict_rate: float = 0.0
    pair_rate: float = 0.0
    weight: float = 0.0
    weights: int = 0
    projected: int = 0
    sources: dict[str, _SourceTotals] = field(default_factory=lambda: defaultdict(_SourceTotals))


class SeedMetricUpdater:
    """Accumulates norms, shares, conflicts and weights of every step, and returns the epoch's means."""

    def __init__(self) -> None:
        self._totals = _Totals()
        self._sums = _DeviceSums()
        self._last_shares: dict[str, float] = {}

    def update(
        self, sources: Sequence[SourceWeight], rows: StepRows, merged: MergedGradient, measured: RowMeasurements
    ) -> None:
        """Adds one step of all `sources`, with a row or not. Does not synchronise."""
        totals = self._totals
        totals.steps += 1
        totals.microbatches += rows.microbatches
        totals.conflicts += merged.conflicts
        totals.conflict_rate += merged.grad_conflict_rate
        totals.pair_rate += merged.pair_conflict_rate
        totals.projected += merged.projected
        weights = [source.weight for source in sources if source.has_row]
        totals.weight += sum(weights)
        totals.weights += len(weights)
        parts = dict(zip(rows.names, rows.parts, strict=True))
        for source in sources:
            mine = totals.sources[source.name]
            mine.stage, mine.alpha = source.stage, source.alpha
            mine.weight += source.weight
            mine.steps += 1
            mine.parts += parts.get(source.name, 0)
        for name, conflicts in zip(measured.names, measured.conflicts, strict=True):
            mine = totals.sources[name]
            mine.rows += 1
            mine.conflicts += conflicts
            mine.conflict_ratio += conflicts / max(1, len(measured.names) - 1)
        norms = measured.norms.double()
        shares = norms / norms.sum().clamp_min(torch.finfo(torch.float64).tiny)
        self._sums.add(measured.names, torch.stack([norms, shares, measured.teacher.double()], dim=1))

    def read(self, params: Mapping[str, int], layers: Mapping[str, LayerNorms]) -> SeedMetricSet:
        """Returns the epoch's means and starts the next epoch. Synchronises once.

        Args:
            params: by seed, the number of elements of its parameters.
            layers: by source, the result of `PerLayerMetricUpdater.read`.
        """
        totals, sums = self._totals, self._sums.take()
        self._totals = _Totals()
        sources: list[SeedMetrics] = []
        for name, source in totals.sources.items():
            rows = max(1, source.rows)
            norm, share, teacher = (value / rows for value in sums.get(name, (0.0, 0.0, 0.0)))
            metrics = SeedMetrics(
                seed_id=name,
                stage=source.stage,
                weight=source.weight / max(1, source.steps),
                norm=norm,
                share=share,
                share_delta=share - self._last_shares.get(name, share),
                alpha=source.alpha,
                conflicts=source.conflicts / rows,
                conflict_ratio=source.conflict_ratio / rows,
                params=params.get(name, 0),
                mask_fraction=source.parts / max(1, totals.microbatches),
                teacher_share=teacher,
                layer_norms=layers.get(name, ()),
            )
            sources.append(metrics)
        self._last_shares = {source.seed_id: source.share for source in sources}
        steps = max(1, totals.steps)
        return SeedMetricSet(
            steps=totals.steps,
            microbatches=totals.microbatches,
            conflicts=totals.conflicts,
            conflict_ratio=totals.conflict_rate / steps,
            pair_conflict_ratio=totals.pair_rate / steps,
            weights_mean=totals.weight / max(1, totals.weights),
            pcgrad_applied=totals.projected / steps,
            teacher_share=next((source.teacher_share for source in sources if source.seed_id == HOST), 0.0),
            sources=tuple(sources),
        )


class PerLayerMetricUpdater:
    """Accumulates the norm of every row within every layer; costs one more pass over the rows.

    Args:
        layout: the layout of the rows.
        top_k: number of layers to report for each source; 0 turns the updater off.
        over_shards: see `SeedAggregationTracker`.
    """

    def __init__(
        self, layout: FlatLayout, *, top_k: int, over_shards: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._top_k, self._over_shards = top_k, over_shards
        self._sizes = list(layout.sizes)
        self._layers = tuple(dict.fromkeys(layout.layers))
        self._indices = torch.tensor([self._layers.index(layer) for layer in layout.layers], dtype=torch.int64)
        self._sums = _DeviceSums()

    def measure(self, rows: StepRows) -> LayerMeasurements | None:
        """Measures the rows of one step; None if the updater is off. Does not synchronise."""
        if self._top_k == 0:
            return None
        self._indices = self._indices.to(rows.matrix.device)
        present = [row for row, part in enumerate(rows.parts) if part]
        matrix = rows.matrix if len(present) == len(rows.parts) else rows.matrix[present]
        pieces = torch.split(matrix, self._sizes, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64) for piece in pieces], dim=1)
        squares = norms.new_zeros(len(present), len(self._layers)).index_add_(1, self._indices, norms.square())
        counts = norms.new_ones(len(present), 1)
        if self._over_shards is not None:
            squares = self._over_shards(squares)
        return tuple(rows.names[row] for row in present), torch.cat([squares.sqrt_(), counts], dim=1)

    def add(self, measured: LayerMeasurements) -> None:
        """Adds the measurements of one step. Does not synchronise."""
        self._sums.add(*measured)

    def read(self) -> dict[str, LayerNorms]:
        """Returns the layers with the largest mean norms by source and starts the next epoch. Synchronises once."""
        return {name: self._largest(sums) for name, sums in self._sums.take().items()}

    def _largest(self, sums: Sequence[float]) -> LayerNorms:
        *totals, count = sums
        means = [(layer, total / count) for layer, total in zip(self._layers, totals, strict=True)]
        return tuple(sorted(means, key=lambda pair: -pair[1])[: self._top_k])


class _DeviceSums:
    """Sums of vectors by name, on the device that they come from."""

    def __init__(self) -> None:
        self._sums: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Adds row i of `values` (n, k) to the sum of names[i]."""
        key = (tuple(names), values.device)
        if key in self._sums:
            self._sums[key] += values
        else:
            self._sums[key] = values

    def take(self) -> dict[str, tuple[float, ...]]:
        """Returns the sums and starts from zero."""
        totals: dict[str, tuple[float, ...]] = {}
        for (names, _), sums in self._sums.items():
            for name, row in zip(names, sums.tolist(), strict=True):
                before = totals.get(name, (0.0,) * len(row))
                totals[name] = tuple(a + b for a, b in zip(before, row, strict=True))
        self._sums = {}
        return totals
