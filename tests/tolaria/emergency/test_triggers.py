from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_CONSERVATIVE, EMERGENCY_LEVEL_ELEVATED, EMERGENCY_LEVEL_HALT
from tolaria.emergency import TRIGGERS, EmergencyState, EpochStreak, Phase, Trigger, recovered


def test_every_trigger_has_its_level() -> None:
    """Breaches of budgets elevate, an open breaker is conservative, all else halts."""
    assert set(TRIGGERS) == set(Trigger)
    assert {t for t, level in TRIGGERS.items() if level == EMERGENCY_LEVEL_ELEVATED} == {
        Trigger.BOUNDARY_BREACH,
        Trigger.HOOK_BREACH,
    }
    assert {t for t, level in TRIGGERS.items() if level == EMERGENCY_LEVEL_CONSERVATIVE} == {Trigger.BREAKER_OPEN}
    assert sum(level == EMERGENCY_LEVEL_HALT for level in TRIGGERS.values()) == 4


def test_the_third_failed_epoch_in_a_row_is_a_streak() -> None:
    """A healthy one in between starts anew; a streak is told once for each three."""
    streak, spent = EpochStreak(3), []
    for healthy in (False, False, True, False, False, False, False, False, False):
        streak = streak.after(healthy=healthy)
        spent.append(streak.spent)
    assert spent == [False, False, False, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("phase", "level", "healthy", "cause_stands", "expected"),
    [
        (Phase.ANSWERED, EMERGENCY_LEVEL_CONSERVATIVE, 3, False, True),
        (Phase.OVERDUE, EMERGENCY_LEVEL_ELEVATED, 9, False, True),
        (Phase.ANSWERED, EMERGENCY_LEVEL_CONSERVATIVE, 2, False, False),
        (Phase.ANSWERED, EMERGENCY_LEVEL_CONSERVATIVE, 3, True, False),
        (Phase.ANSWERED, EMERGENCY_LEVEL_HALT, 9, False, False),
        (Phase.CALM, 0, 9, False, False),
    ],
)
def test_when_an_emergency_is_over_by_rule(
    phase: Phase, level: int, healthy: int, cause_stands: bool, expected: bool
) -> None:
    """Below a halt, after enough healthy epochs, and only when its cause is gone."""
    state = EmergencyState(phase, level)  # type: ignore[arg-type]
    assert recovered(state, EpochStreak(3, 0, healthy), recovery_epochs=3, cause_stands=cause_stands) is expected
