from __future__ import annotations

import json
import threading
from pathlib import Path

from typer.testing import CliRunner

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_CONSERVATIVE
from tolaria.cli.grammar import app
from tolaria.signals import SignalBoard

runner = CliRunner()


def test_an_operator_raises_shows_and_clears_on_the_board_itself(tmp_path: Path) -> None:
    """Without any service: what is raised is shown with its origin, and cleared for everyone."""
    path = str(tmp_path / "board")
    with SignalBoard.create(path, "run-1") as board:
        raised = runner.invoke(app, ["signals", "raise", "conservative", "--reason", "smell", "--board", path])
        assert raised.exit_code == 0, raised.output
        (standing,) = json.loads(runner.invoke(app, ["signals", "show", "--board", path]).stdout)["standing"]
        assert standing == {
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


def test_watch_tells_every_change_until_the_board_is_gone(tmp_path: Path) -> None:
    """One line for the board as it is, one for what was raised; the end of the board is the end of watching."""
    path = tmp_path / "board"
    board = SignalBoard.create(path, "run-1")
    me = board.claim("tolaria")
    signal_id = me.raise_level(EMERGENCY_LEVEL_CONSERVATIVE, "smell")
    closing = threading.Timer(0.3, lambda: board.close(unlink=True))
    closing.start()
    shown = runner.invoke(app, ["signals", "watch", "--board", str(path)])
    closing.join()
    assert shown.exit_code == 0, shown.output
    (line,) = shown.stdout.splitlines()
    assert json.loads(line)["standing"][0]["signal_id"] == signal_id


def test_a_board_that_is_not_there_is_told(tmp_path: Path) -> None:
    """One line with the reason, no traceback."""
    shown = runner.invoke(app, ["signals", "show", "--board", str(tmp_path / "none")])
    assert shown.exit_code != 0
    assert "missing" in shown.stderr
