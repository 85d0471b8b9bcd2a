from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from leyline.v1.state_pb2 import HardwareContext
from tolaria.config import HealthSettings, RollbackSettings
from tolaria.emergency import Trigger
from tolaria.lane.messages import AcceptRegime, EpochDone, StepDone
from tolaria.run.health import Health
from tolaria.run.health_record import DroppedSeeds, Record, collapsing, stable
from tolaria.run.verdicts import Halt, Proceed, RateCut, Retreat, Verdict
from tolaria.values.evaluation import Evaluation
from tolaria.values.loss_window import LossWindow

SETTINGS = RollbackSettings()
HEALTH = HealthSettings(window=16)
QUIET, LOUD = 1.0, 1000.0


def step(loss: float = QUIET, *, at: int = 500, place: int | None = None) -> StepDone:
    """Returns a finite step of the batch `place`, by default that of the same number as the step."""
    place = at if place is None else place
    return StepDone(at, 1, loss, 1.0, 8, 0.1, 0.0, 0.0, batches=range(place, place + 1), judged=loss)


def skipped(*, at: int = 500, finite: bool | None = None, rescaled: bool = False) -> StepDone:
    """Returns a skipped step."""
    return StepDone(
        at, 1, math.nan, 1.0, 8, 0.1, 0.0, 0.0, True, rescaled=rescaled, batches=range(9, 10), parameters_finite=finite
    )


def epoch(correct: int, *, at: int = 500, loss: float = 1.0) -> EpochDone:
    """Returns one epoch with 100 samples."""
    return EpochDone(3, at, Evaluation(100 * loss, correct, 100), 1.0, 0.0, {}, 0.0, HardwareContext())


class Trained:
    """A health that has judged healthy steps; each further one is numbered."""

    def __init__(self, settings: RollbackSettings = SETTINGS, *, steps: int = 100, saved: str = "") -> None:
        self.health = Health(settings, HEALTH, saved)
        self.at = 0
        self.train(*[QUIET] * steps)

    def train(self, *losses: float) -> list[Verdict]:
        """Judges steps with these losses; returns the verdicts that are not to proceed in silence."""
        verdicts = []
        for loss in losses:
            self.at += 1
            verdicts.append(self.health.step(step(loss, at=self.at), rolling_back=False))
        return [verdict for verdict in verdicts if verdict != Proceed()]

    def explode(self) -> Verdict:
        """Judges two steps that exploded."""
        *_, verdict = self.train(LOUD, LOUD)
        return verdict

    def restore(self, at: int) -> None:
        """Goes back to a step, at which the window was full of quiet losses, and ends the rollback."""
        window = LossWindow(HEALTH.window)
        for _ in range(30):
            window.add(QUIET)
        self.health.restored(json.dumps(window.state_dict()), at)
        self.health.end_retreat()
        self.at = at

    def settle(self) -> None:
        """Trains until the window is full of quiet losses again."""
        self.health.regime_begins(announced=True)
        self.train(*[QUIET] * 200)


def test_an_explosion_retreats_to_before_its_evidence() -> None:
    """The batches of the evidence are left out, and the learning rate is cut."""
    run = Trained()
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.preferred_before, verdict.batches) == (101, 86, ((1, 101), (1, 102)))
    assert (verdict.cut, verdict.older_than, verdict.durable) == (RateCut(0.5, 100), None, False)
    assert "loss 1000" in verdict.reason
    assert run.train(LOUD, QUIET) == []  # no second one while it is in progress
    assert run.health.end_retreat() == ((1, 101), (1, 102), (1, 103))


def test_the_batches_that_led_to_a_certain_explosion_are_left_out() -> None:
    """Their losses were high, but not high enough to be certain; without them training would be ruined again."""
    run = Trained()
    assert run.train(1.02, QUIET, 1.03) == []
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert verdict.evidence_step == 101
    assert verdict.batches == tuple((1, place) for place in range(101, 106))


def test_the_gradient_norm_of_a_finite_step_gives_no_verdict() -> None:
    """PCGrad, clipping and conflicting tasks make it jump."""
    run = Trained()
    wild = StepDone(101, 1, 5.0, 1e30, 8, 0.1, 0.0, 0.0, judged=QUIET)
    assert run.health.step(wild, rolling_back=False) == Proceed()


def test_steps_without_a_judged_loss_give_no_verdict() -> None:
    """Those whose samples all belong to seeds."""
    run = Trained()
    for at in range(101, 120):
        seeds_only = StepDone(at, 1, 1e9, 1.0, 8, 0.1, 0.0, 0.0)
        assert run.health.step(seeds_only, rolling_back=False) == Proceed()


def test_each_retreat_goes_further_back_and_slower() -> None:
    """Within `per_steps`; skipped batches accumulate, and the budget ends it with a halt."""
    run = Trained(steps=400)
    cuts, limits = [], []
    for back, steps in ((380, 250), (360, 150), (340, 250)):
        verdict = run.explode()
        assert isinstance(verdict, Retreat)
        cuts.append(verdict.cut.factor)
        limits.append(verdict.at_or_before)
        run.restore(back)
        run.train(*[QUIET] * steps)
    assert cuts == [0.5, 0.25, 0.125]
    assert limits == [400, 379, 359]
    verdict = run.explode()
    assert isinstance(verdict, Halt)
    assert verdict.trigger is Trigger.ROLLBACK_BUDGET_SPENT
    assert len(run.health.left_out) == 6


@pytest.mark.parametrize(("steps", "older_than"), [(200, 0), (300, None)])
def test_a_retreat_long_after_one_that_helped_does_not_go_further_back(steps: int, older_than: int | None) -> None:
    """It would undo good steps, if there is an older point at all."""
    run = Trained()
    assert isinstance(run.explode(), Retreat)
    run.restore(0)
    run.train(*[QUIET] * steps)
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert verdict.older_than == older_than
    assert verdict.cut.factor == 0.25


def test_steps_that_are_taken_again_count_for_the_budget() -> None:
    """A rollback far back does not make the ones before it count until its steps have all been taken again."""
    run = Trained(RollbackSettings(automatic_max=1, per_steps=300), steps=5000)
    assert isinstance(run.explode(), Retreat)
    run.restore(100)
    run.train(*[QUIET] * 200)
    assert run.health.refusal(run.at) is not None
    run.train(*[QUIET] * 200)
    resumed = Health(RollbackSettings(automatic_max=1, per_steps=300), HEALTH, run.health.to_json())
    assert run.health.refusal(run.at) is resumed.refusal(run.at) is None


def test_steps_since_the_record_was_saved_count_after_a_crash() -> None:
    """A resumed run counts those of its state: one long ago does not send the next rollback further back."""
    run = Trained(RollbackSettings(automatic_max=1, per_steps=300))
    assert isinstance(run.explode(), Retreat)
    run.restore(90)
    saved = run.health.to_json()
    for step, allowed in ((101, False), (1000, True)):
        resumed = Health(RollbackSettings(automatic_max=1, per_steps=300), HEALTH, saved)
        resumed.start("", step)
        assert (resumed.refusal(step) is None) is allowed
        assert resumed.older_than(step) == (None if allowed else 90)


def scattered(steps: int, rise: float = 0.0) -> list[float]:
    """Returns losses that scatter around 1 by a tenth, and rise by `rise` in each step."""
    return [1.0 + rise * n + 0.1 * ((n * 7 % 11) / 5 - 1) for n in range(steps)]


def restore_scattered(run: Trained, at: int) -> None:
    """Goes back to a step at which the losses scattered."""
    window = LossWindow(HEALTH.window)
    for loss in scattered(200):
        window.add(loss)
    run.health.restored(json.dumps(window.state_dict()), at)
    run.health.end_retreat()
    run.at = at


def test_a_slow_rise_rolls_back_once() -> None:
    """Losses of adversaries or of growing targets rise by themselves: the next rise is reported, and never halts."""
    run = Trained(RollbackSettings(automatic_max=1), steps=0)
    assert run.train(*scattered(200)) == []
    (verdict,) = run.train(*scattered(275, rise=0.001))
    assert isinstance(verdict, Retreat)
    assert verdict.trend
    assert "(slow)" in verdict.reason
    assert verdict.batches == ()  # none of them is to blame
    restore_scattered(run, 10)
    run.train(*scattered(100))
    again = run.train(*scattered(600, rise=0.001))
    assert again
    assert {type(each) for each in again} <= {Proceed, AcceptRegime}
    resumed = Trained(RollbackSettings(automatic_max=1), steps=0, saved=run.health.to_json())
    resumed.train(*scattered(200))
    assert [type(each) for each in resumed.train(*scattered(275, rise=0.001))] == [Proceed]
    resumed.train(*scattered(900))
    assert isinstance(resumed.explode(), Retreat), "a jump is no trend"


def test_a_slow_rise_at_the_same_place_is_no_second_one() -> None:
    """Although the level is not stable."""
    run = Trained(steps=0)
    run.train(*scattered(200))
    (verdict,) = run.train(*scattered(275, rise=0.001))
    assert isinstance(verdict, Retreat)
    restore_scattered(run, 200)
    again = run.train(*scattered(460, rise=0.001))
    assert again
    assert {type(each) for each in again} <= {Proceed, AcceptRegime}


def test_a_slow_rise_near_an_explosion_is_a_slow_rise() -> None:
    """It is watched, rolls back once if the budget allows it, and never halts the run."""
    for automatic_max, rolls_back in ((1, False), (2, True)):
        run = Trained(RollbackSettings(automatic_max=automatic_max), steps=0)
        run.train(*scattered(400))
        assert isinstance(run.explode(), Retreat)
        restore_scattered(run, 127)  # so that the rise is noticed a little before the place of the explosion
        verdicts = run.train(*scattered(345, rise=0.001))
        assert isinstance(verdicts[0], Proceed)
        assert [each.trend for each in verdicts if isinstance(each, Retreat)] == [True] * rolls_back
        assert not any(isinstance(each, Halt) for each in verdicts)


def test_validation_losses_that_grow_roll_back_once() -> None:
    """They have no bound: what comes after one rollback is how the job is. Accuracies are judged again each time."""
    for correct, kind in ((0, Proceed), (50, Retreat)):
        run = Trained()
        values = [0.5, 0.5, 0.5, *[50.0] * 3, *[5000.0] * 6]
        verdicts = []
        for at, loss in enumerate(values):
            right = 0 if not correct else 90 if loss < 1 else 30 if loss < 100 else 3
            verdicts.append(run.health.epoch(epoch(right, at=200 + at, loss=loss), rolling_back=False))
            if isinstance(verdicts[-1], Retreat):
                run.health.end_retreat()
        assert isinstance(verdicts[5], Retreat)
        assert verdicts[5].trend is (correct == 0)
        assert kind in {type(each) for each in verdicts[6:]}
        assert not any(isinstance(each, Halt) for each in verdicts)
        assert any(isinstance(each, Retreat) for each in verdicts[6:]) is (kind is Retreat)


@pytest.mark.parametrize(("before", "verdict"), [((LOUD, QUIET, LOUD, QUIET), Retreat), ((QUIET,), Proceed)])
def test_steps_that_are_skipped_after_an_explosion_are_no_ill_data(
    before: tuple[float, ...], verdict: type[Verdict]
) -> None:
    """The parameters are finite, and so is the loss of the last batch that was taken, but they are ill."""
    run = Trained()
    run.train(*before)
    verdicts = [run.health.step(skipped(), rolling_back=False) for _ in range(7)]
    assert verdicts == [Proceed()] * 7
    assert isinstance(run.health.step(skipped(finite=True), rolling_back=False), verdict)


def test_the_budget_comes_back_after_per_steps() -> None:
    """And then the point and the cut of a retreat are those of a first one."""
    run = Trained(RollbackSettings(automatic_max=1, per_steps=300))
    assert isinstance(run.explode(), Retreat)
    run.restore(50)
    run.train(*[QUIET] * 360)
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert (verdict.cut.factor, verdict.older_than) == (0.5, None)


def test_a_run_whose_highest_step_does_not_rise_is_halted() -> None:
    """However large the budget is."""
    run = Trained(RollbackSettings(automatic_max=1000, progress_rollbacks_max=3))
    for _ in range(3):
        assert run.health.refusal(run.at) is None
        run.health.begin_rollback("tamiyo", run.at)
        run.restore(10)
        run.train(*[QUIET] * 90)
    verdict = run.health.refusal(run.at)
    assert verdict is not None
    assert (verdict.trigger, verdict.reason) == (
        Trigger.NO_PROGRESS,
        "3 rollbacks in a row without a step beyond 100",
    )
    run.train(QUIET)
    assert run.health.refusal(run.at) is None


def test_one_budget_serves_every_automatic_origin() -> None:
    """Rollbacks of the controller count for health, and those of health for the controller."""
    run = Trained(RollbackSettings(automatic_max=2))
    run.health.begin_rollback("tamiyo", 100)
    run.restore(100)
    assert isinstance(run.explode(), Retreat)
    run.restore(80)
    verdict = run.health.refusal(run.at)
    assert verdict is not None
    assert verdict.trigger is Trigger.ROLLBACK_BUDGET_SPENT


def test_an_operators_rollback_resets_the_budgets_and_the_highest_step() -> None:
    """The run is in the operator's hands."""
    run = Trained(RollbackSettings(automatic_max=1))
    run.explode()
    run.restore(50)
    assert run.health.refusal(run.at) is not None
    run.restore(20)
    assert run.health.refusal(run.at) is None
    assert run.health.best_step == 20


def test_budgets_survive_a_new_process_and_windows_do_not() -> None:
    """The record is journalled; the windows come with the state."""
    run = Trained(RollbackSettings(automatic_max=1))
    run.explode()
    run.restore(60)
    saved = run.health.unsaved()
    assert saved is not None
    assert run.health.unsaved() is None
    run.train(*[QUIET] * 20)
    assert run.health.unsaved() is None  # progress alone is no reason to write
    again = Health(RollbackSettings(automatic_max=1), HEALTH, saved)
    again.start("", 60)
    assert again.refusal(100) is not None
    assert again.left_out == ((1, 101), (1, 102))
    assert (again.best_step, again.above, again.averages.finite_steps) == (102, None, 0)


@pytest.mark.parametrize("saved", ["", "{", "[]", '{"rollbacks": 3}', '{"loss_level": 2.5, "best_accuracy": 0.5}'])
def test_an_unreadable_or_older_record_is_a_new_one(saved: str) -> None:
    """What an earlier version kept besides has no meaning any more."""
    assert Record.parse(saved) == Record()


def test_the_rollbacks_of_an_earlier_version_count() -> None:
    """It recorded the steps at which they began."""
    run = Trained(RollbackSettings(automatic_max=2), saved='{"rolled_back_at": [20, 90]}')
    assert run.health.refusal(100) is not None
    assert run.health.refusal(1021) is None


def test_without_automatic_rollbacks_an_explosion_is_reported_once() -> None:
    """One event for each episode, not for each step."""
    run = Trained(RollbackSettings(automatic=False))
    reported = run.train(*[LOUD] * 20)
    assert len(reported) == 1
    assert isinstance(reported[0], Proceed)
    assert reported[0].alarm


def test_two_of_eight_losses_make_a_point_suspect() -> None:
    """And the last loss says whether it was above the top."""
    run = Trained()
    assert (run.health.suspect, run.health.above) == (False, False)
    run.train(LOUD)
    assert (run.health.suspect, run.health.above) == (False, True)
    run.train(QUIET, LOUD)
    assert (run.health.suspect, run.health.above) == (True, True)


# -- skipped steps ---------------------------------------------------------------------------------------------------


def test_ill_data_are_skipped_until_they_are_too_many() -> None:
    """Without a rollback, whatever their number; then the run halts, and once more after as many again."""
    run = Trained()
    verdicts = [
        run.health.step(skipped(at=100, finite=True if n % 8 == 7 else None), rolling_back=False) for n in range(512)
    ]
    halts = [(n, verdict.trigger) for n, verdict in enumerate(verdicts) if isinstance(verdict, Halt)]
    assert halts == [(255, Trigger.SKIPPED_DATA_SPENT), (511, Trigger.SKIPPED_DATA_SPENT)]
    assert (run.health.skipped_steps, run.health.skip_streak) == (512, 512)
    run.train(QUIET)
    assert (run.health.skipped_steps, run.health.skip_streak) == (512, 0)


def test_ill_parameters_retreat() -> None:
    """To before the step whose state is ill; the batch of that step is left out, the skipped ones are not to blame."""
    run = Trained()
    verdict = run.health.step(skipped(at=100, finite=False), rolling_back=False)
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.batches) == (100, ((1, 100),))
    off = Trained(RollbackSettings(automatic=False))
    halt = off.health.step(skipped(at=100, finite=False), rolling_back=False)
    assert isinstance(halt, Halt)
    assert halt.trigger is Trigger.PARAMETERS_NOT_FINITE


@pytest.mark.parametrize("judged", [QUIET, None])
def test_a_taken_step_that_leaves_an_ill_state_retreats(judged: float | None) -> None:
    """To before it, with its batches left out; a rollback that is under way undoes it anyway."""
    ill = replace(step(at=101), judged=judged, parameters_finite=False)
    assert Trained().health.step(ill, rolling_back=True) == Proceed()
    verdict = Trained().health.step(ill, rolling_back=False)
    assert isinstance(verdict, Retreat)
    assert verdict.at_or_before < 101
    assert verdict.batches == ((1, 101 if judged else 100),)
    off = Trained(RollbackSettings(automatic=False))
    halt = off.health.step(ill, rolling_back=False)
    assert isinstance(halt, Halt)
    assert halt.trigger is Trigger.PARAMETERS_NOT_FINITE


def test_parameters_that_exploded_before_they_were_not_finite() -> None:
    """The point has to be from before the first loss that exploded, also while a changed task is suspected."""
    run = Trained()
    run.train(LOUD)
    verdict = run.health.step(skipped(at=101, finite=False), rolling_back=False)
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.batches) == (101, ((1, 101),))
    watched = Trained()
    watched.explode()
    watched.restore(95)
    watched.train(QUIET, LOUD, LOUD, LOUD, LOUD, *[QUIET] * 9)
    verdict = watched.health.step(skipped(at=109, finite=False), rolling_back=False)
    assert isinstance(verdict, Retreat)
    assert verdict.evidence_step == 97


def test_an_overflow_of_float16_is_not_counted() -> None:
    """It only lowers the loss scale."""
    run = Trained()
    assert run.health.step(skipped(rescaled=True), rolling_back=False) == Proceed()
    assert (run.health.skipped_steps, run.health.skip_streak) == (0, 0)


def test_a_restore_and_a_resume_forget_the_streak() -> None:
    """An operator who resumes the run accepts the data."""
    run = Trained()
    run.health.step(skipped(), rolling_back=False)
    run.health.forgive_skipped_steps()
    assert (run.health.skip_streak, run.health.skipped_steps) == (0, 1)
    run.health.step(skipped(), rolling_back=False)
    run.restore(50)
    assert run.health.skip_streak == 0


def test_a_seed_is_culled_after_eight_steps_in_a_row() -> None:
    """A step with usable gradients ends the streak; a skipped step does not."""
    dropped = DroppedSeeds()
    sick = StepDone(1, 1, 1.0, 1.0, 8, 0.1, 0.0, 0.0, dropped_seeds=("a",))
    assert [dropped.after(sick) for _ in range(7)] == [[]] * 7
    assert dropped.after(step()) == []
    for _ in range(4):
        assert dropped.after(sick) == []
    dropped.after(skipped())
    assert [dropped.after(sick) for _ in range(5)] == [[], [], [], ["a"], []]


# -- a changed task --------------------------------------------------------------------------------------------------


def test_losses_that_rise_again_at_the_same_place_may_be_a_changed_task() -> None:
    """64 steps are watched; a stable level is accepted, its batches come back and the budget is refunded."""
    run = Trained(RollbackSettings(automatic_max=1))
    assert isinstance(run.explode(), Retreat)
    run.restore(85)
    run.train(*[QUIET] * 15)
    alarm, accepted = run.train(*[LOUD] * 66)
    assert isinstance(alarm, Proceed)
    assert isinstance(accepted, AcceptRegime)
    assert accepted.batches == ((1, 101), (1, 102))
    assert run.train(*[LOUD * 2] * 5) == []  # until the lane has emptied its window
    left_out = [run.health.left_out]
    run.health.regime_begins(announced=False)
    run.health.regime_answered(accepted=True)
    assert [*left_out, run.health.left_out] == [accepted.batches, ()]
    assert run.health.refusal(run.at) is None
    assert run.train(*[LOUD] * 50) == []


def test_an_accepted_task_is_judged_by_what_health_has_done() -> None:
    """The controller's rollbacks neither compound the cut, nor are refunded, nor change which batches come back."""
    run = Trained(RollbackSettings(automatic_max=9))
    run.health.begin_rollback("tamiyo", run.at)
    run.restore(95)
    run.train(*[QUIET] * 5)
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert verdict.cut.factor == 0.5
    run.restore(85)
    run.health.begin_rollback("tamiyo", run.at)
    assert run.health.step(step(LOUD, at=86, place=7), rolling_back=True) == Proceed()
    run.health.step(step(LOUD, at=87, place=8), rolling_back=True)
    run.restore(85)
    run.train(*[QUIET] * 15)
    accepted = run.train(*[LOUD] * 66)[-1]
    assert isinstance(accepted, AcceptRegime)
    assert accepted.batches == ((1, 101), (1, 102))
    run.health.regime_answered(accepted=True)
    assert [rollback.origin for rollback in Record.parse(run.health.to_json()).rollbacks] == ["tamiyo", "tamiyo"]


@pytest.mark.parametrize(("then", "verdict"), [(LOUD, AcceptRegime), (QUIET, None)])
def test_a_refused_acceptance_is_none(then: float, verdict: type[Verdict] | None) -> None:
    """Batches, budget and regimes are as before, as in the lane; the losses are watched on, and accepted later."""
    run = Trained()
    run.explode()
    run.restore(85)
    run.train(*[QUIET] * 15)
    before = Record.parse(run.health.to_json())
    assert isinstance(run.train(*[LOUD] * 66)[-1], AcceptRegime)
    run.health.regime_answered(accepted=False)
    counts = {"best_step": before.best_step, "taken": before.taken}
    assert Record.parse(run.health.to_json()).model_copy(update=counts) == before
    assert run.train(*[then] * 31) == []
    assert [type(found) for found in run.train(then)] == ([verdict] if verdict else [])


def test_losses_that_rise_on_after_a_refused_acceptance_retreat() -> None:
    """They are no longer stable."""
    run = Trained()
    run.explode()
    run.restore(85)
    run.train(*[QUIET] * 15)
    assert isinstance(run.train(*[LOUD] * 66)[-1], AcceptRegime)
    run.health.regime_answered(accepted=False)
    assert isinstance(run.train(*[LOUD * 2**n for n in range(32)])[-1], Retreat)


def test_batches_of_an_operators_rollback_are_not_left_out() -> None:
    """Losses that explode while it waits for the lane are undone, and nothing says that their batches are ill."""
    run = Trained()
    for at in (101, 102, 103):
        run.health.step(step(LOUD, at=at), rolling_back=True)
    run.health.restored("", 50)
    assert (run.health.end_retreat(), run.health.left_out) == ((), ())


def test_a_retreat_without_batches_brings_none_back() -> None:
    """Those of the retreat before it stay left out when a changed task is accepted."""
    run = Trained()
    run.explode()
    run.restore(85)
    run.health.begin_rollback("health", run.at)
    run.restore(85)
    assert Record.parse(run.health.to_json()).retreat_batches == []
    assert run.health.left_out == ((1, 101), (1, 102))


def test_rollbacks_without_an_origin_are_those_of_health() -> None:
    """As an earlier version has recorded them."""
    record = Record.parse('{"rollbacks": [{"begun_at": 5, "restored_step": 2}], "rolled_back_at": [3]}')
    assert [rollback.origin for rollback in record.rollbacks] == ["health", "health"]


def test_a_level_that_keeps_rising_is_no_task() -> None:
    """The second retreat follows, from the evidence that was found first."""
    run = Trained()
    run.explode()
    run.restore(95)
    run.train(QUIET)
    _, verdict = run.train(*[LOUD * 1.1**n for n in range(66)])
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.older_than) == (97, 95)


def test_losses_that_heal_by_themselves_are_left_alone() -> None:
    """While they are watched."""
    run = Trained()
    run.explode()
    run.restore(85)
    assert len(run.train(*[QUIET] * 15, LOUD, LOUD, *[QUIET] * 100)) == 1  # reported


@pytest.mark.parametrize("then", [[LOUD] * 64, [QUIET] * 64])
def test_a_rise_on_data_that_trained_well_before_is_no_task(then: list[float]) -> None:
    """A fault that goes on: when it may be over, the second retreat follows, whatever the losses are by then."""
    run = Trained()
    run.explode()
    run.restore(85)
    alarm, verdict = run.train(*[QUIET] * 5, LOUD, LOUD, *then)
    assert isinstance(alarm, Proceed)
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.at_or_before, verdict.cut.factor) == (91, 84, 0.25)


def test_a_retreat_goes_behind_the_rise() -> None:
    """Losses that rose slowly before they exploded rose from ill parameters."""
    run = Trained()
    run.train(*[1.0005 + n * 1e-5 for n in range(40)])
    verdict = run.explode()
    assert isinstance(verdict, Retreat)
    assert (verdict.evidence_step, verdict.preferred_before) == (141, 89)
    assert verdict.batches == ((1, 141), (1, 142))


def test_an_extreme_loss_whose_step_was_skipped_is_evidence() -> None:
    """Alone it gives no verdict, and it never enters the window; the next one like it is an explosion."""
    run = Trained()
    lone = StepDone(100, 1, LOUD, 1.0, 8, 0.1, 0.0, 0.0, True, batches=range(100, 101), judged=LOUD)
    assert run.health.step(lone, rolling_back=False) == Proceed()
    assert run.train(*[QUIET] * 80) == []
    assert run.health.losses.limit < 2
    assert run.health.step(lone, rolling_back=False) == Proceed()
    (verdict,) = run.train(LOUD)
    assert isinstance(verdict, Retreat)
    assert (1, 100) in verdict.batches


def test_far_from_the_last_retreat_an_explosion_is_one() -> None:
    """Without a watch."""
    run = Trained()
    run.explode()
    run.restore(95)
    run.train(*[QUIET] * 100)
    assert isinstance(run.explode(), Retreat)


def test_after_two_accepted_regimes_explosions_are_only_reported() -> None:
    """The losses of such a run are like that."""
    run = Trained()
    for _ in range(2):
        assert isinstance(run.explode(), Retreat)
        run.restore(run.at - 10)
        accepted = run.train(*[QUIET] * 8, *[LOUD] * 66)[-1]
        assert isinstance(accepted, AcceptRegime)
        run.health.regime_begins(announced=False)
        run.health.regime_answered(accepted=True)
        run.settle()
    (reported,) = run.train(LOUD, LOUD, LOUD)
    assert isinstance(reported, Proceed)


def test_an_announced_task_needs_no_verdict() -> None:
    """The window is empty from the first loss of the new task on."""
    run = Trained()
    run.health.regime_begins(announced=True)
    assert run.train(*[LOUD] * 50) == []


@pytest.mark.parametrize(
    ("losses", "spread", "expected"),
    [
        ([5.0] * 64, 0.0, True),
        ([5.0, 5.0, 5.0, 5.5] * 16, 0.2, True),
        ([5.0, 5.0, 5.0, 5.5] * 16, 0.05, False),
        ([10.0 * 0.95**n for n in range(64)], 0.1, True),  # it is being learned
        ([5.0 * 1.05**n for n in range(64)], 0.1, False),
    ],
)
def test_a_stable_level(losses: list[float], spread: float, expected: bool) -> None:
    """It scatters no more than the losses before did, relative to the level, or falls."""
    assert stable(losses, spread, 1.0) is expected


# -- evaluations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "value", "expected"),
    [
        ([0.9, 0.95], 0.1, False),
        ([0.9, 0.95, 0.92], 0.1, True),
        ([0.97] * 8, 0.9, False),  # their range is zero
        ([0.97] * 8, 0.7, True),
        ([0.97] * 8, math.nan, True),
        ([0.3, 0.5, 0.7, 0.9], 0.1, False),  # they differ more than that
        ([-0.02, -0.01, -0.01], -0.5, True),  # losses
        ([-0.02, -0.01, -0.01], -0.025, False),
    ],
)
def test_a_collapse_is_worse_than_all_by_more_than_their_range(
    before: list[float], value: float, expected: bool
) -> None:
    """And by more than `accuracy_drop`, relative to the best one."""
    assert collapsing(before, value, 0.2) is expected


@pytest.mark.parametrize(("correct", "collapsed"), [((30, 30, 90), False), ((30, 90, 30), False), ((30, 20, 25), True)])
def test_three_collapsed_evaluations_in_a_row_retreat(correct: tuple[int, ...], collapsed: bool) -> None:
    """To a checkpoint from before the first of them; no batch is to blame."""
    run = Trained()
    for at in (10, 20, 30):
        assert run.health.epoch(epoch(90 + at // 10, at=at), rolling_back=False) == Proceed()
    *first, last = (
        run.health.epoch(epoch(each, at=at), rolling_back=False) for each, at in zip(correct, (40, 50, 60), strict=True)
    )
    assert first == [Proceed()] * 2
    assert isinstance(last, Retreat) is collapsed
    if isinstance(last, Retreat):
        assert (last.evidence_step, last.durable, last.batches) == (40, True, ())


def test_a_job_without_accuracies_is_judged_by_its_loss() -> None:
    """Larger losses are worse; the first correct prediction changes to accuracies."""
    run = Trained()
    for at in range(3):
        run.health.epoch(epoch(0, at=at, loss=0.5), rolling_back=False)
    collapsed = [run.health.epoch(epoch(0, at=9, loss=50.0), rolling_back=False) for _ in range(3)]
    assert isinstance(collapsed[-1], Retreat)
    assert collapsed[-1].reason == "3 evaluations in a row are worse than all before: loss 50 after 0.5"
    other = Trained()
    for _ in range(3):
        other.health.epoch(epoch(0, loss=0.5), rolling_back=False)
    assert [other.health.epoch(epoch(50, loss=50.0), rolling_back=False) for _ in range(9)] == [Proceed()] * 9


def test_undone_evaluations_do_not_count() -> None:
    """After a restore, those of later steps are forgotten."""
    run = Trained()
    for at in (10, 20, 30):
        run.health.epoch(epoch(90, at=at), rolling_back=False)
    run.restore(20)
    assert [run.health.epoch(epoch(30, at=at), rolling_back=False) for at in (30, 40, 50)] == [Proceed()] * 3
