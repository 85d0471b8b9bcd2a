from __future__ import annotations

import math

import pytest

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, EmergencyLevel, HealthStatus
from leyline.v1.telemetry_pb2 import SystemHealth
from support.fake_admin import status_of
from tolaria.cli import words


def test_rows_answer_what_an_operator_asks() -> None:
    """Every figure of the view has a row."""
    rows = dict(words.rows(status_of(2)))
    assert rows["run"] == "run-1, job digits, running"
    assert rows["progress"] == "epoch 2/3, step 0/45 of it, 45 steps in all, 0 samples/s"
    assert rows["learned"] == "loss 0.5000, validation loss 0.2500, accuracy 92.00%"
    assert rows["boundary"] == "4.2 of 25 ms, p50 4.0, p99 6.5, 0 over budget"
    assert rows["seeds"] == "seed-1 training (conv)"
    assert rows["commands"] == "2 accepted, 1 rejected, 1 rollback"
    assert rows["breakers"] == "all closed"
    assert rows["metrics"] == "http://127.0.0.1:9464/metrics"


def test_a_run_that_has_not_begun_has_no_figures() -> None:
    """The contract's zeros are not shown as measurements."""
    rows = dict(words.rows(GetStatusResponse(state=RunState.RUN_STATE_STARTING)))
    assert {rows[label] for label in ("learned", "boundary", "tamiyo", "kasmina", "learning rate")} == {"not yet"}
    assert rows["seeds"] == "none"
    assert "breakers" not in rows


def test_trouble_is_in_the_rows() -> None:
    """Reasons, open breakers, emergency and health show once they exist."""
    status = status_of(2, state=RunState.RUN_STATE_HALTED)
    status.state_reason = "emergency"
    status.conservative_reasons.append("tamiyo breaker")
    status.breakers["tamiyo"] = CircuitBreakerState.CIRCUIT_STATE_HALF_OPEN
    status.emergency_level = EmergencyLevel.EMERGENCY_LEVEL_HALT
    status.health.CopyFrom(SystemHealth(status=HealthStatus.HEALTH_STATUS_CRITICAL, summary="halted"))
    rows = dict(words.rows(status))
    assert rows["run"].endswith("halted: emergency")
    assert rows["conservative"] == "tamiyo breaker"
    assert rows["breakers"] == "tamiyo half open"
    assert rows["emergency"] == "halt"
    assert rows["health"] == "critical: halted"


def test_unknown_enum_numbers_stay_readable() -> None:
    """A newer service may send states that this version does not know."""
    assert words.state_word(99) == "unknown (99)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("two\nlines", "two lines"), ("\x1b[2J\x07wiped", "[2J wiped"), ("  a\t b ", "a b"), ("é…", "é…"), ("", "")],
)
def test_foreign_text_cannot_act_on_a_terminal(text: str, expected: str) -> None:
    """Control characters become spaces."""
    assert words.one_line(text) == expected


def test_foreign_text_is_bounded() -> None:
    """A peer's endless answer does not fill the screen."""
    assert words.one_line("x" * 10_000) == "x" * 199 + "…"


def test_not_a_number_is_shown_as_it_is() -> None:
    """A diverged loss is news, not a failure of the view."""
    status = status_of(2)
    status.training_loss = math.nan
    assert words.learned(status).startswith("loss nan")


@pytest.mark.parametrize(
    ("size_bytes", "told"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(size_bytes: int, told: str) -> None:
    """The largest unit that leaves a whole number before the point."""
    assert words.size(size_bytes) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0, "0 s"), (59.9, "59 s"), (60.0, "1 min"), (3599.0, "59 min"), (7300.0, "2 h"), (1e6, "11 d")],
)
def test_durations(seconds: float, told: str) -> None:
    """Whole units, the largest that fits."""
    assert words.duration(seconds) == told


def test_rollbacks_are_told_once_there_are_any() -> None:
    """A run that never went back is not said to have gone back zero times, in the table as in an epoch's line."""
    status = status_of(2)
    assert words.epoch_line(status, 1).endswith("  1 rollback")
    status.rollbacks = 3
    assert dict(words.rows(status))["commands"].endswith(", 3 rollbacks")
    status.rollbacks = 0
    assert "rollback" not in words.epoch_line(status, 1) + dict(words.rows(status))["commands"]
