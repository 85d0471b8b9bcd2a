"""The health of training: the verdict on each step and epoch, and the budget of automatic rollbacks.

Loss windows are training state: the lane keeps them, and here is a copy that follows its events. What belongs to the
run is in the record: going back restores none of it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Final

from tolaria.config import HealthSettings, RollbackSettings
from tolaria.emergency import Trigger
from tolaria.lane.messages import AcceptRegime, EpochDone, StepDone
from tolaria.rollback.protocol import HEALTH
from tolaria.run.health_record import (
    APART_STEPS,
    COLLAPSED,
    EVALUATIONS,
    HELD_STEPS,
    NEAR_STEPS,
    REGIMES_MAX,
    WATCH_STEPS,
    AutomaticRollback,
    Record,
    Watch,
    apart,
    batches_of,
    collapsing,
    stable,
)
from tolaria.run.verdicts import Halt, Proceed, RateCut, Retreat, Verdict
from tolaria.values.evaluation import Evaluation
from tolaria.values.loss_window import Averages, Explosion, LossWindow, rise_begins

_RECENT: Final = 256


class Health:
    """Judges steps and epochs of one run, if the settings enable it. Used on the event loop only.

    `saved` is the JSON from `to_json` of an earlier process of the run; empty for a new run.

    Attributes:
        losses: the copy of the lane's window.
    """

    def __init__(
        self, settings: RollbackSettings, health: HealthSettings, saved: str = "", *, judged_by: str = ""
    ) -> None:
        self._rolls_back = health.policy == "full"
        self.adopt(settings)
        self._judged_by = judged_by
        self._only_reports = health.policy == "watch"
        self._skips_data_max = health.skips_data_max
        self._record = Record.parse(saved)
        self._saved = self._without_progress()
        self.losses = LossWindow(health.window)
        self._recent: deque[StepDone] = deque(maxlen=_RECENT)
        self._watch: Watch | None = None
        self._alarmed_step: int | None = None
        self._accepting: Watch | None = None
        """The losses of a task that the lane has been asked to accept, until its answer."""
        self._origin = ""  # of the automatic rollback that is in progress
        self._spoiled: set[tuple[int, int]] = set()  # batches that are left out because of it

    def adopt(self, settings: RollbackSettings) -> None:
        """Judges by these settings from now on."""
        self.settings = settings
        self._automatic = settings.automatic and self._rolls_back

    # -- for others --------------------------------------------------------------------------------------------------

    @property
    def averages(self) -> Averages:
        """Moving averages of losses and gradient norms."""
        return self.losses.averages

    @property
    def suspect(self) -> bool:
        """Whether two of the last eight losses exploded: a restore point captured now may be ill."""
        return self.losses.suspect

    @property
    def above(self) -> bool | None:
        """Whether the loss of the last finite step lay above the top of the window before it; None before the first."""
        return self.losses.above

    @property
    def best_step(self) -> int:
        """The highest step that the run has reached."""
        return self._record.best_step

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps of the run."""
        return self._record.skipped

    @property
    def skip_streak(self) -> int:
        """Number of steps in a row that were skipped most recently."""
        return self._record.skip_streak

    def leave_out(self, batch: tuple[int, int]) -> None:
        """Leaves out a batch, as (epoch, place), for good."""
        self._record.left_out = sorted({*self._record.left_out, batch})

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """All batches that are left out, as (epoch, place)."""
        return tuple(sorted(self._record.left_out))

    def to_json(self) -> str:
        """Returns the record as JSON; a resumed run continues with it."""
        return self._record.model_dump_json(exclude_defaults=True)

    def unsaved(self) -> str | None:
        """Returns the record as JSON if it has to be saved, None if nothing but progress has changed since."""
        now = self._without_progress()
        if now == self._saved:
            return None
        self._saved = now
        return self.to_json()

    def _without_progress(self) -> str:
        progress = {"best_step", "taken"}  # `start` restores it from the state
        return self._record.model_dump_json(exclude_defaults=True, exclude=progress)

    # -- what the lane reports ---------------------------------------------------------------------------------------

    def start(self, losses: str, global_step: int) -> None:
        """Adopts the windows of the state with which training starts in this process."""
        self._adopt(losses)
        self._record.taken += max(0, global_step - self._record.best_step)  # since the record was saved
        self._record.best_step = max(self._record.best_step, global_step)

    def step(self, step: StepDone, *, rolling_back: bool) -> Verdict:
        """Judges a step.

        While a rollback is in progress no other one begins. An automatic one leaves out the batches of these steps too.
        """
        quiet = rolling_back or bool(self._origin)
        if step.skipped:
            if step.judged is not None:  # it is extreme
                self.losses.pass_over(step.judged)
                self._recent.append(step)
            return self._skipped(step, quiet=quiet)
        self._record.skip_streak = 0
        self._record.taken += 1
        self._record.best_step = max(self._record.best_step, step.global_step)
        self.losses.note(step.loss, step.gradient_norm)
        spread_before, alarm = self.losses.relative_spread, None
        if step.judged is not None:
            alarm = self.losses.add(step.judged)
            self._recent.append(step)
        if self._origin and alarm is not None:
            self._spoiled.update(batches_of(step))
        if quiet:
            return Proceed()
        if step.parameters_finite is False:
            return self._ill(step, "a buffer that a microbatch that is not finite has changed cannot be restored")
        if step.judged is None or self._accepting is not None:  # the lane has not emptied its window yet
            return Proceed()
        if self._watch is not None:
            return self._watched(self._watch, step, step.judged)
        return Proceed() if alarm is None else self._exploded(step, alarm, spread_before)

    def epoch(self, epoch: EpochDone, *, rolling_back: bool) -> Verdict:
        """Judges an evaluation by those before it: its metric of `judged_by`; until that appears, accuracy or loss."""
        record = self._record
        if rolling_back or self._origin or not epoch.evaluation.samples:
            return Proceed()
        if epoch.evaluation.correct and not record.counts_accuracy:
            record.counts_accuracy, record.evaluations, record.worse = True, [], []
        if (judged := self._judged(epoch.evaluation)) is None:
            return Proceed()
        what, sign, value = judged
        if not collapsing([value for _, value in record.evaluations], value, self.settings.accuracy_drop):
            for evaluation in (*record.worse, (epoch.global_step, value)):
                if math.isfinite(evaluation[1]):
                    record.evaluations.append(evaluation)
            record.evaluations, record.worse = record.evaluations[-EVALUATIONS:], []
            return Proceed()
        record.worse.append((epoch.global_step, value))
        if len(record.worse) < COLLAPSED or not self._automatic:
            return Proceed()
        first, worst = record.worse[0][0], min(value for _, value in record.evaluations)
        figures = f"{what} {sign * value:.4g} after {sign * worst:.4g}"
        reason = f"{len(record.worse)} evaluations in a row are worse than all before: {figures}"
        trend = "" if sign > 0 else "evaluations"
        if trend in record.trends:
            record.evaluations = list(record.worse)
        record.worse = []
        return self._retreat(reason, first, (), epoch.global_step, durable=True, trend=trend)

    def _judged(self, evaluation: Evaluation) -> tuple[str, int, float] | None:
        """Returns what is judged, 1 or -1 for a higher or a lower one that is better, and the value times that sign.

        None for an evaluation without the metric of the ones before: some jobs compute it every few epochs.
        """
        record = self._record
        name, _, better = self._judged_by.rpartition(":")
        named = evaluation.figures().get(name) if name else None
        if named is None and name and record.judged_by == self._judged_by:
            return None
        if (judged_by := self._judged_by if named is not None else "") != record.judged_by:
            record.judged_by, record.evaluations, record.worse = judged_by, [], []
        if named is not None:
            sign = 1 if better == "max" else -1
            return name, sign, sign * named
        if record.counts_accuracy:
            return "accuracy", 1, evaluation.accuracy
        return "loss", -1, -evaluation.loss

    def regime_begins(self, *, announced: bool) -> None:
        """Follows the lane, which has emptied its window for a changed task, announced by the job or accepted here."""
        self.losses.begin_regime(keep_waiting=not announced)
        self._recent.clear()
        self._accepting = self._watch = None

    def regime_answered(self, *, accepted: bool) -> None:
        """Follows the lane's answer to an `AcceptRegime`: steps are judged again, or watched on if it has failed."""
        watch, self._accepting = self._accepting, None
        if not accepted:  # its batches are still left out, and its window is that of the former task
            self._watch = None if watch is None else watch.longer()
            return
        record = self._record
        record.regimes += 1
        refunded = self._retreats[-1] if self._retreats else None
        record.rollbacks = [rollback for rollback in record.rollbacks if rollback is not refunded]
        record.left_out = sorted(set(record.left_out) - set(record.retreat_batches))
        record.retreat_step, record.retreat_batches = None, []

    def revived(self, losses: str, global_step: int) -> None:
        """Follows another process of the lane, which has restored a state. All budgets stay as they are."""
        self._adopt(losses)
        self._record.evaluations = [entry for entry in self._record.evaluations if entry[0] <= global_step]

    def restored(self, losses: str, global_step: int) -> None:
        """Follows the lane, which has restored a state. A rollback that is not automatic resets the budgets."""
        record = self._record
        self._adopt(losses)
        record.skip_streak = 0
        record.evaluations = [entry for entry in record.evaluations if entry[0] <= global_step]
        record.worse = []
        if not self._origin:
            record.rollbacks, record.without_progress = [], 0
            record.best_step, record.best_step_then, record.trends = global_step, -1, []
            record.retreat_step, record.retreat_batches = None, []
        elif record.rollbacks:
            record.rollbacks[-1].restored_step = global_step

    def forgive_skipped_steps(self) -> None:
        """Resets the streak of skipped steps."""
        self._record.skip_streak = 0

    # -- automatic rollbacks -----------------------------------------------------------------------------------------

    def refusal(self, at_step: int) -> Halt | None:
        """Returns why no further automatic rollback is allowed at `at_step`; None if one is allowed."""
        record, settings = self._record, self.settings
        if len(self._within_budget(at_step)) >= settings.automatic_max:
            spent = f"{settings.automatic_max} automatic rollbacks in {settings.per_steps} steps are spent"
            return Halt(Trigger.ROLLBACK_BUDGET_SPENT, spent)
        stuck = record.best_step <= record.best_step_then
        if stuck and record.without_progress >= settings.progress_rollbacks_max:
            reason = f"{record.without_progress} rollbacks in a row without a step beyond {record.best_step}"
            return Halt(Trigger.NO_PROGRESS, reason)
        return None

    def older_than(self, at_step: int) -> int | None:
        """Returns the oldest step that recent automatic rollbacks have restored: the next goes further back."""
        recent = [each for each in self._within_budget(at_step) if self._since(each, at_step) <= HELD_STEPS]
        return min((each.restored_step for each in recent if each.restored_step is not None), default=None)

    def begin_rollback(self, origin: str, at_step: int) -> None:
        """Counts an automatic rollback of an origin, `health` or `tamiyo`, that begins at `at_step`."""
        record = self._record
        self._origin = origin
        record.rollbacks = [*self._within_budget(at_step), self._beginning(origin, at_step)]
        stuck = record.best_step <= record.best_step_then
        record.without_progress = record.without_progress + 1 if stuck else 1
        record.best_step_then = record.best_step

    def end_retreat(self) -> tuple[tuple[int, int], ...]:
        """Ends an automatic rollback, however it went; returns the batches that are left out because of it."""
        record, origin, spoiled = self._record, self._origin, sorted(self._spoiled)
        self._origin, self._spoiled = "", set()
        record.left_out = sorted({*record.left_out, *spoiled})
        if origin == HEALTH:
            record.retreat_batches = spoiled
        return tuple(spoiled)

    def _retreat(
        self,
        reason: str,
        evidence_step: int,
        batches: tuple[tuple[int, int], ...],
        at_step: int,
        *,
        durable: bool = False,
        preferred_before: int | None = None,
        trend: str = "",
    ) -> Verdict:
        halt = self.refusal(at_step)
        if trend and (halt is not None or trend in self._record.trends):
            return self._reported(reason, at_step)
        if halt is not None:
            return Halt(halt.trigger, f"{reason}; {halt.reason}")
        self._record.trends += [trend] if trend else []
        older_than = self.older_than(at_step)
        self.begin_rollback(HEALTH, at_step)
        self._spoiled.update(batches)
        self._watch = None
        cut = RateCut(self.settings.lr_cut ** len(self._retreats), self.settings.lr_cut_steps)
        return Retreat(reason, evidence_step, batches, cut, older_than, durable, preferred_before, trend=bool(trend))

    def _within_budget(self, at_step: int) -> list[AutomaticRollback]:
        """Returns the rollbacks that began fewer than `per_steps` steps ago."""
        per_steps = self.settings.per_steps
        return [rollback for rollback in self._record.rollbacks if self._since(rollback, at_step) < per_steps]

    def _since(self, rollback: AutomaticRollback, at_step: int) -> int:
        """Returns the number of steps that have been taken since a rollback began, also those that were undone."""
        begun = rollback.begun_after
        return at_step - rollback.begun_at if begun is None else self._record.taken - begun

    def _beginning(self, origin: str, at_step: int) -> AutomaticRollback:
        return AutomaticRollback(begun_at=at_step, begun_after=self._record.taken, origin=origin)

    @property
    def _retreats(self) -> list[AutomaticRollback]:
        """The recorded rollbacks that a verdict on health has required."""
        return [rollback for rollback in self._record.rollbacks if rollback.origin == HEALTH]

    # -- verdicts ----------------------------------------------------------------------------------------------------

    def _skipped(self, step: StepDone, *, quiet: bool) -> Verdict:
        if step.rescaled:  # only the loss scale of float16 was too high
            return Proceed()
        record = self._record
        record.skipped += 1
        record.skip_streak += 1
        if quiet:
            return Proceed()
        if step.parameters_finite is False:
            return self._ill(step, f"the parameters are not finite: {record.skip_streak} steps in a row were skipped")
        exploded = self._watch is not None or self.losses.suspect
        if step.parameters_finite and exploded and self._automatic:
            return self._ill(step, f"{record.skip_streak} steps in a row were skipped after the losses had exploded")
        if record.skip_streak % self._skips_data_max == 0:
            ill = "the data are ill" if record.best_step else "no step of the run was finite: data or losses() are ill"
            reason = f"{record.skip_streak} steps in a row were not finite, but the parameters are: {ill}"
            return Proceed(reason) if self._only_reports else Halt(Trigger.SKIPPED_DATA_SPENT, reason)
        return Proceed()

    def _ill(self, step: StepDone, reason: str) -> Verdict:
        if self._only_reports:
            return self._reported(reason, step.global_step)
        if not self._automatic:
            return Halt(Trigger.PARAMETERS_NOT_FINITE, reason)
        first, batches = self._where_ill(step)
        return self._retreat(reason, first, batches, step.global_step, preferred_before=apart(first))

    def _exploded(self, step: StepDone, alarm: Explosion, spread_before: float) -> Verdict:
        reason = f"loss {step.judged:g}: {len(alarm.evidence)} losses above {alarm.limit:g} ({alarm.kind})"
        evidence_step, batches = self._evidence(step, alarm)
        early, trend = self._rises_again(evidence_step), alarm.kind if alarm.kind == "slow" else ""
        known = trend in self._record.trends
        if not self._automatic or self._record.regimes >= REGIMES_MAX or (known and early is None):
            return self._reported(reason, step.global_step)
        if trend:  # no batch is to blame for it
            batches = ()
        if early is not None:
            self._watch = Watch(reason, evidence_step, batches, self.losses.limit, spread_before, early, trend, [])
            return Proceed(reason)
        return self._retreat_from(reason, evidence_step, batches, step.global_step, trend)

    def _reported(self, reason: str, at_step: int) -> Proceed:
        """Reports what is not acted on, unless it has been reported a few steps before."""
        known, self._alarmed_step = self._alarmed_step, at_step
        return Proceed("" if known is not None and 0 <= at_step - known <= WATCH_STEPS else reason)

    def _rises_again(self, evidence_step: int) -> bool | None:
        """Returns whether losses have risen again before the place of the last retreat; None if it is not near.

        Near is also what follows the restored step closely: the fault goes on.
        """
        record = self._record
        if (place := record.retreat_step) is None:
            return None
        early = evidence_step < place - APART_STEPS // 2  # skipped steps move the same sign a few steps
        restored = self._retreats[-1].restored_step if self._retreats else None
        goes_on = early and restored is not None and evidence_step <= restored + NEAR_STEPS
        return early if goes_on or abs(evidence_step - place) <= NEAR_STEPS else None

    def _retreat_from(
        self, reason: str, evidence_step: int, batches: tuple[tuple[int, int], ...], at_step: int, trend: str = ""
    ) -> Verdict:
        preferred = self._rise_before(evidence_step)
        verdict = self._retreat(reason, evidence_step, batches, at_step, preferred_before=preferred, trend=trend)
        if isinstance(verdict, Retreat):
            self._record.retreat_step = evidence_step
        return verdict

    def _rise_before(self, evidence_step: int) -> int:
        """Returns the step at which the losses began to rise that led to this evidence."""
        known = [(step.global_step, step.judged) for step in self._recent if step.judged is not None]
        first = next((place for place, (step, _) in enumerate(known) if step >= evidence_step), 0)
        begin = rise_begins([loss for _, loss in known], first, self.losses.median)
        return apart(min(known[begin][0], evidence_step) if known else evidence_step)

    def _watched(self, watch: Watch, step: StepDone, loss: float) -> Verdict:
        watch.losses.append(loss)
        if len(watch.losses) < WATCH_STEPS:
            return Proceed()
        self._watch = None
        if watch.healed:
            return Proceed()
        # On data on which training went well before, it is no changed task, and what made it rise may be over by now.
        known = watch.trend in self._record.trends
        changed = known or (not watch.early and stable(watch.losses, watch.spread_before, self.losses.scale))
        if not changed:
            return self._retreat_from(watch.reason, watch.evidence_step, watch.batches, step.global_step, watch.trend)
        self._accepting = watch
        return AcceptRegime(watch.reason, tuple(self._record.retreat_batches))

    def _where_ill(self, step: StepDone) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Returns the first step of ill parameters, and its batches: losses may have exploded before they were NaN."""
        if self._watch is not None:
            return self._watch.evidence_step, self._watch.batches
        above = [place for place in self.losses.latest_above if place < len(self._recent)]
        steps = [self._recent[-1 - place] for place in above] or list(self._recent)[-1:]
        first = min([step.global_step, *(one.global_step for one in steps)])
        return first, tuple(batch for one in steps for batch in batches_of(one))

    def _evidence(self, step: StepDone, alarm: Explosion) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Returns the first step of the evidence, and its batches. Some may be from before this process or restore."""
        known, places = len(self._recent), (*alarm.onset, *alarm.evidence)
        steps = [self._recent[-1 - place] for place in places if place < known]
        first = step.global_step - places[0] if places[0] >= known else steps[0].global_step
        return first, tuple(batch for one in steps for batch in batches_of(one))

    def _adopt(self, losses: str) -> None:
        self.losses.load_state_dict(json.loads(losses) if losses else {})
        self._recent.clear()
        self._accepting = self._watch = self._alarmed_step = None
