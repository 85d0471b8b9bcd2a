from __future__ import annotations

import json
import threading
from pathlib import Path

from typer.testing import CliRunner

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_CONSERVATIVE, ROLLBACK_TIER_FAST
from tolaria.cli.commands import app
from tolaria.signals import RollbackState, SignalBoard

runner = CliRunner()


def test_raise_show_and_clear_work_without_a_service(tmp_path: Path) -> None:
    """A raised signal is shown with its origin, and `clear` clears it for every participant."""
    path = str(tmp_path / "board")
    with SignalBoard.create(Path(path), "run-1") as board:
        raised = runner.invoke(app, ["signals", "raise", "conservative", "--reason", "smell", "--board", path])
        assert raised.exit_code == 0, raised.output
        (shown,) = json.loads(runner.invoke(app, ["signals", "show", "--board", path]).stdout)["standing"]
        assert shown == {
            "level": "conservative",
            "origin": "operator",
            "reason": "smell",
            "signal_id": json.loads(raised.stdout)["signal_id"],
        }
        effective = board.effective()
        assert effective is not None
        assert effective.level == EMERGENCY_LEVEL_CONSERVATIVE
        assert runner.invoke(app, ["signals", "clear", "--board", path]).exit_code == 0
        assert board.effective() is None


def test_show_prints_the_rollback(tmp_path: Path) -> None:
    """State, id, target, tier and times of the rollback slot; an idle slot has zeros."""
    path = str(tmp_path / "board")
    with SignalBoard.create(Path(path), "run-1", clock=lambda: 5) as board:
        shown = json.loads(runner.invoke(app, ["signals", "show", "--board", path]).stdout)
        assert set(shown) == {"run_id", "standing", "acknowledged", "rollback"}
        assert (shown["rollback"]["state"], shown["rollback"]["changed_ns"]) == ("idle", 0)
        board.claim_rollback().write(
            RollbackState.PREPARE, rollback_id="r-1", target_step=70, deadline_ns=9, tier=ROLLBACK_TIER_FAST
        )
        shown = json.loads(runner.invoke(app, ["signals", "show", "--board", path]).stdout)
    assert shown["rollback"] == {
        "state": "prepare",
        "rollback_id": "r-1",
        "target_step": 70,
        "tier": "fast",
        "deadline_ns": 9,
        "changed_ns": 5,
    }


def test_watch_prints_each_change_until_the_board_is_removed(tmp_path: Path) -> None:
    """The present contents are one line; removing the board ends the command."""
    path = tmp_path / "board"
    board = SignalBoard.create(Path(path), "run-1")
    me = board.claim("tolaria")
    signal_id = me.raise_level(EMERGENCY_LEVEL_CONSERVATIVE, "smell")
    closing = threading.Timer(3.0, lambda: board.close(unlink=True))  # the command has attached by then
    closing.start()
    shown = runner.invoke(app, ["signals", "watch", "--board", str(path)])
    closing.join()
    assert shown.exit_code == 0, shown.output
    (line,) = shown.stdout.splitlines()
    assert json.loads(line)["standing"][0]["signal_id"] == signal_id


def test_missing_board_is_reported(tmp_path: Path) -> None:
    """One line with the reason, no traceback."""
    shown = runner.invoke(app, ["signals", "show", "--board", str(tmp_path / "none")])
    assert shown.exit_code != 0
    assert "missing" in shown.stderr
