from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_HALF_OPEN, CIRCUIT_STATE_OPEN
from tolaria.errors import IllegalTransitionError
from tolaria.resilience.conservative import (
    EMERGENCY,
    OPERATOR,
    ConservativeMode,
    EndCondition,
    ModeChange,
    Reason,
    ReasonEvent,
    active_after,
    breaker_open,
    epoch_failed,
)

TAMIYO, FAILED = breaker_open("tamiyo"), epoch_failed("non_finite")
REASONS = (TAMIYO, breaker_open("kasmina"), FAILED, epoch_failed("peer_failure"), EMERGENCY, OPERATOR)


CAUSED, ENDED, SERVED, FORCED = (
    ReasonEvent.CAUSED,
    ReasonEvent.CAUSE_ENDED,
    ReasonEvent.EPOCHS_SERVED,
    ReasonEvent.FORCED_OFF,
)

# Whether a reason is active after each event (columns: from active, from inactive); None: illegal.
AFTER: dict[tuple[EndCondition, ReasonEvent], tuple[bool | None, bool | None]] = {
    (EndCondition.BREAKER_CLOSES, CAUSED): (True, True),
    (EndCondition.BREAKER_CLOSES, ENDED): (False, None),
    (EndCondition.BREAKER_CLOSES, SERVED): (None, None),
    (EndCondition.BREAKER_CLOSES, FORCED): (True, False),
    (EndCondition.EMERGENCY_CLEARED, CAUSED): (True, True),
    (EndCondition.EMERGENCY_CLEARED, ENDED): (False, None),
    (EndCondition.EMERGENCY_CLEARED, SERVED): (None, None),
    (EndCondition.EMERGENCY_CLEARED, FORCED): (True, False),
    (EndCondition.HEALTHY_EPOCHS, CAUSED): (True, True),
    (EndCondition.HEALTHY_EPOCHS, ENDED): (None, None),
    (EndCondition.HEALTHY_EPOCHS, SERVED): (False, None),
    (EndCondition.HEALTHY_EPOCHS, FORCED): (False, False),
    (EndCondition.OPERATOR, CAUSED): (True, True),
    (EndCondition.OPERATOR, ENDED): (False, None),
    (EndCondition.OPERATOR, SERVED): (None, None),
    (EndCondition.OPERATOR, FORCED): (False, False),
}


class Changes:
    """Records the changes of a mode."""

    def __init__(self) -> None:
        self.seen: list[ModeChange] = []

    def mode(self, recovery_epochs: int = 2) -> ConservativeMode:
        return ConservativeMode(recovery_epochs=recovery_epochs, on_change=self.seen.append)


@pytest.mark.parametrize(
    ("condition", "event", "active"), [(*key, active) for key in AFTER for active in (True, False)]
)
def test_transition_of_each_kind_of_reason(condition: EndCondition, event: ReasonEvent, active: bool) -> None:
    """A transition that is not listed raises."""
    reason, after = Reason("x", condition), AFTER[condition, event][0 if active else 1]
    if after is None:
        with pytest.raises(IllegalTransitionError, match=event.name):
            active_after(reason, event, active=active)
    else:
        assert active_after(reason, event, active=active) is after


def test_table_covers_every_kind_and_event() -> None:
    """Each kind of reason is tested with each event."""
    assert set(AFTER) == set(itertools.product(EndCondition, ReasonEvent))


def test_mode_is_on_while_a_reason_is_active() -> None:
    """The first reason turns it on, the end of the last one off; each change reports the difference."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(TAMIYO)
    mode.enter(OPERATOR)
    mode.leave(TAMIYO)
    assert (mode.on, mode.reasons) == (True, ("operator",))
    mode.leave(OPERATOR)
    assert not mode.on
    assert changes.seen == [
        ModeChange(True, False, ("breaker_open:tamiyo",), ("breaker_open:tamiyo",), ()),
        ModeChange(True, True, ("breaker_open:tamiyo", "operator"), ("operator",), ()),
        ModeChange(True, True, ("operator",), (), ("breaker_open:tamiyo",)),
        ModeChange(False, True, (), (), ("operator",)),
    ]


def test_entering_an_active_reason_is_no_change() -> None:
    """`on_change` is called for differences only."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(EMERGENCY)
    mode.enter(EMERGENCY)
    assert len(changes.seen) == 1


@pytest.mark.parametrize("reason", [TAMIYO, EMERGENCY, OPERATOR, FAILED])
def test_leaving_an_inactive_reason_raises(reason: Reason) -> None:
    """The mode is unchanged, and `on_change` is not called."""
    changes = Changes()
    mode = changes.mode()
    mode.enter(epoch_failed("boundary_breach"))
    with pytest.raises(IllegalTransitionError):
        mode.leave(reason)
    assert (mode.reasons, len(changes.seen)) == (("epoch_failed:boundary_breach",), 1)


def test_consecutive_healthy_epochs_end_the_reason_of_a_failed_epoch() -> None:
    """A further failure, or entering the reason again, resets the count."""
    mode = Changes().mode(recovery_epochs=2)
    mode.enter(FAILED)
    mode.healthy_epoch()
    mode.failed_epoch()
    mode.healthy_epoch()
    mode.enter(FAILED)
    mode.healthy_epoch()
    assert mode.on
    mode.healthy_epoch()
    assert not mode.on


def test_healthy_epochs_end_no_other_reason() -> None:
    """Reasons of breakers, emergencies and operators do not end by time."""
    mode = Changes().mode(recovery_epochs=1)
    for reason in (TAMIYO, EMERGENCY, OPERATOR, FAILED):
        mode.enter(reason)
    for _ in range(5):
        mode.healthy_epoch()
    assert mode.reasons == ("breaker_open:tamiyo", "emergency", "operator")


def test_force_off_keeps_reasons_whose_cause_persists() -> None:
    """Open breakers and an emergency remain, all other reasons end."""
    mode = Changes().mode()
    for reason in REASONS:
        mode.enter(reason)
    mode.force_off()
    assert mode.reasons == ("breaker_open:tamiyo", "breaker_open:kasmina", "emergency")
    mode.force_on()
    assert "operator" in mode.reasons


def test_trial_of_a_half_open_breaker_is_permitted() -> None:
    """Without it the breaker, and with it the mode, would never recover."""
    mode = Changes().mode()
    assert mode.permits_call("tamiyo", CIRCUIT_STATE_OPEN)  # off: the breaker decides
    mode.enter(TAMIYO)
    mode.enter(EMERGENCY)
    assert mode.permits_call("tamiyo", CIRCUIT_STATE_HALF_OPEN)
    assert not mode.permits_call("tamiyo", CIRCUIT_STATE_CLOSED)
    assert not mode.permits_call("kasmina", CIRCUIT_STATE_HALF_OPEN)
    mode.force_on()
    assert not mode.permits_call("tamiyo", CIRCUIT_STATE_HALF_OPEN)


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "healthy", "failed", "on", "off"]), st.sampled_from(REASONS)))
)
def test_mode_agrees_with_a_model_after_any_sequence(steps: list[tuple[str, Reason]]) -> None:
    """The model is a set of reasons; the reported differences add up to it."""
    changes = Changes()
    mode, model, epochs = changes.mode(recovery_epochs=2), set[Reason](), dict[Reason, int]()
    for step, reason in steps:
        if step == "enter":
            mode.enter(reason)
            model.add(reason)
            epochs[reason] = 0
        elif step == "leave" and (reason not in model or reason.ended_by is EndCondition.HEALTHY_EPOCHS):
            with pytest.raises(IllegalTransitionError):
                mode.leave(reason)
        elif step == "leave":
            mode.leave(reason)
            model.discard(reason)
        elif step == "healthy":
            mode.healthy_epoch()
            epochs = {r: n + 1 for r, n in epochs.items()}
            model = {r for r in model if r.ended_by is not EndCondition.HEALTHY_EPOCHS or epochs[r] < 2}
        elif step == "failed":
            mode.failed_epoch()
            epochs = dict.fromkeys(epochs, 0)
        elif step == "on":
            mode.force_on()
            model.add(OPERATOR)
        else:
            mode.force_off()
            model = {r for r in model if r == EMERGENCY or r.name.startswith("breaker")}
        assert set(mode.reasons) == {r.name for r in model}
    reported = set[str]()
    for change in changes.seen:
        assert change.was_on == bool(reported)
        reported = (reported | set(change.entered)) - set(change.left)
        assert set(change.reasons) == reported
    assert reported == set(mode.reasons)


# Whether a reason is active after each method (columns: from active, from inactive); None: illegal.
AFTER_METHOD: dict[tuple[str, EndCondition], tuple[bool | None, bool | None]] = {
    **{("enter", condition): (True, True) for condition in EndCondition},
    **{
        ("leave", condition): (False, None)
        for condition in EndCondition
        if condition is not EndCondition.HEALTHY_EPOCHS
    },
    ("leave", EndCondition.HEALTHY_EPOCHS): (None, None),
    **{
        ("healthy", condition): (True, False)
        for condition in EndCondition
        if condition is not EndCondition.HEALTHY_EPOCHS
    },
    ("healthy", EndCondition.HEALTHY_EPOCHS): (False, False),
    **{("failed", condition): (True, False) for condition in EndCondition},
    ("off", EndCondition.BREAKER_CLOSES): (True, False),
    ("off", EndCondition.EMERGENCY_CLEARED): (True, False),
    ("off", EndCondition.OPERATOR): (False, False),
    ("off", EndCondition.HEALTHY_EPOCHS): (False, False),
}


@pytest.mark.parametrize(
    ("method", "condition", "active"), [(*key, active) for key in AFTER_METHOD for active in (True, False)]
)
def test_method_with_each_kind_of_reason(method: str, condition: EndCondition, active: bool) -> None:
    """Reasons change as in the table above; an illegal call raises and changes nothing."""
    changes, reason = Changes(), Reason("x", condition)
    mode = changes.mode(recovery_epochs=1)
    if active:
        mode.enter(reason)
    changes.seen.clear()
    after = AFTER_METHOD[method, condition][0 if active else 1]
    if method == "enter":
        mode.enter(reason)
    elif after is None:
        with pytest.raises(IllegalTransitionError):
            mode.leave(reason)
    elif method == "leave":
        mode.leave(reason)
    else:
        {"healthy": mode.healthy_epoch, "failed": mode.failed_epoch, "off": mode.force_off}[method]()
    expected = active if after is None else after
    assert mode.reasons == (("x",) if expected else ())
    assert len(changes.seen) == (expected != active)
