"""`GradientMerger`: turns a step's losses into `.grad`, by plain backpropagation or by merging rows of sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED, SEED_STAGE_PROBATIONARY
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import Settings
from tolaria.errors import LossShapeError
from tolaria.gradients import (
    ISOLATED,
    AttributionMode,
    FlatLayout,
    GradientMode,
    MergeSettings,
    SeedAggregationTracker,
    flat_to_grads,
    row_dtype,
    sample_counts,
    source_rows,
)
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.rows import OwnGradients, SourceRows
from tolaria.gradients.sharded import sharded_rows, write_gradients
from tolaria.jobs import HOST, Batch
from tolaria.ranks.group import Group
from tolaria.seeds.slots import NamedParameters
from tolaria.shards import local, local_parts
from tolaria.values.gradients import SeedMetricSet


@dataclass(frozen=True, slots=True)
class GradientScope:
    """What gradients are merged over.

    Attributes:
        shared: the parameters of the host that are in the optimizer, frozen ones included.
        own: the parameters of each training seed.
        states: the states of the germinated and the training seeds.
    """

    shared: NamedParameters
    own: Mapping[str, Sequence[nn.Parameter]]
    states: Sequence[SeedState]


class GradientMerger:
    """Turns losses into gradients, step by step.

    The gradient is scale-neutral. A single source gives the gradient of plain backpropagation. The samples of a batch
    with `seed_ids` add up to the gradient of their mean loss at every stage of their seeds: what the weight of a
    seed's row leaves of its samples is the host's. So unless gradients conflict, nothing changes for the parameters of
    the host when a seed is grafted, changes stage, becomes part of the host or is culled. Losses by source add up,
    each times the weight of its stage; the host's has weight 1.

    The order of projections depends on the run's seed and the step. `sharded`: whether each rank has a part of every
    parameter and gradient.
    """

    def __init__(self, settings: Settings, scope: GradientScope, *, sharded: bool) -> None:
        mode, attribution = GradientMode(settings.gradients.mode), AttributionMode(settings.gradients.attribution)
        self._merge = MergeSettings(mode, attribution, settings.training.seed, settings.gradients.aggregator)
        self._settings = settings
        self.group: Group | None = None
        """The ranks whose gradients are added up before they are merged."""
        self._tracker: SeedAggregationTracker | None = None
        self._scope = scope
        self._shared: NamedParameters = []
        self._next_scope: GradientScope | None = None
        self._merging: bool | None = None
        self._names: tuple[str, ...] = ()
        self._sources: tuple[str, ...] = ()
        self._step = 0
        self._microbatches = 1
        self._sharded = sharded
        self._seen = set[str]()

    def follow(self, scope: GradientScope) -> None:
        """Changes the scope; once a step has begun, from the next step on."""
        if self._merging is not None:
            self._next_scope = scope
            return
        self._next_scope = None
        self._scope = scope
        self._sources = ()

    def begin(self, step: int, microbatches: int) -> None:
        """Starts the step after `step` completed ones, and drops what is left of an unfinished one."""
        self._step, self._microbatches, self._merging = step, microbatches, None
        self._seen.clear()
        if self._next_scope is not None:
            self.follow(self._next_scope)

    def prepare(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Decides, with the step's first microbatch, whether the step `merges`.

        Raises:
            LossShapeError: the sources differ from those of the step's first microbatch.
            UnmergeableParameterError: the parameters of the host cannot be merged over.
        """
        if self._merging is None:
            self._start(losses, batch)
        elif batch.seed_ids is None and tuple(losses) != self._sources:
            raise LossShapeError(
                f"losses() named the sources {list(losses)} in an update that began with {list(self._sources)}"
            )

    def add(
        self,
        losses: Mapping[str, Tensor],
        batch: Batch,
        *,
        share: float,
        scaler: torch.amp.GradScaler | None,
        finite_only: bool = False,
    ) -> bool:
        """Adds one microbatch's scalar losses by source, after `prepare`; returns whether it has.

        Gradients are those of the losses times `share`, the microbatch's part of the step, as scaled by `scaler`.
        With `finite_only`, rows that are not finite are not added; synchronises.

        Raises UnmergeableParameterError if the parameters of the host cannot be merged over.
        """
        scaled = {source: _scaled(loss, share, scaler) for source, loss in losses.items()}
        if not self._merging:
            total_loss(scaled).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        elif self._tracker is None:
            self._backward_alone(scaled)
        elif not self._add_rows(self._tracker, scaled, batch, counts=share > 0, finite_only=finite_only):
            return False
        return True

    @property
    def merges(self) -> bool:
        """Whether the step that has begun merges rows; else its gradients are those of plain backpropagation."""
        return bool(self._merging) and self._tracker is not None

    def finish(self) -> None:
        """Writes the merged gradient into the parameters' `.grad`. Synchronises at most once."""
        if not self._merging or self._tracker is None:
            return
        combined = self._tracker.combine(None if self.group is None else partial(self._over_ranks, self.group))
        shared = [parameter for _, parameter in self._shared]
        write_gradients(shared, _split(combined.merged.vector, local_parts(shared)))
        for source, parts in combined.own.items():
            write_gradients(self._own_of(source), parts)

    def applied(self) -> None:
        """Counts the step in the epoch's metrics; a step that is skipped or starts again is not counted."""
        if self._merging and self._tracker is not None:
            self._tracker.applied()

    def finish_epoch(self) -> SeedMetricSet | None:
        """Returns the epoch's metrics; None if no step has merged. Synchronises."""
        return None if self._tracker is None else self._tracker.finish_epoch()

    def _start(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Decides whether this step merges: in all its microbatches at most the same sources have a loss."""
        seeds = [state.seed_id for state in self._scope.states if state.stage != SEED_STAGE_GERMINATED]
        sources = tuple(losses) if batch.seed_ids is None else (HOST, *seeds)
        changed, self._sources = sources != self._sources, sources
        match self._merge.mode:
            case GradientMode.SUM:
                self._merging = self._isolates(losses, batch)
            case GradientMode.MICROBATCH:
                self._merging = self._microbatches > 1 or self._isolates(losses, batch)
            case GradientMode.SEED:
                self._merging = len(sources) > 1 or (self._merge.attribution is not AttributionMode.OFF and bool(seeds))
        if not self._merging:
            return
        self._follow_shared()
        if self._tracker is None:
            return
        if changed or not self._names:
            own = {source: sum(p.numel() for p in parameters) for source, parameters in self._scope.own.items()}
            # Tasks of the job always have their full weight; so has a loss for a seed that is part of the host now.
            known = {HOST, *(state.seed_id for state in self._scope.states)}
            tasks = [SeedState(seed_id=s, stage=SEED_STAGE_PROBATIONARY) for s in sources if s not in known]
            self._tracker.follow([*self._scope.states, *tasks], own)
        self._names = self._tracker.begin(self._step)

    def _isolates(self, losses: Mapping[str, Tensor], batch: Batch) -> bool:
        """Returns whether an isolated seed has a loss by itself, which a plain sum would pass on to the host."""
        if batch.seed_ids is not None or not self._settings.seeds.isolation:
            return False
        return any(state.seed_id in losses and state.stage in ISOLATED for state in self._scope.states)

    def _follow_shared(self) -> None:
        """Looks up the trained parameters of the host. The job may freeze and unfreeze them between steps."""
        shared = [(name, parameter) for name, parameter in self._scope.shared if parameter.requires_grad]
        if [id(parameter) for _, parameter in shared] == [id(parameter) for _, parameter in self._shared]:
            return
        # Its rows have another layout.
        self._shared, self._names = shared, ()
        self._tracker = self._new_tracker() if shared else None

    def _new_tracker(self) -> SeedAggregationTracker:
        return SeedAggregationTracker(
            FlatLayout.of([(name, local(parameter)) for name, parameter in self._shared]),
            self._merge,
            isolation=self._settings.seeds.isolation,
            layer_norms_top_k=self._settings.gradients.layer_norms_top_k,
            dtype=row_dtype(self._shared),
            device=self._shared[0][1].device,
            over_shards=self._over_shards if self._sharded else None,
        )

    def _add_rows(
        self,
        tracker: SeedAggregationTracker,
        losses: Mapping[str, Tensor],
        batch: Batch,
        *,
        counts: bool,
        finite_only: bool,
    ) -> bool:
        """Returns whether the rows were added; `counts`: whether the samples are this rank's."""
        given = losses if batch.seed_ids is None else _with_rest(losses, tracker.weights)
        rows = self._rows(given, tracker.lend())
        self._seen.update(losses)
        if finite_only:
            finite = bool(torch.isfinite(rows.matrix).all())
            if not (finite if self.group is None else self.group.all(finite)):
                return False
        tracker.add(rows, sample_counts(batch.seed_ids, self._names) if batch.seed_ids is not None and counts else {})
        return True

    def _rows(self, losses: Mapping[str, Tensor], out: Tensor) -> SourceRows:
        shared = [parameter for _, parameter in self._shared]
        if not self._sharded:
            own = {source: own for source in losses if (own := self._own_of(source))}
            return source_rows(losses, shared, names=self._names, own=own, out=out)
        owned = {source: each for source in self._sources if (each := self._own_of(source))}
        return sharded_rows(losses, shared, sources=self._sources, names=self._names, own=owned, out=out)

    def _over_shards(self, sums: Tensor) -> Tensor:
        if self.group is not None:
            self.group.all_reduce_tensor(sums)
        return sums

    def _over_ranks(self, group: Group, rows: StepRows, samples: Counter[str]) -> tuple[StepRows, Counter[str]]:
        """Returns the sums over all ranks; the rows' matrix is changed in place."""
        if not self._sharded:  # else each rank has its part of the sums
            group.all_reduce_tensor(rows.matrix)
        parts = tuple(int(count) for count in group.all_reduce_max(rows.parts))
        counts = group.all_reduce([samples[name] for name in self._names])
        own = self._own_of_shards(rows.own) if self._sharded else self._own_of_ranks(group, rows)
        read = zip(self._names, counts, strict=True)
        return replace(rows, parts=parts, own=own), Counter({name: int(count) for name, count in read})

    def _own_of_ranks(self, group: Group, rows: StepRows) -> OwnGradients:
        own = dict(rows.own)
        for source in self._sources:
            if parameters := self._own_of(source):
                gradients = own.get(source, (None,) * len(parameters))
                own[source] = tuple(group.all_reduce_gradients(parameters, gradients))
        return own

    def _own_of_shards(self, own: OwnGradients) -> OwnGradients:
        """Returns no gradients for sources of which no rank had a loss: their backward passes made zeros."""
        present = [float(source in self._seen) for source in self._sources]
        if self.group is not None:
            present = self.group.all_reduce_max(present)
        seen = dict(zip(self._sources, present, strict=True))
        return {name: parts if seen[name] else (None,) * len(parts) for name, parts in own.items()}

    def _backward_alone(self, losses: Mapping[str, Tensor]) -> None:
        """Computes the gradients of the sources' own parameters; all parameters of the host are frozen."""
        if self._sharded:
            self._backward_sharded(losses)
            return
        for source, loss in losses.items():
            if own := self._own_of(source):
                torch.autograd.backward(loss, inputs=own, retain_graph=True)

    def _backward_sharded(self, losses: Mapping[str, Tensor]) -> None:
        owned = [parameter for source in self._sources for parameter in self._own_of(source)]
        before = {parameter: parameter.grad for parameter in owned}
        nothing = losses[next(iter(losses))].new_empty(0, 0)
        self._seen.update(losses)
        found = self._own_of_shards(self._rows(losses, nothing).own)
        for source, parts in found.items():
            parameters = self._own_of(source)
            sums = [_sum(part, before[parameter]) for parameter, part in zip(parameters, parts, strict=True)]
            write_gradients(parameters, sums)

    def _own_of(self, source: str) -> list[nn.Parameter]:
        """Returns the own parameters that a source's loss trains: the host's loss trains those of seeds without one."""
        if source != HOST:
            return list(self._scope.own.get(source, ()))
        lossless = (own for seed, own in self._scope.own.items() if seed not in self._sources)
        return [parameter for own in lossless for parameter in own]


def _with_rest(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Adds to the host's loss what the weight of each seed's row leaves of its loss: all of it for one without a row.

    The losses are those of one batch by `losses_by_source`, so that the weighted sum of the rows stays the gradient of
    the batch's mean loss.
    """
    host = [losses[HOST]] if HOST in losses else []
    for source, loss in losses.items():
        rest = 1.0 - weights.get(source, 0.0)
        if source != HOST and rest > 0:
            host.append(loss * rest)
    return {**losses, HOST: torch.stack(host).sum()} if host else dict(losses)


def _sum(part: Tensor | None, before: Tensor | None) -> Tensor | None:
    if before is None:
        return part
    return local(before) if part is None else local(before) + part


def _split(vector: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes = [part.shape for part in parts]
    return flat_to_grads(vector, shapes) if vector.numel() else [vector.view(shape) for shape in shapes]


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """Returns the sum of scalar losses; of a single one the same tensor."""
    values = list(losses.values())
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _scaled(loss: Tensor, share: float, scaler: torch.amp.GradScaler | None) -> Tensor:
    scaled: Tensor = loss if scaler is None else scaler.scale(loss)
    return scaled if share == 1.0 else scaled * share
