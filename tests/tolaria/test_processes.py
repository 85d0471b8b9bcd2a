from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from support.processes import is_alive
from tolaria.errors import ChildFailedError
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy, supervised

pytestmark = pytest.mark.anyio
TIMEOUT_S = 180.0
AT_ONCE = RestartPolicy(pause_s=0.001, restarts_max=3)

WELL_BEHAVED = "import sys; print('{\"ready\": true}', flush=True); sys.stdin.read()"
IGNORES_STDIN = "import time; print('{\"ready\": true}', flush=True); time.sleep(600)"
TALKATIVE = """
import sys
sys.stderr.write("x" * 300_000); sys.stderr.flush()
print('{"ready": true}', flush=True)
sys.stdout.write("x" * 300_000); sys.stdout.flush()
sys.stdin.read()
sys.exit("the end")
"""
# Announces itself at the first start only.
ONCE = """
import pathlib, sys
started = pathlib.Path(sys.argv[1])
if started.exists():
    sys.exit("the port is taken")
started.touch()
print('{"ready": true}', flush=True)
"""
ANNOUNCES_ITSELF = """
import pathlib, sys
print('{"ready": true}', flush=True)
pathlib.Path(sys.argv[1]).touch()
sys.stdin.read()
"""
ENDS_AFTERWARDS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
sys.exit(9)
"""
ONCE_THEN_SILENT = ONCE.replace('sys.exit("the port is taken")', "import time; time.sleep(600)")
# Ends and leaves a grandchild that holds its standard error open until standard input ends.
LEAVES_A_GRANDCHILD = """
import os, sys
print('{"ready": true}', flush=True)
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
os._exit(3)
"""


class Child(ChildSupervisor):
    """A supervised Python program that records what the hooks are called with."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        restarts: RestartPolicy = AT_ONCE,
        start_timeout_s: float = TIMEOUT_S,
        stop_timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(
            ChildCommand("child", (sys.executable, "-c", program, *arguments), keep_stderr=True),
            restarts=restarts,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
        )
        self.endings: list[tuple[str, float]] = []
        self.given_up: list[tuple[str, int]] = []
        self.starts = 0
        self.killed = False

    def accept(self, announcement: Mapping[str, Any]) -> None:
        assert announcement["ready"]

    def on_started(self) -> None:
        self.starts += 1

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        self.endings.append((detail, restart_in_s))

    def on_given_up(self, detail: str, failures: int) -> None:
        self.given_up.append((detail, failures))

    def on_killed(self) -> None:
        self.killed = True


def pipes() -> set[str]:
    """The pipes that this process holds open."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.add(str(descriptor.readlink()))
    return {link for link in links if link.startswith("pipe:")}


def assert_gone(*children: ChildSupervisor) -> None:
    """No process is left, not even as a zombie."""
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


async def test_children_run_while_the_block_runs() -> None:
    """Each runs in its own session; afterwards neither a process nor a descriptor is left."""
    before = pipes()
    children = (Child(WELL_BEHAVED), Child(WELL_BEHAVED))
    async with supervised(*children):
        for child in children:
            assert is_alive(child.pid)
            assert os.getsid(child.pid) == child.pid
    assert_gone(*children)
    assert not any(child.killed for child in children)
    assert pipes() <= before


async def test_output_never_blocks_a_child() -> None:
    """A child may write more to both outputs than a pipe holds, before and after its announcement."""
    child = Child(TALKATIVE)
    async with supervised(child):
        pass
    assert_gone(child)
    assert not child.killed


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("import sys; sys.exit('no such thing')", "ended with code 1: no such thing"),
        ("import sys; print('hello', flush=True); sys.stdin.read()", "announced itself with b'hello'"),
        ("import sys; print('[1]', flush=True); sys.stdin.read()", "announced itself with b'[1]'"),
        ("import sys; print('{}', flush=True); sys.stdin.read()", "announced itself with b'{}'"),
        ("import sys; print('x' * 5000, end='', flush=True); sys.stdin.read()", "announced itself with b'xxx"),
    ],
)
async def test_a_start_without_the_expected_announcement_fails(program: str, detail: str) -> None:
    """The error has the child's name, and the detail says what it did; no process is left."""
    child, before = Child(program), pipes()
    with pytest.raises(ChildFailedError) as caught:
        async with supervised(child):
            pytest.fail("the block must not run")
    assert caught.value.child == "child"
    assert caught.value.detail.startswith(detail)
    assert_gone(child)
    assert pipes() <= before


async def test_a_silent_child_fails_at_the_deadline() -> None:
    """The detail ends with what it wrote to standard error."""
    program = "import sys, time; sys.stderr.write('waiting'); sys.stderr.flush(); time.sleep(600)"
    child = Child(program, start_timeout_s=1.0, stop_timeout_s=0.1)
    with pytest.raises(ChildFailedError, match="has not announced itself within 1 s: waiting"):
        await child.start()
    assert_gone(child)


async def test_a_missing_program_fails() -> None:
    """The error is a ChildFailedError and no OSError."""
    child = Child("")
    child.command = ChildCommand("child", ("/nonexistent/program",))
    with pytest.raises(ChildFailedError, match="cannot be started"):
        await child.start()


async def test_one_failed_start_stops_the_other_children(tmp_path: Path) -> None:
    """Also one that has announced itself already."""
    started = tmp_path / "started"
    good, bad = Child(ANNOUNCES_ITSELF, str(started)), Child(ENDS_AFTERWARDS, str(started))
    with pytest.raises(ChildFailedError, match="code 9"):
        async with supervised(good, bad):
            pytest.fail("the block must not run")
    assert_gone(good, bad)


async def test_a_child_that_does_not_stop_is_killed() -> None:
    """After the stop timeout."""
    child = Child(IGNORES_STDIN, stop_timeout_s=0.1)
    async with supervised(child):
        pass
    assert child.killed
    assert_gone(child)


async def test_cancellation_and_errors_of_the_block_leave_no_process() -> None:
    """An error keeps its type and cause."""
    child, cause = Child(WELL_BEHAVED), KeyError("cause")
    with pytest.raises(ZeroDivisionError) as caught:
        async with supervised(child):
            raise ZeroDivisionError from cause
    assert caught.value.__cause__ is cause
    assert_gone(child)
    with anyio.CancelScope() as scope:
        async with supervised(child):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert_gone(child)


async def test_a_cancelled_start_leaves_no_process() -> None:
    """A child that has not announced itself is stopped too."""
    child, before = Child(IGNORES_STDIN.replace("print", "(lambda *_, **__: None)"), stop_timeout_s=0.1), pipes()
    with anyio.move_on_after(0.2) as scope:
        await child.start()
    assert scope.cancelled_caught
    assert_gone(child)
    assert pipes() <= before


async def test_a_child_that_ended_is_restarted() -> None:
    """The ending has its exit code; nothing of either process is left."""
    child, before = Child(WELL_BEHAVED), pipes()
    async with supervised(child):
        first = child.pid
        os.kill(first, signal.SIGKILL)
        with anyio.fail_after(TIMEOUT_S):
            while not child.starts:
                await anyio.sleep(0.001)
        assert child.pid != first
    assert child.endings == [("ended with code -9", 0.001)]
    assert not is_alive(first)
    assert_gone(child)
    assert pipes() <= before


async def test_restarts_pause_longer_each_time_until_given_up(tmp_path: Path) -> None:
    """The pauses double; `run` returns after the last restart failed, with the reason."""
    child = Child(ONCE, str(tmp_path / "started"))
    with anyio.fail_after(TIMEOUT_S):
        await child.run()
    assert [pause_s for _, pause_s in child.endings] == [0.001, 0.002, 0.004]
    assert child.endings[0][0] == "ended with code 0"
    assert child.given_up == [("ended with code 1: the port is taken", 4)]
    assert child.starts == 1


async def test_run_starts_the_child_and_stops_it_when_cancelled() -> None:
    """A child that `start` has not started; one that fails to start is tried again."""
    child = Child(WELL_BEHAVED, restarts=RestartPolicy(pause_s=0.001))
    command, child.command = child.command, ChildCommand("child", ("/nonexistent/program",))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child.run)
        with anyio.fail_after(TIMEOUT_S):
            while not child.endings:
                await anyio.lowlevel.checkpoint()
            child.command = command
            while not child.starts:
                await anyio.sleep(0.001)
        assert is_alive(child.pid)
        tasks.cancel_scope.cancel()
    assert child.endings[0][0].startswith("cannot be started")
    assert_gone(child)


def test_pauses_have_a_maximum() -> None:
    """Also after more restarts than a float can double."""
    policy = RestartPolicy(pause_s=1.0, pause_s_max=5.0)
    assert [policy.pause(restart) for restart in (1, 2, 3, 4, 10_000)] == [1.0, 2.0, 4.0, 5.0, 5.0]


async def test_a_long_life_begins_a_new_row_of_restarts() -> None:
    """A child that ends now and then is restarted each time, after the shortest pause."""
    child = Child("print('{\"ready\": true}')", restarts=RestartPolicy(pause_s=0.001, restarts_max=1, lived_s=0.0))
    async with supervised(child):
        with anyio.fail_after(TIMEOUT_S):
            while len(child.endings) < 3:
                await anyio.sleep(0.001)
    assert {pause_s for _, pause_s in child.endings} == {0.001}
    assert child.given_up == []


@pytest.mark.parametrize("pause_s", [600.0, 0.0])
async def test_the_block_may_end_during_a_restart(tmp_path: Path, pause_s: float) -> None:
    """Whether the child waits for its restart or for its announcement: no process and no pipe is left."""
    before, restarts = pipes(), RestartPolicy(pause_s=pause_s)
    child = Child(ONCE_THEN_SILENT, str(tmp_path / "started"), restarts=restarts, stop_timeout_s=0.1)
    async with supervised(child):
        with anyio.fail_after(TIMEOUT_S):
            while not child.endings:
                await anyio.sleep(0.001)
    assert_gone(child)
    assert pipes() <= before


async def test_a_process_that_is_spawned_while_the_block_ends_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancellation arrives between the spawn and its return."""
    open_process, spawning, processes = anyio.open_process, anyio.Event(), list[anyio.abc.Process]()

    async def slowly(*arguments: Any, **options: Any) -> anyio.abc.Process:
        if processes:
            spawning.set()
            await anyio.wait_all_tasks_blocked()
        processes.append(await open_process(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(anyio, "open_process", slowly)
    child = Child(ONCE_THEN_SILENT, str(tmp_path / "started"), restarts=RestartPolicy(pause_s=0.0), stop_timeout_s=0.1)
    async with supervised(child):
        with anyio.fail_after(TIMEOUT_S):
            await spawning.wait()
    assert len(processes) == 2
    assert not any(is_alive(process.pid) for process in processes)


async def test_a_grandchild_with_the_pipe_does_not_delay_the_ending() -> None:
    """The wait for the end of standard error is bounded."""
    child = Child(LEAVES_A_GRANDCHILD, restarts=RestartPolicy(pause_s=600.0))
    async with supervised(child):
        with anyio.fail_after(TIMEOUT_S):
            while not child.endings:
                await anyio.sleep(0.01)
    assert child.endings[0][0] == "ended with code 3"
