from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.values.loss_window import Averages, LossWindow, relative_spread, rise_begins

SIZE = 256
LEVEL = [1.1 - 0.1 * n / 255 for n in range(SIZE)]
"""A full window: median 1.05, top 1.1, limit 1.15."""


def window(losses: list[float] = LEVEL, *, size: int = SIZE) -> LossWindow:
    """Returns a window with these losses."""
    made = LossWindow(size)
    for loss in losses:
        made.add(loss)
    return made


def alarms(made: LossWindow, losses: list[float]) -> list[str]:
    """Adds losses; returns the kind of each alarm, or an empty string."""
    return [alarm.kind if (alarm := made.add(loss)) else "" for loss in losses]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.2], ""),
        ([1e9], ""),  # one bad batch
        ([1e9, 1.0, 1e9, 1.0, 1e9, 1.0], ""),
        ([1.2] * 4, ""),
        ([1.2] * 5, "fast"),
        ([1.2, 1.2, 1.0, 1.2, 1.0, 1.2, 1.0, 1.2], "fast"),
        ([1.2, 1.0, 1.0, 1.0, 1.2, 1.2, 1.2, 1.0, 1.2], ""),  # the first of five is the ninth last
        ([1.14] * 31, ""),  # above the top, below the limit
        ([6.1, 6.1], "certain"),  # beyond 1.1 + 100 x 0.0498
        ([5.9, 5.9], ""),
        ([1e9, 1.0, 1e9], ""),
    ],
)
def test_an_explosion_is_sustained_or_certain(losses: list[float], expected: str) -> None:
    """Five of the last eight losses above the limit, or two in a row far above it; a single loss is none."""
    assert alarms(window(), losses)[-1] == expected


def test_the_evidence_is_counted_back_from_the_newest() -> None:
    """The losses above the limit, oldest first."""
    made = window()
    found = [made.add(loss) for loss in (1.2, 1.2, 1.0, 1.2, 1.0, 1.2, 1.0, 1.2)][-1]
    assert found is not None
    assert found.evidence == (7, 6, 4, 2, 0)
    assert found.limit == pytest.approx(1.15, abs=0.01)


def test_losses_that_led_to_a_certain_explosion_are_its_onset() -> None:
    """From the first one above the limit on, one whose step was skipped among them; eight quiet ones end it."""
    made = window([1.0] * 40)
    for loss in (3.0, *[1.0] * 8):
        assert made.add(loss) is None
    made.pass_over(50.0)
    for loss in (60.0, 1.0, 70.0, 1e6):
        assert made.add(loss) is None
    found = made.add(1e6)
    assert found is not None
    assert (found.kind, found.evidence, found.onset) == ("certain", (1, 0), (5, 4, 3, 2))


def test_directly_after_a_skipped_step_others_are_extreme_too() -> None:
    """Not after one that was trained with, which may have changed the parameters."""
    made = window()
    assert not made.extreme_again(1e6)
    assert made.extreme(1e6)
    made.pass_over(1e6)
    assert not made.extreme(1e6)
    assert made.extreme_again(1e6)
    assert not made.extreme_again(1.2)
    made.add(1e6)
    assert not made.extreme_again(1e6)


def test_until_the_window_is_full_only_a_certain_explosion_is_one() -> None:
    """The spread is at least the magnitude of the top then."""
    assert alarms(window(LEVEL[:255]), [2.0] * 8) == [""] * 8
    assert alarms(window([1.0] * 16), [100.0, 100.0]) == ["", ""]  # 1 + 100 x 1 is the limit
    assert alarms(window([1.0] * 16), [102.0, 102.0]) == ["", "certain"]


def test_the_first_losses_are_not_judged() -> None:
    """The first one may be a thousandth of the others by chance."""
    assert alarms(LossWindow(SIZE), [0.001, *[5.0] * 300]) == [""] * 301
    assert alarms(window([1.0] * 15), [1000.0, 1000.0]) == [""] * 2


def test_a_slow_divergence_is_measured_by_the_best_window() -> None:
    """Losses that rise so slowly that they enter the window are found within 32 once they exceed the best one's."""
    made = window()
    rising = [1.05 * 1.004**n for n in range(500)]
    kinds = alarms(made, rising)
    first = next(n for n, kind in enumerate(kinds) if kind)
    assert kinds[first] in {"slow", "fast"}
    assert rising[first] < 1.4


@pytest.mark.parametrize(("between", "above"), [(63, True), (64, False)])
def test_a_loss_above_the_top_enters_64_losses_later(between: int, above: bool) -> None:
    """Until then it does not raise the top."""
    made = window()
    for loss in (3.0, *[1.05] * between, 2.9):
        made.add(loss)
    assert made.above is above


@pytest.mark.parametrize(("scale", "offset"), [(1.0, -10.0), (1e-6, 0.0), (1e6, 0.0), (1.0, -1.05)])
def test_the_rule_needs_no_sign_or_scale(scale: float, offset: float) -> None:
    """Negative, tiny, huge and near-zero losses give the verdicts of positive ones."""
    made = window([scale * (loss + offset) for loss in LEVEL])
    assert alarms(made, [scale * (1.13 + offset)] * 31) == [""] * 31
    assert alarms(made, [scale * (1.3 + offset)] * 5)[-1] == "fast"


def test_near_zero_the_first_losses_of_the_run_give_the_scale() -> None:
    """A loss that has become zero may scatter by a thousandth of what it was."""
    made = window([2.0] * 64 + [0.0] * 400)
    assert alarms(made, [0.0019] * 8) == [""] * 8
    assert alarms(made, [0.0041] * 5)[-1] == "fast"


def test_two_of_the_last_eight_losses_make_the_state_suspect() -> None:
    """Above the limit, not only above the top."""
    made = window()
    for loss, suspect in ((1.2, False), (1.0, False), (1.12, False), (1.2, True), (1.0, True)):
        made.add(loss)
        assert made.suspect is suspect
    for _ in range(8):
        made.add(1.0)
    assert not made.suspect
    assert not LossWindow(SIZE).suspect


def test_a_new_regime_is_judged_by_its_own_losses() -> None:
    """Announced, the window is empty; accepted, it holds the losses that waited to enter."""
    made = window()
    made.begin_regime(keep_waiting=False)
    assert alarms(made, [50.0] * 40) == [""] * 40
    made = window()
    for _ in range(40):
        made.add(50.0)
    made.begin_regime(keep_waiting=True)
    assert alarms(made, [50.0] * 40) == [""] * 40
    assert alarms(made, [5100.0, 5100.0]) == ["", "certain"]


@settings(max_examples=30)
@given(losses=st.lists(st.floats(-1e300, 1e300), max_size=200), more=st.lists(st.floats(-1e9, 1e9), max_size=60))
def test_a_saved_window_continues_as_the_same(losses: list[float], more: list[float]) -> None:
    """Also through JSON: verdicts, averages and the state of both are equal from then on."""
    ours, theirs = LossWindow(16), LossWindow(16)
    for loss in losses:
        ours.add(loss)
        ours.note(loss / 1e200, 1.0)
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    assert theirs.state_dict() == ours.state_dict()
    assert (theirs.averages, theirs.above) == (ours.averages, ours.above)
    assert [ours.add(loss) for loss in more] == [theirs.add(loss) for loss in more]
    assert theirs.state_dict() == ours.state_dict()


def test_an_empty_window_has_the_empty_state() -> None:
    """So that states from before there were windows can be loaded, which also empties a window."""
    assert LossWindow(SIZE).state_dict() == {}
    made = window()
    made.load_state_dict({})
    assert made.state_dict() == {}
    with pytest.raises(KeyError):
        made.load_state_dict({"count": 3})


def test_another_size_takes_effect_with_the_next_loss() -> None:
    """The state is what was saved until then, so that its digest is."""
    small = LossWindow(16)
    small.load_state_dict(window().state_dict())
    assert small.state_dict() == window().state_dict()
    small.add(1.0)
    assert small.full
    assert len(str(small.state_dict()["window"])) < len(str(window().state_dict()["window"]))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_heavy_tails_do_not_raise_an_alarm(seed: int) -> None:
    """Losses of a converged run with small batches, log-normal over three decades, and rare ones far above."""
    generator = random.Random(seed)
    losses = [generator.lognormvariate(-4.0, 1.5) for _ in range(2000)]
    assert [kind for kind in alarms(LossWindow(SIZE), losses) if kind] == []


def test_averages_start_at_the_first_step_and_follow() -> None:
    """The first finite step sets the averages; later ones pull them a twentieth of the way."""
    averages = Averages().after(2.0, 10.0)
    assert averages == Averages(2.0, 0.0, 10.0, 0.0, 0.0, 1)
    averages = averages.after(4.0, 10.0)
    assert averages.loss == pytest.approx(2.1)
    assert (averages.loss_delta, averages.finite_steps) == (2.0, 2)
    assert averages.loss_variance == pytest.approx(0.95 * 0.05 * 4.0)


def test_the_relative_spread_of_a_level_near_zero_is_bounded_by_the_scale() -> None:
    """A thousandth of the scale replaces a smaller magnitude."""
    assert relative_spread([1.0, 1.0, 3.0], 100.0) == 2.0
    assert relative_spread([0.0, 0.0, 0.1], 100.0) == pytest.approx(1.0)


def test_a_single_loss_far_above_the_top_is_extreme() -> None:
    """The next one in a row is not, nor are those of a task whose losses are often like that."""
    window = LossWindow(32)
    for number in range(40):
        assert not window.extreme(1e9 if number < 16 else 1.0)
        window.add(1.1 if number % 4 == 0 else 1.0)
    assert not window.extreme(3.0)
    assert window.extreme(4.0)
    window.pass_over(4.0)
    assert not window.extreme(4.0)
    for _ in range(2):
        window.add(1.0)
        assert window.extreme(4.0)
        window.pass_over(4.0)
    window.add(1.0)
    assert not window.extreme(4.0)
    restored = LossWindow(32)
    restored.load_state_dict(window.state_dict())
    assert not restored.extreme(4.0)
    for _ in range(64):
        window.add(1.0)
    assert window.extreme(4.0)


@pytest.mark.parametrize(
    ("losses", "first", "begin"),
    [
        ([1.0] * 20 + [9.0] * 5, 20, 20),
        ([1.0] * 20 + [2.0] * 30 + [9.0], 50, 23),
        ([2.0] * 12, 10, 7),
        ([2.0] * 3, 2, 2),
    ],
)
def test_the_beginning_of_a_rise(losses: list[float], first: int, begin: int) -> None:
    """It is where the median of eight losses was last within the level."""
    assert rise_begins(losses, first, 1.0) == begin
