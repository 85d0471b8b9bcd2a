from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.signals import PARTICIPANTS, BlockCondition, RollbackState, SignalBoard

HERE = Path(__file__).parent
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT
WRITES = 100_000  # the long form is `signals_torture.py --writes 1000000`
KILLS = 40  # the long form sets 200
WAIT_S = 120

WRITER = """
import sys
from pathlib import Path
from tolaria.signals import RollbackState, SignalBoard
board = SignalBoard.attach(Path(sys.argv[1]), "run-1")
kasmina, rollback = board.claim("kasmina"), board.claim_rollback()
first = kasmina.record.signal_id
sys.stdout.write("ready\\n")
sys.stdout.flush()
number = 0
while True:
    number += 1
    assert kasmina.raise_level(4, f"{number:08x}" * (number % 20 + 1)) > first
    rollback.write(RollbackState.COMMIT, rollback_id=f"{number:08x}", target_step=number)
    kasmina.beat()
"""

CREATOR = """
import sys
from pathlib import Path
from tolaria.signals import SignalBoard
board = SignalBoard.create(Path(sys.argv[1]), "run-1")
board.claim("tolaria").raise_level(4, "before the crash")
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def started(program: str, path: Path) -> subprocess.Popen[bytes]:
    """Starts a Python program on the board and waits until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process, as a crash would."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled C reader."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on this machine")
    program = tmp_path_factory.mktemp("reader") / "signals_reader"
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", str(HERE / "signals_reader.c")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def shown(reader: Path, path: Path) -> dict[str, str]:
    """Returns the values that the C reader prints."""
    output = subprocess.run([reader, path], check=True, capture_output=True, timeout=WAIT_S).stdout.decode()
    return {key: value for key, _, value in (line.partition(" ") for line in output.splitlines())}


def test_signals_no_torn_value_is_accepted() -> None:
    """Two processes write and read continuously: every accepted value was written, and they are in order."""
    run = subprocess.run(
        [sys.executable, HERE / "signals_torture.py", "--writes", str(WRITES)],
        check=False,
        capture_output=True,
        timeout=WAIT_S,
    )
    assert run.returncode == 0, (run.stdout, run.stderr)
    counts = json.loads(run.stdout)
    assert counts["accepted"] >= WRITES // 2


def test_signals_a_killed_writer_leaves_the_board_readable(tmp_path: Path) -> None:
    """After each SIGKILL every block is intact, and the next writer claims its block and continues."""
    path, moments = tmp_path / "board", random.Random(5)
    with SignalBoard.create(path, "run-1") as board:
        tolaria = board.claim("tolaria")
        last_id = 0
        for _ in range(KILLS):
            writer = started(WRITER, path)
            time.sleep(moments.uniform(0.0, 0.01))  # kills at varying moments
            kill(writer)
            states = board.read_all()
            assert {state.condition for state in states} == {BlockCondition.OK}
            record = states[PARTICIPANTS.index("kasmina")].record
            assert record is not None
            assert record.signal_id >= last_id  # equal if it was killed before its first signal
            last_id = record.signal_id
            assert board.read_rollback() is not None
            tolaria.clear()
        assert last_id > 0


def test_signals_the_board_of_a_killed_run_is_adopted(tmp_path: Path) -> None:
    """Name, mode and signals survive the creator's SIGKILL; the restarted run adopts and later removes the board."""
    path = tmp_path / "board"
    creator = started(CREATOR, path)
    peer = SignalBoard.attach(path, "run-1")
    kill(creator)
    assert path.exists()
    with SignalBoard.create(path, "run-1") as board:
        assert (board.adopted, path.stat().st_mode & 0o777) == (True, 0o600)
        signal_seen = peer.effective()
        assert signal_seen is not None
        assert signal_seen.reason == "before the crash"
        board.claim("tolaria").clear()
        assert peer.effective() is None
    assert list(tmp_path.iterdir()) == []
    assert not peer.current
    peer.close()


def test_signals_another_process_wakes_a_waiter(tmp_path: Path) -> None:
    """A signal raised by another process ends the wait long before its timeout."""
    path = tmp_path / "board"
    with SignalBoard.create(path, "run-1") as board:
        seen = board.bell
        writer = started(WRITER, path)
        assert board.wait(seen, WAIT_S) != seen
        kill(writer)
        signal_seen = board.effective()
        assert signal_seen is None or signal_seen.origin == "kasmina"


def test_signals_a_c_program_reads_the_board(tmp_path: Path, reader: Path) -> None:
    """A reader written from the layout's documentation reads every field."""
    path = tmp_path / "board"
    assert subprocess.run([reader, path], check=False, capture_output=True).returncode == 2
    with SignalBoard.create(path, "run-é") as board:
        tolaria, tamiyo = board.claim("tolaria"), board.claim("tamiyo")
        tolaria.clear_all()
        tolaria.beat_lane()
        signal_id = tamiyo.raise_level(HALT, "Verlust ist größer")
        tolaria.acknowledge(signal_id)
        tier = RollbackTier.ROLLBACK_TIER_FULL
        board.claim_rollback().write(
            RollbackState.DEADLINE, rollback_id="r-7", target_step=70, deadline_ns=8, tier=tier
        )
        fields = shown(reader, path)
        states = {state.name: state for state in board.read_all()}
        for name, state in states.items():
            assert state.record is not None
            expected = {
                "condition": "ok",
                "heartbeat": state.heartbeat_ns,
                "lane_heartbeat": state.lane_heartbeat_ns,
                "signal_id": state.record.signal_id,
                "raised": state.record.raised_ns,
                "acknowledged_id": state.record.acknowledged_id,
                "acknowledged": state.record.acknowledged_ns,
                "cleared": state.record.cleared_ns,
                "index": PARTICIPANTS.index(name),
                "pid": state.record.owner_pid,
                "level": state.record.level,
                "reason": state.record.reason,
            }
            assert {key: fields[f"{name}.{key}"] for key in expected} == {k: str(v) for k, v in expected.items()}
        assert (fields["run"], fields["effective"], fields["tolaria.acknowledged_id"]) == ("run-é", "4", str(signal_id))
        assert (fields["rollback.state"], fields["rollback.step"], fields["rollback.id"]) == ("5", "70", "r-7")
        assert (fields["rollback.deadline"], fields["rollback.tier"]) == ("8", "2")
        tolaria.clear_all()
        assert shown(reader, path)["effective"] == "0"


def test_signals_a_c_program_is_woken(tmp_path: Path, reader: Path) -> None:
    """A C program that waits for HALT wakes for it, and not for a lower level."""
    path = tmp_path / "board"
    with SignalBoard.create(path, "run-1") as board:
        kasmina = board.claim("kasmina")
        with subprocess.Popen([reader, path, "wait", "4", str(WAIT_S * 1000)], stdout=subprocess.PIPE) as waiter:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == b"waiting\n"
            kasmina.raise_level(EmergencyLevel.EMERGENCY_LEVEL_ELEVATED, "slow")
            kasmina.raise_level(HALT, "stop")
            assert waiter.wait(WAIT_S) == 0
            assert waiter.stdout.read() == b"effective 4\n"


def test_signals_peers_need_neither_torch_nor_grpc() -> None:
    """Importing the board loads neither."""
    program = (
        "import sys; from tolaria.signals import SignalBoard; sys.exit(bool({'torch', 'grpc'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
