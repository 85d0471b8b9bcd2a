from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.signals import SignalBoard, remove_stale_boards
from tolaria.signals import stale as stale_module
from tolaria.signals.founding import boot_id

CRASH = """
import os, sys
from tolaria.signals import SignalBoard
board = SignalBoard.create(sys.argv[1], sys.argv[2])
board.claim("tolaria").raise_level(4, "before the crash")
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Where the board of the run that starts now is."""
    return tmp_path / "tolaria-run-2"


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The board of a run that was killed."""
    path = tmp_path / "tolaria-run-1"
    crashed = subprocess.run([sys.executable, "-c", CRASH, path, "run-1"], check=False)
    assert crashed.returncode == -9
    assert path.exists()
    return path


def test_stale_a_dead_runs_board_is_removed(left: Path, ours: Path) -> None:
    """Its path is told; our own board, and what else lies there, stays."""
    other = left.with_name("notes")
    other.write_text("mine")
    with SignalBoard.create(ours, "run-2") as board:
        assert remove_stale_boards(ours, stale_s=0.0) == (left,)
        assert (left.exists(), ours.exists(), other.exists(), board.current) == (False, True, True, True)
        assert remove_stale_boards(ours, stale_s=0.0) == ()


def test_stale_a_run_that_may_be_restarted_keeps_its_board(left: Path, ours: Path) -> None:
    """Minutes after a crash its emergency is still there for the restart to adopt."""
    assert remove_stale_boards(ours) == ()
    with SignalBoard.create(left, "run-1") as board:
        signal = board.effective()
        assert signal is not None
        assert signal.level == EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_stale_a_board_of_an_earlier_boot_is_removed_at_once(
    left: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody adopts it, and its clock says nothing."""
    monkeypatch.setattr(stale_module, "boot_id", lambda: bytes(16))
    assert boot_id() != bytes(16)
    assert remove_stale_boards(ours) == (left,)


def test_stale_a_living_founder_keeps_its_board(tmp_path: Path, ours: Path) -> None:
    """However long it has been silent."""
    with SignalBoard.create(tmp_path / "tolaria-run-3", "run-3", clock=lambda: 0) as living:
        assert remove_stale_boards(ours, stale_s=0.0) == ()
        assert living.current


def test_stale_a_living_participant_keeps_the_board(left: Path, ours: Path) -> None:
    """A peer that still attends it may be waiting for the restart."""
    with SignalBoard.attach(left) as peer:
        claimed = peer.claim("kasmina")
        assert remove_stale_boards(ours, stale_s=0.0) == ()
        claimed.release()
        assert remove_stale_boards(ours, stale_s=0.0) == (left,)
        assert not peer.current


def test_stale_another_users_board_is_left_alone(left: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the directory would let us remove it."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remove_stale_boards(ours, stale_s=0.0) == ()
    assert left.exists()


def test_stale_what_only_looks_like_a_board_is_left_alone(left: Path, ours: Path) -> None:
    """Another mode, a second name, a link, a folder, somebody's file, a board cut short: none is removed."""
    left.with_name("tolaria-notes").write_text("mine")
    left.with_name("tolaria-folder").mkdir()
    left.with_name("tolaria-link").symlink_to(left)
    cut = left.with_name("tolaria-cut")
    cut.touch(0o600)
    cut.write_bytes(left.read_bytes()[:-1])
    open_to_all = left.with_name("tolaria-open")
    open_to_all.write_bytes(left.read_bytes())
    open_to_all.chmod(0o644)
    second = left.with_name("second-name")
    second.hardlink_to(left)
    before = set(left.parent.iterdir())
    assert remove_stale_boards(ours, stale_s=0.0) == ()
    assert set(left.parent.iterdir()) == before
    second.unlink()
    assert remove_stale_boards(ours, stale_s=0.0) == (left,)


def test_stale_a_board_of_another_name_searches_nothing(left: Path, tmp_path: Path) -> None:
    """Where the operator has chosen the name, the folder is the operator's."""
    assert remove_stale_boards(tmp_path / "board", stale_s=0.0) == ()
    assert left.exists()
