"""`GradientMerger`: turns a step's losses into `.grad`, by plain backpropagation or by merging rows of sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_PROBATIONARY
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import Settings
from tolaria.errors import LossShapeError
from tolaria.gradients import (
    AttributionMode,
    FlatLayout,
    GradientMode,
    MergeSettings,
    SeedAggregationTracker,
    flat_to_grads,
    sample_counts,
    source_rows,
)
from tolaria.jobs import HOST, Batch
from tolaria.seeds.slots import NamedParameters
from tolaria.values.gradients import SeedMetricSet


@dataclass(frozen=True, slots=True)
class GradientScope:
    """The parameters shared by all sources, the own parameters of each training seed, and those seeds' states."""

    shared: NamedParameters
    own: Mapping[str, Sequence[nn.Parameter]]
    states: Sequence[SeedState]


class GradientMerger:
    """Turns losses into gradients, step by step.

    The order of projections depends on the run's seed and the step.
    """

    def __init__(self, settings: Settings, scope: GradientScope) -> None:
        mode, attribution = GradientMode(settings.gradients.mode), AttributionMode(settings.gradients.attribution)
        self._merge = MergeSettings(mode, attribution, settings.training.seed)
        self._settings = settings
        self._tracker: SeedAggregationTracker | None = None
        self._scope = scope
        self._merging: bool | None = None
        self._names: tuple[str, ...] = ()
        self._sources: tuple[str, ...] = ()
        self._step = 0
        self._microbatches = 1
        self._rows_added = False
        self._alone: dict[nn.Parameter, Tensor] = {}

    def follow(self, scope: GradientScope) -> None:
        """Changes the scope from the next step on."""
        if [id(p) for _, p in scope.shared] != [id(p) for _, p in self._scope.shared]:
            self._tracker = None  # its rows have another layout
        self._scope = scope
        self._sources = ()

    def begin(self, step: int, microbatches: int) -> None:
        """Starts the step after `step` completed ones, and drops what is left of an unfinished one."""
        self._step, self._microbatches, self._merging = step, microbatches, None
        self._rows_added, self._alone = False, {}

    def add(
        self,
        losses: Mapping[str, Tensor],
        batch: Batch,
        *,
        share: float,
        scaler: torch.amp.GradScaler | None,
        finite_only: bool = False,
    ) -> Tensor | None:
        """Adds one microbatch's scalar losses by source; returns their sum times `share`, detached.

        Gradients are those of the losses times `share`, the microbatch's part of the step, as scaled by `scaler`.
        With `finite_only`, rows that are not finite are not added, and the result is None; synchronises.

        Raises:
            LossShapeError: the sources differ from those of the step's first microbatch.
        """
        if self._merging is None:
            self._start(losses, batch)
        elif batch.seed_ids is None and tuple(losses) != self._sources:
            raise LossShapeError(
                f"losses() named the sources {list(losses)} in an update that began with {list(self._sources)}"
            )
        scaled = {source: _scaled(loss, share, scaler) for source, loss in losses.items()}
        if not self._merging:
            _total(scaled).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        elif self._tracker is not None and any(source in self._names for source in scaled):
            if not self._add_rows(self._tracker, scaled, batch, finite_only=finite_only):
                return None
        else:
            self._add_alone(scaled)
        total = _total(losses).detach()
        return total if share == 1.0 else total * share

    def finish(self) -> None:
        """Writes the merged gradient into the parameters' `.grad`. Synchronises at most once."""
        if self._rows_added and self._tracker is not None:
            combined = self._tracker.combine()
            shared = [parameter for _, parameter in self._scope.shared]
            merged = flat_to_grads(combined.merged.vector, [parameter.shape for parameter in shared])
            for parameter, part in zip(shared, merged, strict=True):
                parameter.grad = part
            for source, parts in combined.own.items():
                for parameter, own in zip(self._own_of(source), parts, strict=True):
                    parameter.grad = own
        for parameter, gradient in self._alone.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def finish_epoch(self) -> SeedMetricSet | None:
        """Returns the epoch's metrics; None if no step has merged. Synchronises."""
        return None if self._tracker is None else self._tracker.finish_epoch()

    def _start(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Decides whether this step merges: in all its microbatches at most the same sources have a loss."""
        seeds = [state.seed_id for state in self._scope.states]
        sources = tuple(losses) if batch.seed_ids is None else (HOST, *seeds)
        changed, self._sources = sources != self._sources, sources
        match self._merge.mode:
            case GradientMode.SUM:
                self._merging = False
            case GradientMode.MICROBATCH:
                self._merging = self._microbatches > 1
            case GradientMode.SEED:
                self._merging = len(sources) > 1 or (self._merge.attribution is not AttributionMode.OFF and bool(seeds))
        if not self._merging:
            return
        if changed or self._tracker is None:
            self._tracker = self._tracker or self._new_tracker()
            own = {source: sum(p.numel() for p in parameters) for source, parameters in self._scope.own.items()}
            # Sources that are not seeds, as in a job with several tasks, always have their full weight.
            known = {HOST, *seeds}
            tasks = [SeedState(seed_id=s, stage=SEED_STAGE_PROBATIONARY) for s in sources if s not in known]
            self._tracker.follow([*self._scope.states, *tasks], own)
        self._names = self._tracker.begin(self._step)

    def _new_tracker(self) -> SeedAggregationTracker:
        dtypes = {parameter.dtype for _, parameter in self._scope.shared}
        if len(dtypes) > 1:
            raise LossShapeError(
                "gradients of several sources are merged over shared parameters of one dtype, not of "
                f"{sorted(map(str, dtypes))}; gradients.mode = sum does not require this"
            )
        first = self._scope.shared[0][1]
        return SeedAggregationTracker(
            FlatLayout.of(self._scope.shared),
            self._merge,
            isolation=self._settings.seeds.isolation,
            layer_norms_top_k=self._settings.gradients.layer_norms_top_k,
            dtype=first.dtype,
            device=first.device,
        )

    def _add_rows(
        self, tracker: SeedAggregationTracker, losses: Mapping[str, Tensor], batch: Batch, *, finite_only: bool
    ) -> bool:
        """Returns whether the rows were added."""
        given = {HOST: _total(losses)} if self._merge.mode is GradientMode.MICROBATCH else losses
        rows = source_rows(
            given,
            [parameter for _, parameter in self._scope.shared],
            names=self._names,
            own={source: own for source in given if (own := self._own_of(source))},
            out=tracker.lend(),
        )
        if finite_only and not bool(torch.isfinite(rows.matrix).all()):
            return False
        tracker.add(rows, {} if batch.seed_ids is None else sample_counts(batch.seed_ids, self._names))
        self._rows_added = True
        return True

    def _add_alone(self, losses: Mapping[str, Tensor]) -> None:
        """Adds a microbatch of isolated seeds only: it trains their own parameters and not the host's."""
        for source, loss in losses.items():
            if own := self._own_of(source):
                found = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
                for parameter, gradient in zip(own, found, strict=True):
                    if gradient is not None:
                        before = self._alone.get(parameter)
                        self._alone[parameter] = gradient if before is None else before + gradient

    def _own_of(self, source: str) -> list[nn.Parameter]:
        """Returns the own parameters that a source's loss trains: the host's loss trains those of seeds without one."""
        if source != HOST:
            return list(self._scope.own.get(source, ()))
        lossless = (own for seed, own in self._scope.own.items() if seed not in self._sources)
        return [parameter for own in lossless for parameter in own]


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    values = list(losses.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _scaled(loss: Tensor, share: float, scaler: torch.amp.GradScaler | None) -> Tensor:
    scaled: Tensor = loss if scaler is None else scaler.scale(loss)
    return scaled if share == 1.0 else scaled * share
