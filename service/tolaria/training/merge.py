"""From a step's losses to `.grad`: by plain backpropagation where that is all there is to do, else by rows and merging.

Owns which of the two a step takes. Must not know how rows are merged, nor what an optimizer does with the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_PROBATIONARY
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import GradientsSettings
from tolaria.gradients import (
    AttributionMode,
    FlatLayout,
    GradientMode,
    MergeSettings,
    SeedAggregationTracker,
    SeedMetricSet,
    flat_to_grads,
    sample_counts,
    source_rows,
)
from tolaria.jobs import HOST, Batch

NamedParameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Ground:
    """What gradients are for: parameters that all sources share, those that seeds own, and the seeds as they stand."""

    shared: NamedParameters
    own: Mapping[str, Sequence[nn.Parameter]] = field(default_factory=dict)
    states: Sequence[SeedState] = ()


class GradientMerger:
    """Turns losses into gradients, one step after the other.

    Args:
        settings: mode, attribution and what is shown of layers.
        isolation: seeds that are not blending have no row.
        run_seed: the order of projections comes from it and the step.
        ground: of the first step; `follow` changes it.
    """

    def __init__(self, settings: GradientsSettings, *, isolation: bool, run_seed: int, ground: Ground) -> None:
        self._settings = settings
        self._isolation = isolation
        self._merge = MergeSettings(GradientMode(settings.mode), AttributionMode(settings.attribution), run_seed)
        self._tracker: SeedAggregationTracker | None = None
        self._ground = ground
        self._layout: FlatLayout | None = None
        self._merging: bool | None = None
        self._names: tuple[str, ...] = ()
        self._sources: tuple[str, ...] = ()
        self._step = 0
        self._microbatches = 1

    def follow(self, ground: Ground) -> None:
        """From the next step on gradients are for this."""
        if [id(p) for _, p in ground.shared] != [id(p) for _, p in self._ground.shared]:
            self._tracker = self._layout = None  # another layout of rows
        self._ground = ground
        self._sources = ()

    def begin(self, step: int, microbatches: int) -> None:
        """Start the update after `step` updates, of so many microbatches. What was not finished is dropped."""
        self._step, self._microbatches, self._merging = step, microbatches, None

    def add(self, losses: Mapping[str, Tensor], batch: Batch, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Take one microbatch's scalar losses by source; returns their sum, detached, as its share of the update.

        With a `scaler` the gradients are of the scaled losses; the sum is not.
        """
        if scaler is not None:
            loss = torch.stack([loss.detach() for loss in losses.values()]).sum() / self._microbatches
            self.add({source: scaler.scale(value) for source, value in losses.items()}, batch)
            return loss
        share = 1.0 / self._microbatches
        if self._merging is None:
            self._merging = self._has_to_merge(losses)
            if self._merging:
                self._prepare(losses if batch.seed_ids is None else (HOST, *self._seeds))
        return self._add_rows(losses, batch, share) if self._merging else _backward(losses, share)

    def finish(self) -> None:
        """Put the merged gradient into the parameters' `.grad`. Waits for the device at most once."""
        if not self._merging or self._tracker is None or self._layout is None:
            return
        gradient = self._tracker.combine()
        shared = (parameter for _, parameter in self._ground.shared)
        for parameter, part in zip(shared, flat_to_grads(gradient.merged.vector, self._layout.shapes), strict=True):
            parameter.grad = part
        for source, parts in gradient.own.items():
            for parameter, own in zip(self._own_of(source), parts, strict=True):
                parameter.grad = own

    def finish_epoch(self) -> SeedMetricSet | None:
        """The epoch's metrics; None when no step merged. Waits for the device."""
        return None if self._tracker is None else self._tracker.finish_epoch()

    def _has_to_merge(self, losses: Mapping[str, Tensor]) -> bool:
        match self._merge.mode:
            case GradientMode.SUM:
                return False
            case GradientMode.MICROBATCH:
                return self._microbatches > 1
            case GradientMode.SEED:
                shares_out = self._merge.attribution is not AttributionMode.OFF and bool(self._ground.states)
                return len(losses) > 1 or shares_out

    @property
    def _seeds(self) -> list[str]:
        return [state.seed_id for state in self._ground.states]

    def _prepare(self, sources: Iterable[str]) -> None:
        """Make the tracker ready for an update in which at most these sources have a loss."""
        tracker, wanted = self._tracker or self._new_tracker(), tuple(sources)
        if tracker is not self._tracker or wanted != self._sources:
            self._tracker, self._sources = tracker, wanted
            own = {source: sum(p.numel() for p in parameters) for source, parameters in self._ground.own.items()}
            tracker.follow([*self._ground.states, *self._foreign()], own)
        self._names = tracker.begin(self._step)

    def _foreign(self) -> list[SeedState]:
        """Sources that are no grafted seeds, as a job with several tasks has them: full members, always."""
        known = {HOST, *self._seeds}
        return [SeedState(seed_id=s, stage=SEED_STAGE_PROBATIONARY) for s in self._sources if s not in known]

    def _new_tracker(self) -> SeedAggregationTracker:
        self._layout = FlatLayout.of(self._ground.shared)
        first = self._ground.shared[0][1]
        return SeedAggregationTracker(
            self._layout,
            self._merge,
            isolation=self._isolation,
            layer_norms_top_k=self._settings.layer_norms_top_k,
            dtype=first.dtype,
            device=first.device,
        )

    def _add_rows(self, losses: Mapping[str, Tensor], batch: Batch, share: float) -> Tensor:
        if self._tracker is None:
            raise AssertionError("rows are added only after they were prepared for")
        scaled = {source: loss * share for source, loss in losses.items()}
        own = {source: self._own_of(source) for source in scaled}
        given = _summed(scaled) if self._merge.mode is GradientMode.MICROBATCH else scaled
        rows = source_rows(
            given,
            [parameter for _, parameter in self._ground.shared],
            names=self._names,
            own={source: own[source] for source in given if own[source]},
            out=self._tracker.lend(),
        )
        self._tracker.add(rows, {} if batch.seed_ids is None else sample_counts(batch.seed_ids, self._names))
        return torch.stack([loss.detach() for loss in scaled.values()]).sum()

    def _own_of(self, source: str) -> list[nn.Parameter]:
        """A seed's own parameters take its own loss's gradient; those of seeds without one take the host's."""
        if source != HOST:
            return list(self._ground.own.get(source, ()))
        without_loss = (
            p for seed, parameters in self._ground.own.items() if seed not in self._sources for p in parameters
        )
        return list(without_loss)


def _backward(losses: Mapping[str, Tensor], share: float) -> Tensor:
    loss = next(iter(losses.values())) if len(losses) == 1 else torch.stack(list(losses.values())).sum()
    if share != 1.0:
        loss = loss * share
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    return loss.detach()


def _summed(losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return losses if len(losses) == 1 else {HOST: torch.stack(list(losses.values())).sum()}
