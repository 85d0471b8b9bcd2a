from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.errors import (
    BoardBusyError,
    BoardRefusedError,
)
from tolaria.signals import SignalBoard
from tolaria.signals.layout import BOARD_SIZE

HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def flip(path: Path, at: int) -> None:
    """Flip one bit of the file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_founding_the_file_is_private_whatever_the_umask(path: Path) -> None:
    """Mode 0600, no more and no less."""
    before = os.umask(0o777)
    try:
        with SignalBoard.create(path, "run-1"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_founding_the_founder_takes_its_file_away(path: Path) -> None:
    """A closed founder leaves nothing behind; a closed peer leaves the board alone."""
    with SignalBoard.create(path, "run-1"):
        SignalBoard.attach(path).close()
        assert list(path.parent.iterdir()) == [path]
    assert list(path.parent.iterdir()) == []


def test_founding_a_living_founder_is_not_pushed_aside(board: SignalBoard, path: Path) -> None:
    """Neither the same run nor another one takes a board whose founder lives, and nothing is left lying about."""
    for run_id in ("run-1", "run-2"):
        with pytest.raises(BoardBusyError, match="living"):
            SignalBoard.create(path, run_id)
    assert list(path.parent.iterdir()) == [path]
    assert board.current


def test_founding_a_crashed_runs_board_is_adopted(path: Path) -> None:
    """The same run takes over what a crash left: signals stand and attached peers stay attached."""
    crashed = SignalBoard.create(path, "run-1")
    crashed.claim("tolaria").raise_level(HALT, "stop")
    peer = SignalBoard.attach(path)
    crashed.close()
    path.chmod(0o644)
    with SignalBoard.create(path, "run-1") as board:
        assert (board.adopted, peer.current, stat.S_IMODE(path.stat().st_mode)) == (True, True, 0o600)
        board.claim("tolaria").clear()
        assert peer.effective() is None
    peer.close()


def test_founding_another_runs_leftover_is_replaced(path: Path) -> None:
    """A board of another run gives way whole; its peers see that it lost its name."""
    crashed = SignalBoard.create(path, "run-1")
    crashed.claim("tolaria").raise_level(HALT, "stop")
    peer = SignalBoard.attach(path)
    crashed.close()
    with SignalBoard.create(path, "run-2") as board:
        assert (board.adopted, board.effective(), peer.current) == (False, None, False)
    peer.close()


@pytest.mark.parametrize("leftover", [b"", b"TOLBOARD", b"TOLBOARD" + bytes(BOARD_SIZE)])
def test_founding_a_damaged_leftover_is_replaced(path: Path, leftover: bytes) -> None:
    """An empty, short or damaged board does not stop a restart."""
    path.write_bytes(leftover)
    path.with_name("board.new").write_bytes(b"left by a crash")
    with SignalBoard.create(path, "run-1") as board:
        assert not board.adopted
        assert list(path.parent.iterdir()) == [path]


def test_founding_a_strangers_file_is_left_alone(path: Path) -> None:
    """A file, link or folder that is no board is refused by create and attach, and stays as it was."""
    path.write_bytes(b"thesis")
    link = path.with_name("link")
    link.symlink_to(path)
    for name in (path, link, path.parent):
        for opening in (lambda name: SignalBoard.create(name, "run-1"), SignalBoard.attach):
            with pytest.raises(BoardRefusedError):
                opening(name)
    assert path.read_bytes() == b"thesis"
    assert sorted(path.parent.iterdir()) == [path, link]


def test_founding_no_board_and_no_folder_are_refused_as_missing(path: Path) -> None:
    """What is not there has its own reason."""
    with pytest.raises(BoardRefusedError) as attached:
        SignalBoard.attach(path)
    with pytest.raises(BoardRefusedError) as created:
        SignalBoard.create(path / "nowhere", "run-1")
    assert (attached.value.reason, created.value.reason) == ("missing", "missing")


@pytest.mark.parametrize(
    ("at", "reason"), [(0, "foreign"), (8, "version"), (16, "size"), (40, "header"), (70, "header")]
)
def test_founding_a_wrong_header_is_refused(board: SignalBoard, path: Path, at: int, reason: str) -> None:
    """One flipped bit in each part of the header refuses the board with its stable reason."""
    flip(path, at)
    with pytest.raises(BoardRefusedError) as refused:
        SignalBoard.attach(path)
    assert refused.value.reason == reason


def test_founding_another_runs_board_and_a_short_file_are_refused(board: SignalBoard, path: Path) -> None:
    """The run id must be the expected one and the file whole; refusals leave no descriptor open."""
    before = open_descriptors()
    with pytest.raises(BoardRefusedError) as foreign:
        SignalBoard.attach(path, "run-2")
    os.truncate(path, BOARD_SIZE - 1)
    with pytest.raises(BoardRefusedError) as short:
        SignalBoard.attach(path)
    assert (foreign.value.reason, short.value.reason) == ("run", "truncated")
    assert open_descriptors() == before


def test_founding_opening_and_closing_leaves_no_descriptor(path: Path) -> None:
    """Founding, adopting, replacing, being refused and closing keep the number of descriptors."""
    before = open_descriptors()
    for run_id in ("run-1", "run-1", "run-2"):
        board = SignalBoard.create(path, run_id)
        with pytest.raises(BoardBusyError):
            SignalBoard.create(path, run_id)
        SignalBoard.attach(path).close()
        board.close()
    assert open_descriptors() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=6000), magic=st.booleans())
def test_founding_arbitrary_files_are_refused(tmp_path: Path, content: bytes, magic: bool) -> None:
    """Any bytes at all under the name give a typed refusal."""
    path = tmp_path / "noise"
    path.write_bytes(b"TOLBOARD" + content if magic else content)
    with pytest.raises(BoardRefusedError):
        SignalBoard.attach(path)
