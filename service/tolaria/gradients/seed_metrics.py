"""Gradient metrics by source: accumulated step by step without synchronising, read once an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The numbers of one source so far in the epoch."""

    stage: SeedLifecycleStage.ValueType = enums_pb2.SEED_STAGE_UNKNOWN
    alpha: float = 0.0
    weight_sum: float = 0.0
    steps: int = 0
    rows: int = 0
    parts: int = 0
    conflicts: int = 0
    ratio_sum: float = 0.0


@dataclass(slots=True)
class _Totals:
    """The numbers of the epoch so far."""

    steps: int = 0
    microbatches: int = 0
    conflicts: int = 0
    rate_sum: float = 0.0
    pair_rate_sum: float = 0.0
    weight_sum: float = 0.0
    weights: int = 0
    projected: int = 0
    sources: dict[str, _SourceTotals] = field(default_factory=dict)

    def source(self, name: str) -> _SourceTotals:
        return self.sources.setdefault(name, _SourceTotals())

    def add_step(self, sources: Sequence[SourceWeight], rows: StepRows, merged: MergedGradient) -> None:
        self.steps += 1
        self.microbatches += rows.microbatches
        self.conflicts += merged.conflicts
        self.rate_sum += merged.grad_conflict_rate
        self.pair_rate_sum += merged.pair_conflict_rate
        self.projected += merged.projected
        weights = [source.weight for source in sources if source.has_row]
        self.weight_sum += sum(weights)
        self.weights += len(weights)

    def add_source(self, source: SourceWeight, parts: int) -> None:
        totals = self.source(source.name)
        totals.stage, totals.alpha = source.stage, source.alpha
        totals.weight_sum += source.weight
        totals.steps += 1
        totals.parts += parts


class SeedMetricUpdater:
    """Accumulates norms, shares, conflicts and weights of every step, and returns the epoch's means."""

    def __init__(self) -> None:
        self._totals = _Totals()
        self._sums = _DeviceSums()
        self._last_shares: dict[str, float] = {}

    def update(
        self, sources: Sequence[SourceWeight], rows: StepRows, merged: MergedGradient, measured: RowMeasurements
    ) -> None:
        """Adds one step. Does not synchronise.

        Args:
            sources: all sources of the step, with a row or not.
            rows: the accumulated rows.
            merged: the merged gradient, for its conflicts.
            measured: the measured rows, which are none in microbatch mode.
        """
        self._totals.add_step(sources, rows, merged)
        parts = dict(zip(rows.names, rows.parts, strict=True))
        for source in sources:
            self._totals.add_source(source, parts.get(source.name, 0))
        others = max(1, len(measured.names) - 1)
        for name, conflicts in zip(measured.names, measured.conflicts, strict=True):
            totals = self._totals.source(name)
            totals.rows += 1
            totals.conflicts += conflicts
            totals.ratio_sum += conflicts / others
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
                weight=source.weight_sum / max(1, source.steps),
                norm=norm,
                share=share,
                share_delta=share - self._last_shares.get(name, share),
                alpha=source.alpha,
                conflicts=source.conflicts / rows,
                conflict_ratio=source.ratio_sum / rows,
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
            conflict_ratio=totals.rate_sum / steps,
            pair_conflict_ratio=totals.pair_rate_sum / steps,
            weights_mean=totals.weight_sum / max(1, totals.weights),
            pcgrad_applied=totals.projected / steps,
            teacher_share=next((source.teacher_share for source in sources if source.seed_id == HOST), 0.0),
            sources=tuple(sources),
        )


class PerLayerMetricUpdater:
    """Accumulates the norm of every row within every layer; costs one more pass over the rows.

    Args:
        layout: of the rows.
        top_k: number of layers to report for each source; 0 turns the updater off.
    """

    def __init__(self, layout: FlatLayout, *, top_k: int) -> None:
        self._top_k = top_k
        self._sizes = list(layout.sizes)
        self._layers = tuple(dict.fromkeys(layout.layers))
        indices = {layer: index for index, layer in enumerate(self._layers)}
        self._indices = torch.tensor([indices[layer] for layer in layout.layers], dtype=torch.int64)
        self._sums = _DeviceSums()

    def update(self, rows: StepRows) -> None:
        """Adds the rows of one step. Does not synchronise."""
        if self._top_k == 0:
            return
        if self._indices.device != rows.matrix.device:
            self._indices = self._indices.to(rows.matrix.device)
        present = [row for row, here in enumerate(rows.mask) if here]
        names = [rows.names[row] for row in present]
        matrix = rows.matrix if all(rows.mask) else rows.matrix[present]
        pieces = torch.split(matrix, self._sizes, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64) for piece in pieces], dim=1)
        squares = norms.new_zeros(len(names), len(self._layers)).index_add_(1, self._indices, norms.square())
        counts = norms.new_ones(len(names), 1)
        self._sums.add(names, torch.cat([squares.sqrt_(), counts], dim=1))

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
