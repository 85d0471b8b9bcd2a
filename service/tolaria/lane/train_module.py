"""`TrainModule`: everything that a step needs, from job and model to the position in the data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from tolaria.config import Settings
from tolaria.jobs import (
    Batch,
    BatchCursor,
    CursorState,
    IntervalCursor,
    RunView,
    StatefulJob,
    TrainingJob,
    TrainModeJob,
)
from tolaria.jobs.data import epoch_seed
from tolaria.jobs.intervals import loader_of, pass_over
from tolaria.jobs.job import StepLog
from tolaria.lane.buffers import SavedBuffers
from tolaria.lane.device import seed_everything
from tolaria.lane.early_stopping import EarlyStopping
from tolaria.lane.fast_paths import FastPaths
from tolaria.lane.gradient_merge import GradientMerger
from tolaria.lane.job_callbacks import JobCallbacks
from tolaria.lane.job_output import checked_batch
from tolaria.lane.messages import RegimeBegun
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.skipped_batches import SkippedBatches
from tolaria.lane.trained_flags import TrainedFlags
from tolaria.lane.weight_averages import WeightAverages
from tolaria.ranks.group import Group
from tolaria.ranks.images import broadcast_rng_state, leading_generators
from tolaria.ranks.share import Share
from tolaria.shards import is_sharded, local
from tolaria.state.encoding import KeptValues, capture_rngs, restore_rngs
from tolaria.state.training_state import StatePart
from tolaria.values.loss_window import LossWindow
from tolaria.values.training import EpochProgress, Position

T = TypeVar("T")

_Kept: TypeAlias = tuple[KeptValues, ...]

_StepStart: TypeAlias = tuple[CursorState, EpochProgress, tuple[dict[str, Tensor], dict[str, JsonValue]]]


@dataclass(slots=True)
class RankWaits:
    """Seconds in which a rank has waited for its data, and for other ranks."""

    input_s: float = 0.0
    ranks_s: float = 0.0


class TrainModule:
    """What the lane trains: a job, its model on `device`, its data and its progress. Used in one thread at a time.

    Its part of the training state is the progress in the epoch, which no other object holds.

    Attributes:
        loader: what reads the data, if that is a `LoaderCursor`.
        global_step: number of completed steps.
        progress: of the current epoch, or the last one.
        skipped: batches that `next_batch` passes over.
        on_reading: called with epoch and place of each batch before it is read.
        flags: which parameters are trained.
        losses: the window of recent losses, by which new ones are judged.
        announced: reasons for which the job has announced a changed task, not taken into account yet.
        regimes_begun: events of changed tasks that the lane has not taken yet.
        skip_streak: steps in a row that were skipped most recently.
        last_good: a batch of the last step that was not skipped, as the cursor returned it.
        share: this rank's part of each validation batch; `training_share` is that of training batches.
        sharded: whether each rank has a part of every parameter.
        waits: seconds since the epoch's begin that this rank has waited for its data, and for other ranks.
        undone: False if something that was left out could not be undone; `train_step` reports and resets it.
        parameters: trainable parameters in the optimizer.
        clip_groups: the same parameters, in groups that are clipped separately; the host's is the first.
    """

    def __init__(
        self,
        job: TrainingJob,
        model: nn.Module,
        cursor: BatchCursor,
        device: torch.device,
        *,
        seeds: SeedTraining,
        fast_paths: FastPaths,
        settings: Settings,
        announced: deque[str] | None = None,
    ) -> None:
        self.job = job
        # Looked up once: a check against a protocol takes longer than a small layer.
        self._changed_by_passes = _changed_by_passes(job, seeds)
        self._sets_train_mode = job if isinstance(job, TrainModeJob) else None
        self.model, self.device, self.seeds = model, device, seeds
        self.cursor, self.loader = cursor, loader_of(cursor)
        self.sharded = any(map(is_sharded, model.parameters()))
        self.merger = GradientMerger(settings, seeds.gradient_scope(0), sharded=self.sharded)
        self.fast_paths = fast_paths
        self.accumulate = settings.training.accumulate
        self.clip_norm, self._steps = settings.training.clip_norm, settings.training.steps
        self.evaluates = True
        """Whether the job has a validation set, as the first look has found."""
        self.global_step = 0
        self.progress = EpochProgress()
        self.skipped = SkippedBatches()
        self.flags = TrainedFlags(model)
        self.losses = LossWindow(settings.health.window)
        self.announced: deque[str] = deque() if announced is None else announced
        self.logged = StepLog()
        """What the job logs during a step."""
        self.regimes_begun: list[RegimeBegun] = []
        self.skips_max, self.skips_extreme = settings.health.skips_max, settings.health.skips_extreme
        self.on_reading: Callable[[int, int], object] = lambda _epoch, _place: None
        self.skip_streak, self.undone = 0, True
        self.last_good: Batch | None = None
        self.waits = RankWaits()
        self.share = self.training_share = Share()
        self._group: Group | None = None
        self._seed = settings.training.seed
        self._buffers, self._microbatch_buffers = SavedBuffers(model), SavedBuffers(model)
        self._kept_job: _Kept = ()
        self._microbatch_job: _Kept = ()
        self._underway = False
        self._kept_gradients: list[Tensor | None] | None = None
        self.early_stopping = EarlyStopping(settings.early_stopping)
        self.callbacks = JobCallbacks((), RunView(), seeds.groups_as_built)
        self.averages = WeightAverages(model, settings.ema) if settings.ema.decay else None
        """Of the weights; None if the settings want none."""
        self._step_start: _StepStart | None = None
        self.refresh()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the job built; a rebuild changes its groups."""
        return self.seeds.manager.optimizer

    @property
    def position(self) -> Position:
        """Completed steps and the epoch. Setting it sets the steps only: the epoch is part of `progress`."""
        return Position(self.global_step, self.progress.number)

    @position.setter
    def position(self, position: Position) -> None:
        self.global_step = position.global_step

    @property
    def group(self) -> Group | None:
        """The ranks that train this model together; None for one process alone. Set once the first look is over."""
        return self._group

    @group.setter
    def group(self, group: Group | None) -> None:
        self._group = self.merger.group = group
        if group is not None and isinstance(self.cursor, IntervalCursor):
            self.cursor.pass_begins = lambda: leading_generators(group)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch; the last one may have fewer microbatches."""
        return -(-(self.cursor.batches_per_epoch or 0) // self.accumulate)

    @property
    def complete(self) -> bool:
        """Whether the run has all steps of `training.steps`, if it is counted in steps."""
        return 0 < self._steps <= self.global_step

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns the progress."""
        return self.progress.to_json()

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Restores the progress. Raises KeyError if a key is missing."""
        self.progress = EpochProgress.from_json(state)

    def refresh(self) -> None:
        """Collects parameters and buffers again, after the seeds in the model have changed."""
        self._collect_parameters()
        self._buffers.follow(self.model)
        self._microbatch_buffers.follow(self.model)

    def look_up_parameters(self) -> None:
        """Collects the parameters again if the job has frozen or unfrozen some, or changed the optimizer's groups.

        Called after each forward pass, in which a job may do so. Otherwise costs one comparison for each parameter.
        """
        if self._trained != self._trained_now():
            self._collect_parameters()

    def train_mode(self) -> None:
        """Sets the model to training mode, by the job's own `train_mode` if it has one."""
        if self._sets_train_mode is None:
            self.model.train()
            return
        with self.seeds.groups_as_built():
            self._sets_train_mode.train_mode(self.model)

    def go_on_if_patient(self) -> None:
        """Has a run that was stopped early go on, if the settings have more patience now."""
        if self.progress.stop and not self.early_stopping.due:
            self.progress = replace(self.progress, stop="")

    def begin_epoch(self) -> None:
        """Starts the next epoch; within one, as after a rollback, only sets the model to training mode."""
        self.train_mode()
        self.look_up_parameters()
        self.waits = RankWaits()
        if self.progress.over:
            self.progress = self.progress.begun(self.progress.number + 1)
            if self._group is not None:  # a cursor may draw the order of the epoch
                broadcast_rng_state(self._group)
            with self.seeds.groups_as_built():
                self.cursor.begin_epoch(self.progress.number)

    def next_batch(self) -> Batch | None:
        """Returns the next batch that is not empty and not to be skipped; None at the end of the epoch.

        Batches to be skipped are not even read where the cursor can do without. Raises BrokenJobError if the cursor
        returns something else than a batch.
        """
        cursor = self.cursor
        while True:
            skipped = (self.progress.number, self.progress.batches) in self.skipped
            if skipped and pass_over(cursor):
                self.progress = self.progress.after_batch()
                continue
            self.on_reading(self.progress.number, self.progress.batches)
            rngs = capture_rngs() if skipped else None
            batch = self._read(cursor.next_batch)
            if batch is None:
                return None
            if rngs is not None:  # so that training is as if the data never had this batch
                restore_rngs(*rngs)
            batch = checked_batch(batch, "training_data: next_batch()")
            self.progress = self.progress.after_batch()
            if batch.samples and not skipped:
                return batch

    def close_data(self) -> None:
        """Ends the workers of a `DataLoader`; nothing may be read afterwards."""
        if self.loader is not None:
            self.loader.close()

    def note_step_start(self) -> None:
        """Records buffers and the job before a step; before one of several microbatches also data and generators."""
        self.flags.step_begins(self.global_step)
        self.save_pass()
        self._step_start = None
        if self.accumulate > 1:
            self._step_start = self.cursor.state_dict(), self.progress, capture_rngs()
        self._underway = True

    def note_step_end(self) -> None:
        """Drops what `note_step_start` recorded: the step has been taken or skipped, or has no batch."""
        self._underway, self._step_start, self._kept_job, self._microbatch_job = False, None, (), ()

    def abandon_step(self) -> None:
        """Restores what `note_step_start` recorded, so that the same step can start again; drops all gradients.

        Between two steps, as in an evaluation, nothing else changes.
        """
        if not self._underway:
            self.clear_gradients()
            return
        self.discard_pass()
        if self._step_start is not None:
            cursor, self.progress, rngs = self._step_start
            self.cursor.load_state_dict(cursor)
            restore_rngs(*rngs)
        self.note_step_end()

    def begin_on_rank(self) -> None:
        """Seeds the generators of a rank that does not lead: its random numbers are a function of seed, step and rank.

        So they need not be saved, and the leader's are those of a process alone.
        """
        if self._group is not None and not self._group.leads:
            place = (self.global_step << 16) + self.progress.batches
            seed_everything(epoch_seed(self._seed + (self._group.rank << 40), place))

    def broadcast_buffers(self) -> None:
        """Gives every rank the leader's buffers, such as running statistics, also those assigned anew."""
        if self._group is not None and (buffers := list(self.model.buffers())):
            self._group.broadcast_tensors(buffers)

    def clear_gradients(self) -> None:
        """Drops all gradients, also those of frozen parameters and of those that are not in the optimizer."""
        for parameter in self._all_parameters:
            parameter.grad = None

    def save_pass(self) -> None:
        """Saves what a pass changes: the buffers (running statistics) and what the job's code changes in it."""
        self._buffers.save()
        self._kept_job = self._job_state()

    def discard_pass(self) -> None:
        """Drops all gradients, and restores what `save_pass` saved; clears `undone` if a buffer cannot be."""
        self.clear_gradients()
        self.undone = self._buffers.restore() and self.undone
        self._restore_job(self._kept_job)

    @contextmanager
    def forward_undone(self) -> Iterator[None]:
        """Undoes what a forward pass within the block changes, after the microbatches of a step; gradients stay."""
        rngs, kept_job = capture_rngs(), self._job_state()
        self._microbatch_buffers.save()
        logged = self.logged.put_aside()
        try:
            yield
        finally:
            self.undone = self._microbatch_buffers.restore() and self.undone
            self._restore_job(kept_job)
            restore_rngs(*rngs)
            self.logged.put_back(logged)

    def save_microbatch(self, *, gradients: bool) -> None:
        """Saves buffers, job and, with `gradients`, these before a microbatch of several, for `discard_microbatch`."""
        if self.accumulate > 1:
            self._microbatch_buffers.save()
            self._microbatch_job = self._job_state()
            found = [p.grad for p in self._all_parameters] if gradients else None
            self._kept_gradients = None if found is None else [None if g is None else g.clone() for g in found]

    def discard_microbatch(self) -> None:
        """Restores what `save_microbatch` saved; clears `undone` if a buffer cannot be."""
        self.undone = self._microbatch_buffers.restore() and self.undone
        self._restore_job(self._microbatch_job)
        if self._kept_gradients is not None:
            for parameter, gradient in zip(self._all_parameters, self._kept_gradients, strict=True):
                parameter.grad = gradient

    def gradients_finite(self) -> bool:
        """Whether all gradients that affect the host's loss are finite. Synchronises."""
        gradients = [local(p.grad) for p in self.clip_groups[0] if p.grad is not None]
        return self.on_all_ranks(all(bool(torch.isfinite(gradient).all()) for gradient in gradients))

    def compare_reading(self, found: bool) -> None:
        """Raises RanksDifferError if only some ranks have a batch, where they communicate before the step's sums."""
        if self._group is not None and (self.accumulate > 1 or self.sharded):
            asked_s = time.monotonic()
            self._group.all(value=True, must_match={"whether the epoch has another batch": found})
            self.waits.ranks_s += time.monotonic() - asked_s

    def norms_over_shards(self, norms: Sequence[float]) -> list[float]:
        """Returns the norms of sharded tensors, given those of their parts on this rank; else the given ones."""
        if self._group is None or not self.sharded:
            return list(norms)
        return [math.sqrt(square) for square in self._group.all_reduce([norm * norm for norm in norms])]

    def on_all_ranks(self, found: bool) -> bool:
        """Whether something is so on every rank."""
        return found if self._group is None else self._group.all(found)

    def begin_announced_regimes(self) -> None:
        """Empties the window of losses if the job has announced a changed task since the last call."""
        while self.announced:
            self.begin_regime(self.announced.popleft(), announced=True)

    def begin_regime(self, reason: str, *, announced: bool) -> None:
        """Empties the window of losses for a changed task, except for those that wait, unless it was `announced`."""
        self.losses.begin_regime(keep_waiting=not announced)
        self.regimes_begun.append(RegimeBegun(self.global_step, reason, announced))

    def forget_steps(self) -> None:
        """Drops what steps leave beside the state: announced regimes, the streak of skipped steps, the last batch."""
        self.note_step_end()
        self.undone = True
        self.announced.clear()
        self.logged.clear()
        self.regimes_begun.clear()
        self.skip_streak, self.last_good = 0, None

    def _read(self, read: Callable[[], T]) -> T:
        with self.seeds.groups_as_built():
            return read()

    def _job_state(self) -> _Kept:
        return tuple(KeptValues(dict(part.state_dict()), name) for name, part in self._changed_by_passes)

    def _restore_job(self, kept: _Kept) -> None:
        for values, (_, part) in zip(kept, self._changed_by_passes, strict=False):  # nothing is kept between two steps
            part.load_state_dict(values.values())

    def _collect_parameters(self) -> None:
        self._trained = self._trained_now()
        self.parameters = self.seeds.trained_parameters()
        self.clip_groups = self.seeds.clip_groups()
        self.isolated_seeds = tuple(self.seeds.isolated_parameters())
        self.merger.follow(self.seeds.gradient_scope(self.global_step))
        self._all_parameters = list(self.model.parameters())
        if self.averages is not None:
            self.averages.follow()

    def _trained_now(self) -> list[bool]:
        return [p.requires_grad for group in self.optimizer.param_groups for p in group["params"]]


def _changed_by_passes(job: TrainingJob, seeds: SeedTraining) -> tuple[tuple[str, StatePart], ...]:
    """Returns the parts of the state that the job's code changes in a pass, by name."""
    schedule = seeds.controller.job_schedule
    parts: list[tuple[str, StatePart]] = [("job", job)] if isinstance(job, StatefulJob) else []
    return (*parts, ("lr_scheduler", schedule)) if schedule is not None and schedule.stepped_by_job else tuple(parts)
