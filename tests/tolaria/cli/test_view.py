from __future__ import annotations

import io

from rich.console import Console

from leyline.v1.admin_service_pb2 import RunState
from support.fake_admin import status_of, whole_run
from tolaria.cli.view import PlainLines, live_view, panel, print_status


def _terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard", _environ={})


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_status_without_terminal_is_plain_lines() -> None:
    """No escape sequence, one labelled line for each fact, however long."""
    console = Console(file=io.StringIO(), width=20)
    print_status(console, status_of(2))
    lines = _text(console).splitlines()
    assert "\x1b" not in _text(console)
    assert "seeds          seed-1 training (conv)" in lines
    assert "boundary       4.2 of 25 ms, p50 4.0, p99 6.5, 0 over budget" in lines


def test_status_on_a_terminal_shows_a_peer_s_brackets_as_they_are() -> None:
    """Words of a peer are no markup."""
    console = _terminal()
    print_status(console, status_of(2))
    assert "germinated [bold]seed-1" in _text(console)
    assert "\x1b" in _text(console)


def test_live_view_draws_in_place_on_a_terminal() -> None:
    """Each status replaces the one before: the cursor goes up between them."""
    console = _terminal()
    with live_view(console) as show:
        for status in whole_run():
            show(status)
    assert "tolaria: finished" in _text(console)
    assert "\x1b[1A" in _text(console)


def test_panel_holds_bars_figures_and_answers() -> None:
    """Progress of run and epoch, boundary against its budget, both peers' words."""
    console = Console(file=io.StringIO(), width=100)
    status = status_of(2)
    status.epoch_step = 9
    console.print(panel(status))
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


def test_plain_lines_tell_each_epoch_once() -> None:
    """An epoch is told when the next has begun or the run is over, and repeats say nothing."""
    file = io.StringIO()
    lines = PlainLines(file)
    for status in whole_run():
        lines.show(status)
        lines.show(status)
    told = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in told] == [
        "state running",
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
        "state finished",
    ]
    assert "accuracy 92.00%" in told[1]
    assert "boundary 4.2 of 25 ms" in told[1]
    assert "tamiyo: germinate after epoch 1" in told[1]


def test_plain_lines_tell_changes_of_state_with_their_reason() -> None:
    """A pause shows although no epoch ends."""
    file = io.StringIO()
    lines = PlainLines(file)
    held = status_of(1, state=RunState.RUN_STATE_PAUSED)
    held.state_reason = "lunch"
    for status in (status_of(1), held, held, status_of(1)):
        lines.show(status)
    assert file.getvalue().splitlines() == ["state running", "state paused: lunch", "state running"]


def test_plain_lines_tell_an_epoch_again_after_a_rollback() -> None:
    """What is trained a second time is told a second time."""
    file = io.StringIO()
    lines = PlainLines(file)
    for status in (status_of(3), status_of(2), status_of(3)):
        lines.show(status)
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == ["epoch 2/3", "state running", "epoch 2/3"]
