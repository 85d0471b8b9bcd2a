from __future__ import annotations

import io
import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from leyline.v1.admin_service_pb2 import ClearEmergencyResponse, GetStatusResponse, Incident, RestorePoint, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, EmergencyLevel, HealthStatus
from leyline.v1.telemetry_pb2 import SystemHealth
from support.fake_admin import DIGEST, restore_points, status_of, two_incidents, whole_run
from tolaria.cli import answers, render
from tolaria.cli.render import PlainLines, live_view, print_status, status_panel

NOW_S = 1_800_000_000


def test_status_rows_hold_every_figure() -> None:
    """Run, progress, losses, boundary, seeds, commands, breakers and metrics each have a row."""
    rows = dict(render.status_rows(status_of(2)))
    assert rows["run"] == "run-1, job digits, running"
    assert rows["progress"] == "epoch 2/3, step 0/45 of it, 45 steps in all, 0 samples/s"
    assert rows["learned"] == "loss 0.5000, validation loss 0.2500, accuracy 92.00%"
    assert rows["boundary"] == "4.2 of 25 ms, p50 4.0, p99 6.5, 0 over budget"
    assert rows["seeds"] == "seed-1 training (conv)"
    assert rows["commands"] == "2 accepted, 1 rejected, 1 rollback"
    assert rows["breakers"] == "all closed"
    assert rows["metrics"] == "http://127.0.0.1:9464/metrics"


def test_starting_run_has_no_figures() -> None:
    """Default zeros of the message are not shown as measurements."""
    rows = dict(render.status_rows(GetStatusResponse(state=RunState.RUN_STATE_STARTING)))
    assert {rows[label] for label in ("learned", "boundary", "tamiyo", "kasmina", "learning rate")} == {"not yet"}
    assert rows["seeds"] == "none"
    assert "breakers" not in rows


def test_status_rows_show_reasons_breakers_emergency_and_health() -> None:
    """These rows appear once their fields are set."""
    status = status_of(2, state=RunState.RUN_STATE_HALTED)
    status.state_reason = "emergency"
    status.conservative_reasons.append("tamiyo breaker")
    status.breakers["tamiyo"] = CircuitBreakerState.CIRCUIT_STATE_HALF_OPEN
    status.emergency_level = EmergencyLevel.EMERGENCY_LEVEL_HALT
    status.health.CopyFrom(SystemHealth(status=HealthStatus.HEALTH_STATUS_CRITICAL, summary="halted"))
    rows = dict(render.status_rows(status))
    assert rows["run"].endswith("halted: emergency")
    assert rows["conservative"] == "tamiyo breaker"
    assert rows["breakers"] == "tamiyo half open"
    assert rows["emergency"] == "halt"
    assert rows["health"] == "critical: halted"


def test_unknown_enum_number_is_shown_as_a_number() -> None:
    """A newer service may send states that this version does not know."""
    assert render.enum_word(RunState.DESCRIPTOR, 99) == "unknown (99)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("two\nlines", "two lines"), ("\x1b[2J\x07wiped", "[2J wiped"), ("  a\t b ", "a b"), ("é…", "é…"), ("", "")],
)
def test_control_characters_become_spaces(text: str, expected: str) -> None:
    """Text of a peer cannot control the terminal."""
    assert render.one_line(text) == expected


def test_long_text_is_cut() -> None:
    """A long answer of a peer does not fill the screen."""
    assert render.one_line("x" * 10_000) == "x" * 199 + "…"


def test_nan_loss_is_shown() -> None:
    """A loss that is not a number is printed as nan."""
    status = status_of(2)
    status.training_loss = math.nan
    assert render.training_figures(status).startswith("loss nan")


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_572_864, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(size_bytes: int, expected: str) -> None:
    """The largest binary unit of which there is at least one."""
    assert render.size(size_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0 s"), (59.9, "59 s"), (60.0, "1 min"), (3599.0, "59 min"), (7300.0, "2 h"), (1e6, "11 d")],
)
def test_durations(seconds: float, expected: str) -> None:
    """Whole units, the largest of which there is at least one."""
    assert render.duration(seconds) == expected


def test_rollbacks_are_shown_once_there_are_any() -> None:
    """A count of zero is shown neither in the table nor in an epoch's line."""
    status = status_of(2)
    assert render.epoch_line(status, 1).endswith("  1 rollback")
    status.rollbacks = 3
    assert dict(render.status_rows(status))["commands"].endswith(", 3 rollbacks")
    status.rollbacks = 0
    assert "rollback" not in render.epoch_line(status, 1) + dict(render.status_rows(status))["commands"]


def test_adjustments_in_force_are_beside_the_rate() -> None:
    """With origin, group and end; of many, the newest ones and the number of the others."""
    status = status_of(2)
    del status.adjustments[:]
    assert dict(render.status_rows(status))["learning rate"] == "host 0.001"
    status.adjustments.add(factor=0.5, origin="rollback", expires_at_step=90)
    status.adjustments.add(value=0.01, origin="operator", group="seed:a")
    row = dict(render.status_rows(status))["learning rate"]
    assert row == "host 0.001; factor 0.5 by rollback until step 90; value 0.01 for seed:a by operator"
    for _ in range(5):
        status.adjustments.add(factor=2.0, origin="tamiyo")
    row = dict(render.status_rows(status))["learning rate"]
    assert row == "host 0.001" + 4 * "; factor 2 by tamiyo" + "; 3 older adjustments"


def _terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard", _environ={})


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_status_without_terminal_is_plain_lines() -> None:
    """No escape sequence, one labelled line for each fact, however long."""
    console = Console(file=io.StringIO(), width=20)
    print_status(status_of(2), console)
    lines = _text(console).splitlines()
    assert "\x1b" not in _text(console)
    assert "seeds          seed-1 training (conv)" in lines
    assert "boundary       4.2 of 25 ms, p50 4.0, p99 6.5, 0 over budget" in lines


def test_status_on_a_terminal_does_not_interpret_markup() -> None:
    """Brackets in the answer of a peer are shown as they are."""
    console = _terminal()
    print_status(status_of(2), console)
    assert "germinated [bold]seed-1" in _text(console)
    assert "\x1b" in _text(console)


def test_live_view_redraws_in_place_on_a_terminal() -> None:
    """Each status replaces the one before: the cursor goes up between them."""
    console = _terminal()
    with live_view(console) as show:
        for status in whole_run():
            show(status)
    assert "tolaria: finished" in _text(console)
    assert "\x1b[1A" in _text(console)


def test_live_view_shows_lines_over_the_status() -> None:
    """They are read again for each status."""
    console, numbers = _terminal(), iter(range(9))
    with live_view(console, lambda: [f"curve {next(numbers)}"]) as show:
        for status in whole_run():
            show(status)
    shown = _text(console)
    assert shown.index("curve 0") < shown.index("tolaria: running") < shown.index("curve 1")


def test_merged_gradients_are_shown_while_there_are_any() -> None:
    """A seed without a row, or never merged, has no figures."""
    status = status_of(2)
    assert "gradients" not in dict(render.status_rows(status))
    status.seeds[0].metrics.update(weight=0.0, share=0.0, conflict_ratio=0.0)
    assert "gradients" not in dict(render.status_rows(status))
    status.seeds[0].metrics.update(weight=0.25, share=0.4, conflict_ratio=0.125)
    rows = dict(render.status_rows(status))
    assert rows["gradients"] == "host weight 1; seed-1 weight 0.25, 40% of the norms, conflicts 12%"


def test_status_panel_shows_bars_figures_and_answers() -> None:
    """Progress of run and epoch, boundary against its budget, and the answers of both peers."""
    console = Console(file=io.StringIO(), width=100)
    status = status_of(2)
    status.epoch_step = 9
    console.print(status_panel(status))
    shown = _text(console)
    for expected in (
        "epoch 2/3",
        "9/45",
        "4.2 of 25 ms",
        "germinate after epoch 1",
        "germinated [bold]seed-1",
        "92.00%",
    ):
        assert expected in shown
    assert "━" in shown


def test_plain_lines_print_each_epoch_once() -> None:
    """An epoch is printed when the next begins or the run finishes; a repeated status prints nothing."""
    file = io.StringIO()
    lines = PlainLines(file)
    for status in whole_run():
        lines.show(status)
        lines.show(status)
    printed = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in printed] == [
        "state running",
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
        "state finished",
    ]
    assert "accuracy 92.00%" in printed[1]
    assert "boundary 4.2 of 25 ms" in printed[1]
    assert "tamiyo: germinate after epoch 1" in printed[1]


def test_plain_lines_print_changes_of_state_with_their_reason() -> None:
    """A pause is printed although no epoch ends."""
    file = io.StringIO()
    lines = PlainLines(file)
    paused_status = status_of(1, state=RunState.RUN_STATE_PAUSED)
    paused_status.state_reason = "lunch"
    for status in (status_of(1), paused_status, paused_status, status_of(1)):
        lines.show(status)
    assert file.getvalue().splitlines() == ["state running", "state paused: lunch", "state running"]


def test_plain_lines_print_an_epoch_again_after_a_rollback() -> None:
    """An epoch that is trained twice is printed twice."""
    file = io.StringIO()
    lines = PlainLines(file)
    for status in (status_of(3), status_of(2), status_of(3)):
        lines.show(status)
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == ["epoch 2/3", "state running", "epoch 2/3"]


def test_restore_point_row() -> None:
    """Age and size have units; the digest is cut."""
    (fast, full) = answers.restore_point_rows(restore_points(NOW_S), now_s=NOW_S + 42)
    assert full == ("full", "45", "1", "2 h", "1.5 MiB", f"{DIGEST[:11]}…", "000000000045-0badcafe", "1", "proven")
    left = RestorePoint(superseded=True, suspect=True, attempt=3)
    assert answers.restore_point_rows([left], now_s=NOW_S)[0][-2:] == ("3", "superseded, suspect")
    assert fast[3] == "42 s"


def test_restore_point_age_is_never_negative_and_may_be_unknown() -> None:
    """A time in the future has age 0; a point without a time has none."""
    future, timeless = RestorePoint(created_at=Timestamp(seconds=NOW_S)), RestorePoint()
    assert [row[3] for row in answers.restore_point_rows([future, timeless], now_s=NOW_S - 60)] == ["0 s", "?"]


def test_incident_shows_digests_only_if_they_differ() -> None:
    """Equal digests are left out; different ones are marked."""
    rollback = two_incidents()[1]
    rollback.details["state_digest"] = "f" * 32
    assert "DIGESTS DIFFER" in answers.incident_rows([rollback])[0][3]


def test_incident_with_an_impossible_time_and_no_reason() -> None:
    """A time beyond the calendar is shown as unknown, and so is a missing reason."""
    (row,) = answers.incident_rows([Incident(occurred_at=Timestamp(seconds=2**60))])
    assert (row[0], row[3]) == ("?", "no reason given")


def test_table_on_a_terminal_does_not_interpret_markup() -> None:
    """Brackets in a reason are shown as they are; the head of the table is bold."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard", _environ={})
    render.print_table(answers.incident_rows(two_incidents()), answers.INCIDENT_COLUMNS, console=console)
    assert isinstance(console.file, io.StringIO)
    assert "[2J[bold]here" in console.file.getvalue()
    assert "\x1b[1m" in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()


def test_status_shows_the_phase_and_what_became_of_earlier_steps() -> None:
    """Each figure in plain words, where there is one; none of these rows on an undisturbed run."""
    status = status_of(2)
    assert not {"phase", "history"} & set(dict(render.status_rows(status)))
    status.phase, status.phase_s = "evaluating", 45.21
    status.rollbacks_by_origin.update({"operator": 1, "health": 2})
    status.attempt, status.best_step, status.skipped_steps, status.newest_proven_step = 3, status.global_step + 5, 4, 0
    rows = dict(render.status_rows(status))
    assert rows["phase"] == "evaluating for 45.2 s"
    assert rows["history"] == (
        f"rollbacks: 2 by health, 1 by operator; attempt 3; highest step {status.best_step}; 4 steps skipped; "
        "newest proven restore point at step 0"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [("12.3456789", "12.35"), ("0.000123456", "0.0001235"), ("1e-07", "1e-07"), ("45", "45"), ("v1.2.3", "v1.2.3")],
)
def test_incidents_show_few_digits(text: str, shown: str) -> None:
    """Numbers with a fraction have four; other texts stay as they are."""
    incident = Incident(reason="slow", details={"latency_ms": text})
    assert answers.incident_rows([incident])[0][-1] == f"slow (latency ms {shown})"


@pytest.mark.parametrize("state", [RunState.RUN_STATE_HALTED, RunState.RUN_STATE_RUNNING])
def test_a_clearance_says_what_is_left_to_do(state: RunState.ValueType, capsys: pytest.CaptureFixture[str]) -> None:
    """Training that stays halted needs a resume."""
    answers.show_clearance(ClearEmergencyResponse(global_step=7, state=state))
    output = capsys.readouterr().out
    assert output.startswith("clear: took effect at step 7")
    assert ("tolaria resume" in output) is (state == RunState.RUN_STATE_HALTED)


def test_a_run_that_is_counted_in_steps_shows_the_steps_and_the_time_that_is_left() -> None:
    """In the status, the live view and the lines of epochs; without an evaluation there is none to wait for."""
    status = status_of(2)
    status.epochs, status.steps, status.remaining_s, status.unevaluated = 0, 900, 150.0, True
    rows = dict(render.status_rows(status))
    expected = "step 45/900 in all, epoch 2, step 0/45 of it, 0 samples/s, about 2 min left"
    assert (rows["progress"], rows["learned"]) == (expected, "loss 0.5000")
    assert render.epoch_line(status, 1).startswith("epoch 1  step 45/900  loss 0.5000")
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(status_panel(status))
    assert "step 45/900" in console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above


def test_skips_and_the_origin_of_a_branch_are_shown() -> None:
    """Where there are any."""
    status = status_of(2)
    assert "branch of" not in dict(render.status_rows(status))
    status.data_skips = 2
    status.branched_from.run_id, status.branched_from.global_step = "first", 40
    status.branched_from.checkpoint_id, status.branched_from.directory = "c1", "/runs/a"
    rows = dict(render.status_rows(status))
    assert rows["branch of"] == "run first at step 40 (checkpoint c1 in /runs/a)"
    assert "data left out on request: 2 (tolaria skip --list)" in rows["history"]


@pytest.mark.parametrize(
    ("per_s", "shown"), [(0.0, "0"), (0.034, "0.034"), (4.26, "4.3"), (12.6, "13"), (2762.3, "2762")]
)
def test_a_low_throughput_is_not_shown_as_none(per_s: float, shown: str) -> None:
    """A large model has a sample in seconds."""
    status = status_of(2)
    status.samples_per_s = per_s
    assert dict(render.status_rows(status))["progress"].endswith(f", {shown} samples/s")
