"""Rollbacks of a run: how they begin, and what follows a restored state before training goes on.

The lane is held from the request until spoiled batches are skipped, the learning rate is cut and later checkpoints are
superseded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import anyio
import structlog

from leyline.v1.admin_service_pb2 import RUN_STATE_HALTED
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from tolaria.emergency import Trigger
from tolaria.errors import LaneLostError, NoCheckpointError, TolariaError, WrongStateError
from tolaria.lane import messages
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import EMERGENCY, HEALTH, Ending, Rollback
from tolaria.run.adjustments import RunAdjustments
from tolaria.run.health import Health
from tolaria.run.observers import RunObserver
from tolaria.run.restorer import LaneRestorer
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import Safety
from tolaria.run.verdicts import Retreat
from tolaria.telemetry.tracing import Tracer
from tolaria.values.optimization import AUTOMATIC, OPERATOR, Adjustment
from tolaria.values.spans import within

_ROLLBACK: Final = "rollback"  # holder of the lane
FOLLOW_UP_S: Final = 5.0
"""Longest wait of each command after a restore for the lane, which is already held."""

_BATCHES_LOGGED_MAX: Final = 20
_NOT_UNDONE: Final = frozenset({Ending.FAILED, Ending.DEADLINE_EXCEEDED})

_Answer = TypeVar("_Answer")


class Recovery:
    """Carries out rollbacks, one at a time, in the task `serve`. Used on the event loop only.

    `safety` receives failed proofs, and failures while the live state is ill, before the lane is released.
    """

    def __init__(
        self,
        coordinator: RollbackCoordinator,
        restorer: LaneRestorer,
        *,
        lifecycle: Lifecycle,
        health: Health,
        observers: RunObserver,
        safety: Safety,
        adjustments: RunAdjustments,
        tracer: Tracer,
    ) -> None:
        self._coordinator = coordinator
        self._restorer = restorer
        self._points = restorer.points
        self._lane = restorer.lane
        self._lifecycle = lifecycle
        self._health = health
        self._checkpointing = restorer.checkpointing
        self._observers = observers
        self._safety = safety
        self._status = restorer.status
        self._adjustments = adjustments
        self._tracer = tracer
        self._log = structlog.get_logger()
        self._wake = anyio.Event()
        self._current: tuple[Rollback, Callable[[Rollback], None]] | None = None
        self._over = anyio.Event()
        self._recovering: Rollback | None = None
        self.unproven = False
        """Whether a failed restore has left the live state corrupt, so that it must be neither trained nor saved."""
        self._resumed = restorer.points.resumed
        """The checkpoint that this process has resumed from, until a resume has mentioned it."""
        self._interrupted: Rollback | None = None
        """The rollback that health had begun when the lane's process died."""
        self.ill = ""
        """Why the live state, on which the run is halted, must not be saved; empty for a sound one."""

    @property
    def unsound(self) -> str:
        """Why the live state must not become a checkpoint; empty if it may."""
        if self.unproven:
            return "the live state is not what was rolled back to: roll back once more first"
        return f"the live state is ill ({self.ill}): clear the emergency and resume, or roll back" if self.ill else ""

    @property
    def running(self) -> bool:
        """Whether a rollback is under way."""
        return self._current is not None

    async def serve(self) -> None:
        """Carries out rollbacks as they are begun, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            if self._current is not None:
                await self._carry_out(*self._current)

    async def save_when_halted(self) -> None:
        """Writes a checkpoint whenever the run is halted on a sound state, until cancelled."""
        status, checkpointing = self._status, self._checkpointing
        while True:
            await status.feed.until(lambda: status.state == RUN_STATE_HALTED and self._lane.is_held)
            if checkpointing.enabled and status.global_step != checkpointing.saved_step and not self.unsound:
                with suppress(TolariaError):  # counted and logged by checkpointing
                    await checkpointing.create("halted")
            await status.feed.until(lambda: status.state != RUN_STATE_HALTED)

    def begin(self, rollback: Rollback, on_over: Callable[[Rollback], None] = lambda _rollback: None) -> None:
        """Begins a rollback and holds the lane; `on_over` is called when it has ended.

        Raises:
            WrongStateError: another rollback is under way, or the run has ended.
        """
        self._lifecycle.require_not_ended("there is nothing to roll back")
        if self._current is not None:
            raise WrongStateError("another rollback is running")
        rollback.global_step = self._status.global_step
        if rollback.origin == OPERATOR:
            rollback.left_not_kept, rollback.saves_left = self.unsound, not self.unsound
        self._stop_awaiting_step()
        rollback.span = self._tracer.begin(rollback.span or self._tracer.current)
        self._current, self._over = (rollback, on_over), anyio.Event()
        self._lane.hold(_ROLLBACK)
        self._checkpointing.spare(rollback.checkpoint_id)
        self._observers.on_rollback_started(rollback)
        self._wake.set()

    async def roll_back(self, rollback: Rollback) -> Rollback:
        """Begins a rollback, waits for its end and returns it; it continues even if the caller is cancelled.

        Raises:
            RestoreUnprovenError: the live state was overwritten and is not what was captured; the run is halted.
            TolariaError: nothing was restored; the live state is unchanged. WrongStateError as for `begin`.
        """
        self.begin(rollback)
        await self._over.wait()
        rollback = rollback.replaced_by or rollback
        if rollback.ending is not Ending.RESTORED:
            raise rollback.error or WrongStateError("the rollback was aborted")
        return rollback

    async def leave_ill_state(self, reason: str) -> str:
        """Goes back to a sound restore point if the live state is ill; returns the reason with the state that is live.

        A run whose halt has outlived its process has resumed from the newest checkpoint that is not suspect; that one
        is mentioned if no step has followed it.

        Raises as `roll_back` does.
        """
        (row, self._resumed), halted = (self._resumed, None), self._status.state == RUN_STATE_HALTED
        if self.ill:
            why = f"resumed after a halt on an ill state ({self.ill}): {reason}"
            back = await self.roll_back(Rollback(ROLLBACK_TIER_UNSPECIFIED, None, why, EMERGENCY))
            return f"{reason}; from step {back.restored_step} ({back.chosen}), because the halted state is ill"
        if halted and row is not None and self._status.global_step == row.global_step:
            return f"{reason}; from step {row.global_step} (the newest not suspect: checkpoint {row.checkpoint_id})"
        return reason

    def retreat(self, verdict: Retreat) -> None:
        """Begins the rollback that a health verdict requires, unless one is in progress or the run has ended.

        It goes to the newest proven restore point from before the evidence, of both tiers unless it has to be durable.
        """
        if self.running or self._lifecycle.ended:
            return
        tier = ROLLBACK_TIER_FULL if verdict.durable else ROLLBACK_TIER_UNSPECIFIED
        rollback = Rollback(
            tier, None, verdict.reason, HEALTH, before_step=verdict.at_or_before + 1, trend=verdict.trend
        )
        rollback.preferred_before = verdict.preferred_before
        rollback.lr_cut = Adjustment(
            group=None,
            factor=verdict.cut.factor,
            value=None,
            expires_after_steps=verdict.cut.steps,
            origin=AUTOMATIC,
            request_id=rollback.rollback_id,
            reason="training went wrong at the previous learning rate",
        )
        self.begin(rollback)

    def on_judged(self, step: messages.StepDone) -> None:
        """Handles a step that health has judged: a finite loss that counts for health may prove restore points."""
        if step.skipped or step.judged is None:
            return
        above, suspect = bool(self._health.above), self._health.suspect
        self._checkpointing.on_proven(self._points.step_done(above=above, suspect=suspect))

    def on_step(self, step: messages.StepDone) -> None:
        """Handles a healthy step: the first one that is not skipped ends the recovery from a rollback."""
        if (rollback := self._recovering) is not None and not step.skipped:
            self._recovering = None
            duration_s = step.finished_at_s - rollback.began_s  # both monotonic; events arrive a little later
            self._observers.on_rollback_recovered(rollback, duration_s, step.global_step)

    def rewound(self, restored: messages.Restored) -> None:
        """Handles the lane's `Restored`, in its order: a new attempt begins."""
        step = restored.position.global_step
        self._points.rewound(step, self._restorer.origin)
        self._checkpointing.rewound(step, self._points.lineage)
        self._status.attempt = self._points.lineage.attempt
        if self._current is not None:
            self._current[0].attempt = self._status.attempt
        self._status.newest_proven_step = self._points.newest_proven_step

    def revived(self) -> None:
        """Handles a new process of the lane, which has restored an ancestor of the live state, in the lane's order."""
        self.ill, self.unproven, self._restorer.origin = "", False, None
        self._stop_awaiting_step()

    async def follow_revival(self, step: int, from_memory: bool) -> None:
        """Does what follows a rollback to `step`; begins the one again that the death has interrupted, if it is due.

        Raises WrongStateError as `begin` does.
        """
        await self._checkpointing.follow(self._points.lineage, f"the lane was started again from step {step}")
        if from_memory:
            await self._checkpointing.save_branch(step)
        rollback, self._interrupted = self._interrupted, None
        if rollback is not None and rollback.before_step is not None and step >= rollback.before_step:
            self.begin(rollback.again(ROLLBACK_TIER_UNSPECIFIED))

    async def _carry_out(self, rollback: Rollback, on_over: Callable[[Rollback], None]) -> None:
        named_tier = rollback.tier
        try:
            with within(rollback.span):
                await self._coordinator.run(rollback)
            if (second := await self._second_try(rollback, named_tier)) is not None:
                self._observers.on_rollback_ended(rollback)
                first, rollback = rollback, second
                rollback.span = self._tracer.begin(first.span)
                self._current = (rollback, on_over)
                self._observers.on_rollback_started(rollback)
                with within(rollback.span):
                    await self._coordinator.run(rollback)
                first.replaced_by = rollback
            await self._follow_up(rollback)
        finally:
            self._health.end_retreat()
            self._checkpointing.spare("")
            self._current = None
            self._lane.release(_ROLLBACK)
            self._over.set()
        on_over(rollback)
        self._lifecycle.changed()

    async def _second_try(self, rollback: Rollback, named_tier: RollbackTier.ValueType) -> Rollback | None:
        """Returns the rollback that replaces a failed one; None if there is no other restore point to try."""
        tier = _other_tier(rollback, named_tier)
        if tier is None:
            return None
        try:
            await self._restorer.choose(rollback.again(tier))
        except TolariaError:  # the first failure is the one to report
            return None
        return rollback.again(tier)

    async def _follow_up(self, rollback: Rollback) -> None:
        """Does what has to be done before the lane is released, depending on how the rollback ended."""
        restored = rollback.ending is Ending.RESTORED
        self.unproven = rollback.unproven or (self.unproven and not restored)
        self._halt_if_ill(rollback)
        if restored or rollback.unproven:
            back = f"rolled back to step {rollback.restored_step}"
            rollback.superseded = await self._checkpointing.follow(self._points.lineage, back)
        self._observers.on_rollback_ended(rollback)
        if restored:
            self.ill = ""
            if rollback.tier == ROLLBACK_TIER_FAST:
                await self._checkpointing.save_branch(rollback.restored_step)
            await self._follow_restore(rollback)

    def _halt_if_ill(self, rollback: Rollback) -> None:
        """Halts the run if live state is corrupt, or is ill and could not be undone; an operator's failure does not."""
        if rollback.unproven:
            self._safety.halt(f"rollback_unproven: {rollback.error}")
        elif isinstance(rollback.error, LaneLostError):
            self._interrupted = rollback if rollback.origin == HEALTH else None  # the next process begins elsewhere
        elif rollback.origin == HEALTH and not rollback.trend and rollback.ending in _NOT_UNDONE:
            self.ill = rollback.reason
            if rollback.ending is Ending.DEADLINE_EXCEEDED:
                self._safety.trigger(Trigger.ROLLBACK_DEADLINE_MISSED, rollback.reason)
            else:
                self._safety.halt(f"rollback_failed: {rollback.reason}: {rollback.error}")

    async def _follow_restore(self, rollback: Rollback) -> None:
        if rollback.lr_cut is not None:
            await self._call("ChangeOptimizer", self._adjustments.make(rollback.lr_cut))
        self._status.rolled_back(rollback.origin)
        self._recovering = rollback
        if self._lane.held_for_others(_ROLLBACK):
            self._stop_awaiting_step()
        spoiled = self._health.end_retreat()
        if left_out := self._health.left_out:  # also those of a rollback that has failed before
            done = await self._call("SkipBatches", self._lane.call(messages.SkipBatches(left_out)))
            if spoiled and done is not None and isinstance(done.result, messages.BatchesSkipped):
                self._log.warning(
                    "batches_left_out",
                    rollback_id=rollback.rollback_id,
                    epochs_and_places=sorted(spoiled)[:_BATCHES_LOGGED_MAX],
                    count=len(spoiled),
                    count_in_all=done.result.count,
                )

    def _stop_awaiting_step(self) -> None:
        """Takes the last rollback to have ended when its state was restored, since no step follows soon."""
        rollback, self._recovering = self._recovering, None
        if rollback is not None and rollback.ending is not None:
            self._observers.on_rollback_duration(rollback.tier, rollback.ending.value, rollback.latency_ms / 1000)

    async def _call(self, command: str, carried_out: Awaitable[_Answer]) -> _Answer | None:
        """Has the lane carry out a command; a failure is logged, because the state has been restored already."""
        error = "the lane did not answer"
        try:
            with anyio.move_on_after(FOLLOW_UP_S):
                return await carried_out
        except TolariaError as failure:
            error = str(failure)
        self._log.error("after_rollback_failed", command=command, error=error)
        return None


def _other_tier(rollback: Rollback, named_tier: RollbackTier.ValueType) -> RollbackTier.ValueType | None:
    """Returns the tier of a second try; None if there is none.

    One that missed its deadline tries the other tier. One whose snapshot was overwritten while the lane was on its way
    to a step boundary chooses anew, of the tier that was named, if any. A tier or checkpoint that an operator names is
    not replaced by another; a verdict that asks for a checkpoint takes a snapshot if there is none.
    """
    lost = isinstance(rollback.error, NoCheckpointError) and rollback.chosen_step is not None
    if lost and rollback.tier == ROLLBACK_TIER_FAST:
        return named_tier
    missing = isinstance(rollback.error, NoCheckpointError) and rollback.chosen_step is None
    if rollback.origin == HEALTH and named_tier == ROLLBACK_TIER_FULL and missing:
        return ROLLBACK_TIER_FAST
    if rollback.checkpoint_id or (named_tier != ROLLBACK_TIER_UNSPECIFIED and rollback.origin != HEALTH):
        return None
    if rollback.ending is Ending.DEADLINE_EXCEEDED and rollback.chosen_step is not None:
        return ROLLBACK_TIER_FULL if rollback.tier == ROLLBACK_TIER_FAST else ROLLBACK_TIER_FAST
    return None
