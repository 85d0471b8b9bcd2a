"""The sentinel as a child process of the service: started, kept, and gone when the block ends.

Owns the process. What it watches and does is `sentinel`'s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from tolaria.errors import SentinelFailedError

COMMAND = (sys.executable, "-m", "tolaria.emergency.sentinel")
_ANNOUNCEMENT_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Post:
    """What a sentinel watches, for this process; seconds as `vigil.Patience` tells them."""

    board: Path
    run_id: str
    stacks: Path
    heartbeat_timeout_s: float
    startup_s: float
    grace_s: float
    drain_s: float

    def arguments(self) -> list[str]:
        """The sentinel's command line."""
        return [
            *(f"--board={self.board}", f"--run-id={self.run_id}", "--service-pid", str(os.getpid())),
            *("--heartbeat-timeout-s", str(self.heartbeat_timeout_s), "--startup-s", str(self.startup_s)),
            *("--grace-s", str(self.grace_s), "--drain-s", str(self.drain_s)),
            *(f"--stacks={self.stacks}", "--while-stdin"),
        ]


class Sentinel:
    """A sentinel that watches. `pid` is its process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    async def ended(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        return await self._process.wait()


@asynccontextmanager
async def sentinel_process(
    post: Post, *, command: Sequence[str] = COMMAND, start_timeout_s: float = 10.0, stop_timeout_s: float = 2.0
) -> AsyncIterator[Sentinel]:
    """A sentinel that watches this process while the block runs.

    It goes by itself when its standard input ends, at the end of the block or of this process, however either ends;
    if it does not within `stop_timeout_s`, it is killed. Its standard error is this process's own.

    Raises:
        SentinelFailedError: it cannot be started, ends, or does not say within `start_timeout_s` that it watches.
    """
    process = await _spawn([*command, *post.arguments()])
    try:
        with anyio.move_on_after(start_timeout_s) as waiting:
            await _announced(process)
        if waiting.cancelled_caught:
            raise SentinelFailedError(f"the sentinel has not said within {start_timeout_s:g} s that it watches")
        yield Sentinel(process)
    finally:
        await _stop(process, stop_timeout_s)


async def keep_sentinel(
    post: Post, *, on_lost: Callable[[str], None], command: Sequence[str] = COMMAND, retry_s: float = 5.0
) -> None:
    """A task: have a sentinel watch this process until cancelled, and another one when it is lost.

    Training goes on without one in the meantime; `on_lost` is told why, each time.
    """
    while True:
        try:
            async with sentinel_process(post, command=command) as sentinel:
                code = await sentinel.ended()
            on_lost(f"it ended with code {code}")
        except SentinelFailedError as error:
            on_lost(str(error))
        await anyio.sleep(retry_s)


async def _spawn(command: Sequence[str]) -> Process:
    # Shielded, since a process that is half started belongs to nobody who could end it.
    with anyio.CancelScope(shield=True):
        try:
            # A session of its own: Ctrl-C in a terminal is for the service, which drains first.
            process = await anyio.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, start_new_session=True
            )
        except OSError as error:
            raise SentinelFailedError(f"the sentinel cannot be started: {error}") from error
    return process


async def _announced(process: Process) -> None:
    if process.stdout is None:
        raise RuntimeError("the process was started without this pipe")
    try:
        line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", _ANNOUNCEMENT_BYTES_MAX)
        watching = json.loads(line)["watching"] == os.getpid()
    except (anyio.IncompleteRead, anyio.BrokenResourceError):
        raise SentinelFailedError(f"the sentinel ended with code {await process.wait()}") from None
    except (anyio.DelimiterNotFound, ValueError, KeyError, TypeError):
        watching = False
    if not watching:
        raise SentinelFailedError("the sentinel does not say that it watches this process")


async def _stop(process: Process, timeout_s: float) -> None:
    """End it by the end of its input, or else by SIGKILL, cancelled or not."""
    with anyio.CancelScope(shield=True):
        if process.stdin is not None:
            await process.stdin.aclose()
        with anyio.move_on_after(timeout_s):
            await process.wait()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        await process.aclose()
