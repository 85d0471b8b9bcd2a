"""What an epoch tells about each source: gathered step by step without waiting for the device, read out once.

Owns the running sums; knows nothing of metric names, events or telemetry packets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from leyline.v1 import enums_pb2
from tolaria.values.gradients import SeedMetrics, SeedMetricSet
from tolaria.values.training import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from leyline.v1.enums_pb2 import SeedLifecycleStage
    from tolaria.gradients.accumulate import StepRows
    from tolaria.gradients.flat import FlatLayout
    from tolaria.gradients.weights import SourceWeight


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one step tells. Tensors may be on any device; nothing here waits for it.

    Attributes:
        sources: all sources of the step, with a row or not.
        names: the n sources whose rows were measured.
        norms: shape (n,).
        teacher: shape (n,); see `TeacherAttributionMixer.teacher_shares`.
        conflicts: for each of the n, the number of others that it conflicts with.
        parts: by source, the microbatches that it took part in.
        microbatches, pair_conflicts, conflict_rate, pair_rate, projected: of the whole step.
    """

    sources: Sequence[SourceWeight]
    names: Sequence[str]
    norms: Tensor
    teacher: Tensor
    conflicts: Sequence[int]
    parts: Mapping[str, int]
    microbatches: int
    pair_conflicts: int
    conflict_rate: float
    pair_rate: float
    projected: bool


@dataclass(slots=True)
class _Account:
    """One source's plain numbers so far."""

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
    """The epoch's plain numbers so far."""

    steps: int = 0
    microbatches: int = 0
    conflicts: int = 0
    rate_sum: float = 0.0
    pair_rate_sum: float = 0.0
    weight_sum: float = 0.0
    weights: int = 0
    projected: int = 0
    accounts: dict[str, _Account] = field(default_factory=dict)


class SeedMetricUpdater:
    """Books norms, shares, conflicts and weights of every step, and gives the epoch's means."""

    def __init__(self) -> None:
        self._totals = _Totals()
        self._sums = _DeviceSums()
        self._last_shares: dict[str, float] = {}

    def update(self, facts: StepFacts) -> None:
        """Book one step. Does not synchronise with the device."""
        self._book_step(facts)
        for source in facts.sources:
            self._book_source(source, facts.parts.get(source.name, 0))
        others = max(1, len(facts.names) - 1)
        for name, conflicts in zip(facts.names, facts.conflicts, strict=True):
            account = self._account(name)
            account.rows += 1
            account.conflicts += conflicts
            account.ratio_sum += conflicts / others
        norms = facts.norms.double()
        shares = norms / norms.sum().clamp_min(torch.finfo(torch.float64).tiny)
        self._sums.add(facts.names, torch.stack([norms, shares, facts.teacher.double()], dim=1))

    def read(self, params: Mapping[str, int], layers: Mapping[str, tuple[tuple[str, float], ...]]) -> SeedMetricSet:
        """The epoch's means; starts the next epoch. Waits for the device once.

        Args:
            params: by seed, the number of elements it owns.
            layers: by source, what `PerLayerMetricUpdater.read` gave.
        """
        totals, sums = self._totals, self._sums.take()
        self._totals = _Totals()
        sources = tuple(
            self._read_source(name, account, sums.get(name, (0.0, 0.0, 0.0)), totals)
            for name, account in totals.accounts.items()
        )
        sources = tuple(_with_shape(source, params, layers) for source in sources)
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
            sources=sources,
        )

    def _book_step(self, facts: StepFacts) -> None:
        totals = self._totals
        totals.steps += 1
        totals.microbatches += facts.microbatches
        totals.conflicts += facts.pair_conflicts
        totals.rate_sum += facts.conflict_rate
        totals.pair_rate_sum += facts.pair_rate
        totals.projected += facts.projected
        weights = [source.weight for source in facts.sources if source.has_row]
        totals.weight_sum += sum(weights)
        totals.weights += len(weights)

    def _book_source(self, source: SourceWeight, parts: int) -> None:
        account = self._account(source.name)
        account.stage, account.alpha = source.stage, source.alpha
        account.weight_sum += source.weight
        account.steps += 1
        account.parts += parts

    def _account(self, name: str) -> _Account:
        return self._totals.accounts.setdefault(name, _Account())

    def _read_source(self, name: str, account: _Account, sums: Sequence[float], totals: _Totals) -> SeedMetrics:
        rows = max(1, account.rows)
        norm, share, teacher = (value / rows for value in sums)
        return SeedMetrics(
            seed_id=name,
            stage=account.stage,
            weight=account.weight_sum / max(1, account.steps),
            norm=norm,
            share=share,
            share_delta=share - self._last_shares.get(name, share),
            alpha=account.alpha,
            conflicts=account.conflicts / rows,
            conflict_ratio=account.ratio_sum / rows,
            params=0,
            mask_fraction=account.parts / max(1, totals.microbatches),
            teacher_share=teacher,
            layer_norms=(),
        )


class PerLayerMetricUpdater:
    """Books the norm of every row within every layer, when told to; costs one more pass over the rows."""

    def __init__(self, layout: FlatLayout, *, top_k: int) -> None:
        self._top_k = top_k
        self._sizes = list(layout.sizes)
        self._layers = tuple(dict.fromkeys(layout.layers))
        places = {layer: place for place, layer in enumerate(self._layers)}
        self._places = torch.tensor([places[layer] for layer in layout.layers], dtype=torch.int64)
        self._sums = _DeviceSums()

    def update(self, rows: StepRows) -> None:
        """Book one step's rows. Does nothing when the number of layers to show is 0. Does not synchronise."""
        if self._top_k == 0:
            return
        if self._places.device != rows.matrix.device:
            self._places = self._places.to(rows.matrix.device)
        names = [name for name, here in zip(rows.names, rows.mask, strict=True) if here]
        matrix = rows.matrix if all(rows.mask) else rows.matrix[[place for place, here in enumerate(rows.mask) if here]]
        pieces = torch.split(matrix, self._sizes, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64) for piece in pieces], dim=1)
        squares = norms.new_zeros(len(names), len(self._layers)).index_add_(1, self._places, norms.square())
        counts = norms.new_ones(len(names), 1)
        self._sums.add(names, torch.cat([squares.sqrt_(), counts], dim=1))

    def read(self) -> dict[str, tuple[tuple[str, float], ...]]:
        """By source, the layers with the largest mean norms; starts the next epoch. Waits for the device once."""
        return {name: self._largest(sums) for name, sums in self._sums.take().items()}

    def _largest(self, sums: Sequence[float]) -> tuple[tuple[str, float], ...]:
        *totals, count = sums
        means = [(layer, total / count) for layer, total in zip(self._layers, totals, strict=True)]
        return tuple(sorted(means, key=lambda pair: -pair[1])[: self._top_k])


class _DeviceSums:
    """Sums of vectors by name, on whatever device they come from."""

    def __init__(self) -> None:
        self._sums: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add row i of `values` (n, k) to the sum of names[i]."""
        key = (tuple(names), values.device)
        if key in self._sums:
            self._sums[key] += values
        else:
            self._sums[key] = values

    def take(self) -> dict[str, tuple[float, ...]]:
        totals: dict[str, tuple[float, ...]] = {}
        for (names, _), sums in self._sums.items():
            for name, row in zip(names, sums.tolist(), strict=True):
                before = totals.get(name, (0.0,) * len(row))
                totals[name] = tuple(a + b for a, b in zip(before, row, strict=True))
        self._sums = {}
        return totals


def _with_shape(
    source: SeedMetrics, params: Mapping[str, int], layers: Mapping[str, tuple[tuple[str, float], ...]]
) -> SeedMetrics:
    return replace(source, params=params.get(source.seed_id, 0), layer_norms=layers.get(source.seed_id, ()))
