from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import EmergencyLevel
from support.boards import BoardBytes
from tolaria.errors import BoardBusyError, BoardLostError, BoardRefusedError
from tolaria.signals import SignalBoard, mapping, remove_stale_boards
from tolaria.signals.layout import BOARD_SIZE
from tolaria.signals.mapping import BoardMemory, RangeLocks, boot_id, fence, locked_fence

HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT

# A run that forks a worker and dies; the worker lives on with all that it inherited.
DIES_WITH_A_WORKER_LEFT = """
import os, signal, sys
from pathlib import Path
from tolaria.signals import SignalBoard
board = SignalBoard.create(Path(sys.argv[1]), "run-1")
board.claim("tolaria")
worker = os.fork()
if worker == 0:
    sys.stdout.write(f"{os.getpid()}\\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""

RETAKES = """
import sys
from pathlib import Path
from tolaria.signals import SignalBoard
board = SignalBoard.create(Path(sys.argv[1]), "run-1")
board.claim("tolaria")
sys.exit(not board.adopted)
"""

CRASH = """
import os, sys
from pathlib import Path
from tolaria.signals import SignalBoard
board = SignalBoard.create(Path(sys.argv[1]), sys.argv[2])
board.claim("tolaria").raise_level(4, "before the crash")
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    """A file of a board's size."""
    path = tmp_path / "blank"
    path.write_bytes(bytes(BOARD_SIZE))
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """The board's path of the run that starts."""
    return tmp_path / "tolaria-run-2"


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """The board of a killed run."""
    path = tmp_path / "tolaria-run-1"
    crashed = subprocess.run([sys.executable, "-c", CRASH, path, "run-1"], check=False)
    assert crashed.returncode == -9
    assert path.exists()
    return path


def open_descriptors() -> int:
    """The number of open descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_file_is_private_whatever_the_umask(path: Path) -> None:
    """Mode 0600, no more and no less."""
    before = os.umask(0o777)
    try:
        with SignalBoard.create(path, "run-1"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_the_creator_removes_its_file(path: Path) -> None:
    """Closing the creator's view removes the file; closing a peer's view does not."""
    with SignalBoard.create(path, "run-1"):
        SignalBoard.attach(path).close()
        assert list(path.parent.iterdir()) == [path]
    assert list(path.parent.iterdir()) == []


def test_a_living_creator_keeps_its_board_when_another_creates(board: SignalBoard, path: Path) -> None:
    """Neither the same run nor another one gets a board whose creator lives, and no file is left behind."""
    for run_id in ("run-1", "run-2"):
        with pytest.raises(BoardBusyError, match="living"):
            SignalBoard.create(path, run_id)
    assert list(path.parent.iterdir()) == [path]
    assert board.current


def test_a_crashed_runs_board_is_adopted(path: Path) -> None:
    """The same run adopts the board: signals stay active and peers stay attached."""
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


def test_the_board_of_another_crashed_run_is_replaced(path: Path) -> None:
    """The new board is empty, and peers of the old one see that it lost its name."""
    crashed = SignalBoard.create(path, "run-1")
    crashed.claim("tolaria").raise_level(HALT, "stop")
    peer = SignalBoard.attach(path)
    crashed.close()
    with SignalBoard.create(path, "run-2") as board:
        assert (board.adopted, board.effective(), peer.current) == (False, None, False)
    peer.close()


@pytest.mark.parametrize("leftover", [b"", b"TOLBOARD", b"TOLBOARD" + bytes(BOARD_SIZE)])
def test_a_damaged_board_is_replaced(path: Path, leftover: bytes) -> None:
    """An empty, short or damaged board does not prevent a restart."""
    path.write_bytes(leftover)
    path.with_name("board.new").write_bytes(b"left by a crash")
    with SignalBoard.create(path, "run-1") as board:
        assert not board.adopted
        assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_no_board_is_left_alone(path: Path) -> None:
    """Create and attach refuse another file, link or folder and do not change it."""
    path.write_bytes(b"thesis")
    link = path.with_name("link")
    link.symlink_to(path)
    for name in (path, link, path.parent):
        for opening in (lambda name: SignalBoard.create(name, "run-1"), SignalBoard.attach):
            with pytest.raises(BoardRefusedError):
                opening(name)
    assert path.read_bytes() == b"thesis"
    assert sorted(path.parent.iterdir()) == [path, link]


def test_a_missing_board_or_folder_is_refused(path: Path) -> None:
    """The reason is `missing`."""
    with pytest.raises(BoardRefusedError) as attached:
        SignalBoard.attach(path)
    with pytest.raises(BoardRefusedError) as created:
        SignalBoard.create(path / "nowhere", "run-1")
    assert (attached.value.reason, created.value.reason) == ("missing", "missing")


@pytest.mark.parametrize(
    ("at", "reason"), [(0, "foreign"), (8, "version"), (16, "size"), (40, "header"), (70, "header")]
)
def test_a_wrong_header_is_refused(board: SignalBoard, file: BoardBytes, at: int, reason: str) -> None:
    """A flipped bit in each part of the header refuses the board with its stable reason."""
    file.flip_bit(at)
    with pytest.raises(BoardRefusedError) as refused:
        SignalBoard.attach(file.path)
    assert refused.value.reason == reason


def test_another_runs_board_and_a_short_file_are_refused(board: SignalBoard, path: Path) -> None:
    """The run id must be the expected one and the file complete; refusals leave no descriptor open."""
    before = open_descriptors()
    with pytest.raises(BoardRefusedError) as foreign:
        SignalBoard.attach(path, "run-2")
    os.truncate(path, BOARD_SIZE - 1)
    with pytest.raises(BoardRefusedError) as short:
        SignalBoard.attach(path)
    assert (foreign.value.reason, short.value.reason) == ("run", "truncated")
    assert open_descriptors() == before


def test_opening_and_closing_leaves_no_descriptor(path: Path) -> None:
    """Creating, adopting, replacing, being refused and closing keep the number of descriptors."""
    before = open_descriptors()
    for run_id in ("run-1", "run-1", "run-2"):
        board = SignalBoard.create(path, run_id)
        with pytest.raises(BoardBusyError):
            SignalBoard.create(path, run_id)
        SignalBoard.attach(path).close()
        board.close()
    assert open_descriptors() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=6000), magic=st.booleans())
def test_arbitrary_files_are_refused(tmp_path: Path, content: bytes, magic: bool) -> None:
    """Any bytes under the name give a typed refusal."""
    path = tmp_path / "noise"
    path.write_bytes(b"TOLBOARD" + content if magic else content)
    with pytest.raises(BoardRefusedError):
        SignalBoard.attach(path)


def test_words_are_the_files_little_endian_words(blank: Path) -> None:
    """A stored word is in the file at once."""
    memory = BoardMemory(os.open(blank, os.O_RDWR), blank)
    memory.words[2] = 0x0102030405060708
    assert blank.read_bytes()[16:24] == bytes(range(8, 0, -1))
    memory.close()


def test_a_truncated_or_removed_file_is_detected(blank: Path) -> None:
    """A removed file is intact, a truncated one is not, nor is a closed mapping."""
    memory = BoardMemory(os.open(blank, os.O_RDWR), blank)
    assert (memory.intact, memory.named) == (True, True)
    spare = blank.with_name("spare")
    blank.rename(spare)
    assert memory.named
    os.truncate(spare, 8)
    with pytest.raises(BoardLostError, match="cut short"):
        memory.require_intact()
    spare.unlink()
    assert (memory.intact, memory.named) == (False, False)
    memory.close()
    with pytest.raises(BoardLostError, match="closed"):
        memory.require_intact()
    assert (memory.intact, memory.named) == (False, False)


def test_only_x86_64_needs_no_fence() -> None:
    """Every other machine gets the locked fence, which any thread may call."""
    assert fence is (None if platform.machine() == "x86_64" else locked_fence)
    locked_fence()


def locks_on(path: Path) -> RangeLocks:
    """A new holder of locks."""
    return RangeLocks(os.open(path, os.O_RDWR))


def test_locks_exclude_each_other_where_they_overlap(blank: Path) -> None:
    """Two holders share a file but not a range; no range is locked twice, and an unlocked one is free for the other."""
    one, two = locks_on(blank), locks_on(blank)
    assert one.try_lock(0, 10)
    assert not one.try_lock(0, 10)
    assert two.try_lock(10, 10)
    assert not two.try_lock(9, 1)
    one.unlock(0, 10)
    assert two.try_lock(9, 1)
    one.close()
    two.close()


def test_closing_unlocks_everything(blank: Path) -> None:
    """A closed holder holds no lock, cannot lock, and may be closed again."""
    one, two = locks_on(blank), locks_on(blank)
    assert one.try_lock(0, 10)
    one.close()
    one.close()
    one.unlock(0, 10)
    assert (one.held, one.try_lock(0, 10), two.try_lock(0, 10)) == (False, False, True)
    two.close()


def test_a_forked_worker_does_not_keep_the_locks_of_a_dead_run(tmp_path: Path) -> None:
    """The next run adopts the board of a killed run whose worker still lives."""
    path = tmp_path / "board"
    program = [sys.executable, "-c", DIES_WITH_A_WORKER_LEFT, str(path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert int(run.stdout.readline()) > 0
        run.wait(60)
        retaken = subprocess.run([sys.executable, "-c", RETAKES, str(path)], check=False)
        assert retaken.returncode == 0


def test_a_dead_runs_board_is_removed(stale: Path, ours: Path) -> None:
    """Its path is returned; the own board and other files stay."""
    other = stale.with_name("notes")
    other.write_text("mine")
    with SignalBoard.create(ours, "run-2") as board:
        assert remove_stale_boards(ours, stale_s=0.0) == (stale,)
        assert (stale.exists(), ours.exists(), other.exists(), board.current) == (False, True, True, True)
        assert remove_stale_boards(ours, stale_s=0.0) == ()


def test_a_recent_board_is_kept_for_a_restart(stale: Path, ours: Path) -> None:
    """Minutes after a crash the restart adopts its emergency."""
    assert remove_stale_boards(ours) == ()
    with SignalBoard.create(stale, "run-1") as board:
        signal = board.effective()
        assert signal is not None
        assert signal.level == EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_a_board_of_an_earlier_boot_is_removed_at_once(
    stale: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run adopts it, and its times are from another clock."""
    monkeypatch.setattr(mapping, "boot_id", lambda: bytes(16))
    assert boot_id() != bytes(16)
    assert remove_stale_boards(ours) == (stale,)


def test_the_board_of_a_living_creator_is_not_stale(tmp_path: Path, ours: Path) -> None:
    """However old its heartbeat is."""
    with SignalBoard.create(tmp_path / "tolaria-run-3", "run-3", clock=lambda: 0) as living:
        assert remove_stale_boards(ours, stale_s=0.0) == ()
        assert living.current


def test_a_board_with_a_living_participant_is_not_stale(stale: Path, ours: Path) -> None:
    """An attached peer may be waiting for the restart."""
    with SignalBoard.attach(stale) as peer:
        claimed = peer.claim("kasmina")
        assert remove_stale_boards(ours, stale_s=0.0) == ()
        claimed.release()
        assert remove_stale_boards(ours, stale_s=0.0) == (stale,)
        assert not peer.current


def test_another_users_board_is_left_alone(stale: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the folder permits its removal."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remove_stale_boards(ours, stale_s=0.0) == ()
    assert stale.exists()


def test_files_that_resemble_boards_are_left_alone(stale: Path, ours: Path) -> None:
    """Another mode, a second name, a link, a folder, another file, a truncated board: none is removed."""
    stale.with_name("tolaria-notes").write_text("mine")
    stale.with_name("tolaria-folder").mkdir()
    stale.with_name("tolaria-link").symlink_to(stale)
    cut = stale.with_name("tolaria-cut")
    cut.touch(0o600)
    cut.write_bytes(stale.read_bytes()[:-1])
    open_to_all = stale.with_name("tolaria-open")
    open_to_all.write_bytes(stale.read_bytes())
    open_to_all.chmod(0o644)
    second = stale.with_name("second-name")
    second.hardlink_to(stale)
    before = set(stale.parent.iterdir())
    assert remove_stale_boards(ours, stale_s=0.0) == ()
    assert set(stale.parent.iterdir()) == before
    second.unlink()
    assert remove_stale_boards(ours, stale_s=0.0) == (stale,)


def test_beside_a_board_of_another_name_nothing_is_searched(stale: Path, tmp_path: Path) -> None:
    """The operator chose its name and folder."""
    assert remove_stale_boards(tmp_path / "board", stale_s=0.0) == ()
    assert stale.exists()
