"""`GradientMerger`: turns a step's losses into `.grad`, by plain backpropagation or by merging rows of sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_PROBATIONARY
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import GradientsSettings
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
from tolaria.values.gradients import SeedMetricSet

NamedParameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class GradientScope:
    """The parameters shared by all sources, the own parameters of each training seed, and those seeds' states."""

    shared: NamedParameters
    own: Mapping[str, Sequence[nn.Parameter]] = field(default_factory=dict)
    states: Sequence[SeedState] = ()


class GradientMerger:
    """Turns losses into gradients, step by step.

    Args:
        settings: mode, attribution, and the number of layers in metrics.
        isolation: whether seeds that are not blending have no row.
        run_seed: seeds the order of projections, together with the step.
        scope: of the first step; changed by `follow`.
    """

    def __init__(self, settings: GradientsSettings, *, isolation: bool, run_seed: int, scope: GradientScope) -> None:
        self._settings = settings
        self._isolation = isolation
        self._merge = MergeSettings(GradientMode(settings.mode), AttributionMode(settings.attribution), run_seed)
        self._tracker: SeedAggregationTracker | None = None
        self._scope = scope
        self._layout: FlatLayout | None = None
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
            self._tracker = self._layout = None  # another layout of rows
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
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Adds one microbatch's scalar losses by source; returns their sum times `share`, detached.

        Args:
            losses: by source.
            batch: the microbatch.
            share: of the microbatch in the step, by samples.
            scaler: gradients are those of the scaled losses; the returned sum is not scaled.

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
        elif any(source in self._names for source in scaled):
            self._add_rows(scaled, batch)
        else:
            self._add_alone(scaled)
        total = _total(losses).detach()
        return total if share == 1.0 else total * share

    def finish(self) -> None:
        """Writes the merged gradient into the parameters' `.grad`. Synchronises at most once."""
        if not self._merging or self._tracker is None or self._layout is None:
            return
        if self._rows_added:
            self._write_merged(self._tracker, self._layout)
        for parameter, gradient in self._alone.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def finish_epoch(self) -> SeedMetricSet | None:
        """Returns the epoch's metrics; None if no step has merged. Synchronises."""
        return None if self._tracker is None else self._tracker.finish_epoch()

    def _start(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Decides whether this step merges: all its microbatches have the same sources."""
        wanted = tuple(losses) if batch.seed_ids is None else (HOST, *self._seeds)
        self._merging = self._has_to_merge(wanted)
        if self._merging:
            self._prepare(wanted)
        else:
            self._sources = wanted

    def _has_to_merge(self, sources: Sequence[str]) -> bool:
        match self._merge.mode:
            case GradientMode.SUM:
                return False
            case GradientMode.MICROBATCH:
                return self._microbatches > 1
            case GradientMode.SEED:
                attributes = self._merge.attribution is not AttributionMode.OFF and bool(self._scope.states)
                return len(sources) > 1 or attributes

    @property
    def _seeds(self) -> list[str]:
        return [state.seed_id for state in self._scope.states]

    def _prepare(self, sources: Iterable[str]) -> None:
        """Prepares the tracker for a step in which at most these sources have a loss."""
        tracker, wanted = self._tracker or self._new_tracker(), tuple(sources)
        if tracker is not self._tracker or wanted != self._sources:
            self._tracker, self._sources = tracker, wanted
            own = {source: sum(p.numel() for p in parameters) for source, parameters in self._scope.own.items()}
            tracker.follow([*self._scope.states, *self._tasks()], own)
        self._names = tracker.begin(self._step)

    def _tasks(self) -> list[SeedState]:
        """Returns states for the sources that are not seeds, as in a job with several tasks: always fully weighted."""
        known = {HOST, *self._seeds}
        return [SeedState(seed_id=s, stage=SEED_STAGE_PROBATIONARY) for s in self._sources if s not in known]

    def _new_tracker(self) -> SeedAggregationTracker:
        dtypes = {parameter.dtype for _, parameter in self._scope.shared}
        if len(dtypes) > 1:
            raise LossShapeError(
                f"gradients of several sources are merged over shared parameters of one dtype, not on "
                f"{sorted(map(str, dtypes))}; "
                "gradients.mode = sum has no such need"
            )
        self._layout = FlatLayout.of(self._scope.shared)
        first = self._scope.shared[0][1]
        return SeedAggregationTracker(
            self._layout,
            self._merge,
            isolation=self._isolation,
            layer_norms_top_k=self._settings.layer_norms_top_k,
            dtype=first.dtype,
            device=first.device,
        )

    def _add_rows(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        if self._tracker is None:
            raise AssertionError("rows are added only after they were prepared for")
        given = {HOST: _total(losses)} if self._merge.mode is GradientMode.MICROBATCH else losses
        own = {source: self._own_of(source) for source in given}
        rows = source_rows(
            given,
            [parameter for _, parameter in self._scope.shared],
            names=self._names,
            own={source: parameters for source, parameters in own.items() if parameters},
            out=self._tracker.lend(),
        )
        self._tracker.add(rows, {} if batch.seed_ids is None else sample_counts(batch.seed_ids, self._names))
        self._rows_added = True

    def _add_alone(self, losses: Mapping[str, Tensor]) -> None:
        """Adds a microbatch of isolated seeds only: it trains their own parameters and not the host's."""
        for source, loss in losses.items():
            own = self._own_of(source)
            if not own:
                continue
            found = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    before = self._alone.get(parameter)
                    self._alone[parameter] = gradient if before is None else before + gradient

    def _write_merged(self, tracker: SeedAggregationTracker, layout: FlatLayout) -> None:
        gradient = tracker.combine()
        shared = (parameter for _, parameter in self._scope.shared)
        for parameter, part in zip(shared, flat_to_grads(gradient.merged.vector, layout.shapes), strict=True):
            parameter.grad = part
        for source, parts in gradient.own.items():
            for parameter, own in zip(self._own_of(source), parts, strict=True):
                parameter.grad = own

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
