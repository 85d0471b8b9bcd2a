"""Stacks of other processes: also of one that holds its GIL, and never at the price of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes import is_alive, python_path
from support.waiting import wait_for
from tolaria.ranks.stacks import CHARACTERS_MAX, STACKS_FILE, append_stacks, stacks_of, summary

BUSY = """
import ctypes, sys, threading, time, zlib
from tolaria.ranks.stacks import dump_on_request
dump_on_request()

def holds_the_gil():
    print("begun", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(3600)

def waits(depth):
    if depth:
        return waits(depth - 1)
    print("begun", flush=True)
    time.sleep(3600)

threading.Thread(target=lambda: time.sleep(3600), name="other", daemon=True).start()
"""

RUNS = """
def works():
    while True:
        exec("def new(n): return new(n - 1) if n else [x for x in range(20)]\\nnew(200)", {})

for _ in range(3):
    threading.Thread(target=works, daemon=True).start()
memory = bytearray(10_000_000)
print("begun", flush=True)
while True:
    zlib.crc32(memory)  # releases the GIL, as the operations of PyTorch do
"""

LATE = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: sys.exit("signalled"))
print("begun", flush=True)
while True:
    ctypes.PyDLL(None).usleep(700_000)  # holds the GIL
    time.sleep(0.01)
"""

BARE = """
import time
print("begun", flush=True)
time.sleep(3600)
"""


@contextmanager
def process(script: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a script until it says that it has begun; kills it at the end."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            yield child
        finally:
            child.kill()


def test_a_process_that_holds_its_gil_gives_its_stacks() -> None:
    """Again and again; the main thread comes first, and all are bounded."""
    with process(BUSY + "holds_the_gil()") as held, process(BUSY + "waits(300)") as deep:
        for _ in range(2):
            found = stacks_of({1: deep.pid, 0: held.pid})
            assert list(found) == [0, 1]
            assert found[0].startswith("Main thread")
            assert found[0].count("in holds_the_gil") == 1
            assert "in <lambda>" in found[0]
            assert len(found[1]) <= CHARACTERS_MAX + 4
        assert summary(found) == "rank 0: holds_the_gil (<string>:9); rank 1: waits (<string>:15)"


def test_a_process_whose_threads_run_survives_that_its_stacks_are_looked_at() -> None:
    """However often: a halted run is looked at, too. A handler without the GIL would read stacks while they change."""
    with process(BUSY + RUNS) as busy:
        for _ in range(60):
            found = stacks_of({0: busy.pid})
            assert is_alive(busy.pid)
            assert summary(found).startswith("<module> (<string>:")
            assert "_answer_requests" not in found[0]


def test_a_process_that_cannot_answer_is_said_to_be_so_and_lives() -> None:
    """One that is stopped, one without a handler, which the signal would end, and one that has gone."""
    with process(BUSY + "waits(1)") as stopped, process(BARE) as bare:
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_for(lambda: "\nState:\tT" in Path(f"/proc/{stopped.pid}/status").read_text())
        found = stacks_of({0: stopped.pid, 1: bare.pid, 2: 2**22 + 1})
        assert "it is stopped" in found[0]
        assert "none of this service's" in found[1]
        assert "No such file" in found[2]
        with pytest.raises(subprocess.TimeoutExpired):
            bare.wait(0.5)


def test_the_main_thread_is_named_or_said_to_be_missing() -> None:
    """Of more than a hundred threads only the newest hundred are shown; the place of another one is none of its."""
    many = "for _ in range(150):\n    threading.Thread(target=lambda: time.sleep(3600), daemon=True).start()\n"
    with process(BUSY + many + "waits(1)") as crowded, process(BUSY + "waits(1)") as few:
        shown = "rank 0: the main thread is not shown; rank 1: waits (<string>:15)"
        wait_for(lambda: summary(stacks_of({0: crowded.pid, 1: few.pid})) == shown)  # it sleeps once it has said so
        assert "in <lambda>" in stacks_of({0: crowded.pid})[0]


def test_a_slow_process_is_waited_for() -> None:
    """One that answers within two seconds is not signalled: the handler without the GIL could end it."""
    with process(BUSY + LATE) as slow:
        found = stacks_of({0: slow.pid})
        assert found[0].startswith("Main thread"), found[0]
        with pytest.raises(subprocess.TimeoutExpired):
            slow.wait(1.5)


def test_a_file_of_stacks_keeps_the_newest(tmp_path: Path) -> None:
    """Its size is bounded, only its owner reads it, and a link is not followed."""
    path = tmp_path / STACKS_FILE
    for number in range(30):
        append_stacks(path, f"reason {number}", {"rank 0": "x" * 1000, "rank 1": "y"}, bytes_max=10_000)
    text = path.read_text()
    assert 1000 < len(text) < 12_000
    assert text.index("reason 28\nrank 0:\nxxx") < text.index("reason 29\nrank 0:\nxxx") < text.rindex("rank 1:\ny")
    assert "reason 2\n" not in text
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="link"):
        append_stacks(tmp_path / "link", "reason", {})


def test_a_summary_names_ranks_at_one_place_together() -> None:
    """However many there are, in one line."""
    same = 'Main thread 0x1 (most recent call first):\n  File "/a/b.py", line 3 in step\n'
    found = dict.fromkeys(range(100), same) | {7: "no stacks of process 7: it is stopped (state T)"}
    assert summary(found) == (
        "ranks 0, 1, 2, 3, 4, 5 and 93 more: step (b.py:3); rank 7: no stacks of process 7: it is stopped (state T)"
    )
    assert summary({0: same}) == "step (b.py:3)"
