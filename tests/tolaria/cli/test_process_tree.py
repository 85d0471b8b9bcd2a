from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from support.processes import is_alive
from support.waiting import wait_for
from tolaria.cli.process_tree import ProcessTree
from tolaria.ranks.local_ranks import ranks_of

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
STARTS_ANOTHER = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen(sys.argv[1:], start_new_session=True)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process in a session, and the id of its child in another session."""
    command = [sys.executable, "-c", STARTS_ANOTHER, *SLEEP]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    for pid in (process.pid, child):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)
    process.stdout.close()


def test_a_process_is_found_after_its_parent_has_ended(parent: tuple[subprocess.Popen[str], int]) -> None:
    """Also in another session; one that has ended is not running, and other processes do not belong to it."""
    process, child = parent
    tree = ProcessTree()
    tree.add(process.pid)
    tree.look()
    assert sorted(tree.running()) == sorted([process.pid, child])
    process.kill()
    process.wait(10)
    assert tree.running() == (child,)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: tree.running() == ())
    assert len(tree) == 2


@pytest.mark.anyio
async def test_what_is_left_is_waited_for(parent: tuple[subprocess.Popen[str], int]) -> None:
    """A process that ends by itself within the time is not left; the time is kept."""
    process, child = parent
    tree = ProcessTree()
    tree.add(process.pid)
    started_s = time.monotonic()
    assert sorted(await tree.left(0.1)) == sorted([process.pid, child])
    assert 0.1 <= time.monotonic() - started_s < 20
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGKILL)
    assert await tree.left(20.0) == ()


def test_ranks_are_found_by_number() -> None:
    """Among the children of the agent, which may have others."""
    ranks = {
        number: subprocess.Popen([*SLEEP, "tolaria.lane.rank"], env={**os.environ, "RANK": str(number)})
        for number in (1, 0)
    }
    other = subprocess.Popen(SLEEP, env={**os.environ, "RANK": "5"})
    try:
        wait_for(lambda: ranks_of(os.getpid()) == {number: rank.pid for number, rank in ranks.items()})
        assert ranks_of(other.pid) == {}
    finally:
        for process in (*ranks.values(), other):
            process.kill()
            process.wait(10)
