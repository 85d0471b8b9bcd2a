from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tolaria.signals.locks import RangeLocks

# A run that forks a worker and dies at once, leaving the worker alive with everything it inherited.
DIES_WITH_A_WORKER_LEFT = """
import os, signal, sys
from tolaria.signals import SignalBoard
board = SignalBoard.create(sys.argv[1], "run-1")
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
from tolaria.signals import SignalBoard
board = SignalBoard.create(sys.argv[1], "run-1")
board.claim("tolaria")
sys.exit(not board.adopted)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file to lock."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    return path


def locks_on(path: Path) -> RangeLocks:
    """One holder."""
    return RangeLocks(os.open(path, os.O_RDWR))


def test_locks_ranges_exclude_each_other_only_where_they_overlap(path: Path) -> None:
    """Two holders share a file, not a range; what one lets go the other can have."""
    one, two = locks_on(path), locks_on(path)
    assert one.try_lock(0, 10)
    assert one.try_lock(0, 10)
    assert two.try_lock(10, 10)
    assert not two.try_lock(9, 1)
    one.unlock(0, 10)
    assert two.try_lock(9, 1)
    one.close()
    two.close()


def test_locks_closing_lets_everything_go(path: Path) -> None:
    """A closed holder holds nothing, cannot lock, and may be closed again."""
    one, two = locks_on(path), locks_on(path)
    assert one.try_lock(0, 10)
    one.close()
    one.close()
    one.unlock(0, 10)
    assert (one.held, one.try_lock(0, 10), two.try_lock(0, 10)) == (False, False, True)
    two.close()


def test_locks_a_forked_worker_does_not_keep_a_dead_runs_board(tmp_path: Path) -> None:
    """A run killed while its worker lives on leaves a board that the next run can have at once."""
    path = tmp_path / "board"
    program = [sys.executable, "-c", DIES_WITH_A_WORKER_LEFT, str(path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert int(run.stdout.readline()) > 0
        run.wait(60)
        retaken = subprocess.run([sys.executable, "-c", RETAKES, str(path)], check=False)
        assert retaken.returncode == 0
