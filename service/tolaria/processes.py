"""Child processes: started in their own session, awaited until they announce themselves, restarted and stopped.

A child keeps reading standard input and exits at its end, so no child outlives this process.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

from tolaria.errors import ChildFailedError

_ANNOUNCEMENT_BYTES_MAX = 4096
_SHOWN_CHARACTERS = 200
_STDERR_CHARACTERS_MAX = 2000
_STDERR_CHUNKS_MAX = 50
_LAST_OUTPUT_S = 1.0
_DOUBLINGS_MAX = 30


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """What to run.

    Attributes:
        name: identifies the child in errors.
        arguments: program and arguments.
        environment: the child's environment; None inherits this process's own.
        keep_stderr: reads standard error and adds its end to errors; otherwise the child shares this process's.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None
    keep_stderr: bool = False


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a child that ended is started again.

    Attributes:
        pause_s: pause before the first restart in a row; doubles with each further one.
        pause_s_max: longest pause.
        restarts_max: restarts in a row before the child is given up; None for no limit.
        lived_s: a child that ran this long begins a new row.
    """

    pause_s: float
    pause_s_max: float = math.inf
    restarts_max: int | None = None
    lived_s: float = 30.0

    def pause(self, restart: int) -> float:
        """Returns the seconds to wait before restart number `restart` (from 1) in a row."""
        return min(self.pause_s * 2.0 ** min(restart - 1, _DOUBLINGS_MAX), self.pause_s_max)


class ChildSupervisor:
    """Starts, restarts and stops one child process. Subclasses override the hooks.

    Args:
        command: run at every start; a subclass may replace it in between.
        restarts: when to start the child again.
        start_timeout_s: seconds from a start to the announcement.
        stop_timeout_s: seconds from the end of standard input to SIGKILL.
    """

    def __init__(
        self, command: ChildCommand, *, restarts: RestartPolicy, start_timeout_s: float, stop_timeout_s: float
    ) -> None:
        self.command = command
        self.pid = 0
        """The latest process; 0 before the first start."""
        self._restarts = restarts
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._child: _Child | None = None

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Hook: checks the announcement. Raises KeyError, TypeError or ValueError to refuse it."""

    def on_started(self) -> None:
        """Hook: `run` started the child."""

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Hook: the child ended or failed to start, and `run` starts it after a pause."""

    def on_given_up(self, detail: str, failures: int) -> None:
        """Hook: the child ended or failed to start `failures` times in a row, and `run` returns."""

    def on_stderr(self, text: str) -> None:
        """Hook: the child wrote to standard error; only with `keep_stderr`."""

    def on_killed(self) -> None:
        """Hook: the child did not stop in time and got SIGKILL."""

    async def start(self) -> None:
        """Starts the child and returns once it announced itself.

        Raises:
            ChildFailedError: it cannot be started, ends first, announces something else, or nothing in time. No
                process is left then, nor after cancellation.
        """
        await self._start()

    async def run(self) -> None:
        """Keeps the child running until given up or cancelled, and stops it then. Starts it when `start` has not."""
        failures = 0
        while True:
            started_s = anyio.current_time()
            detail = await self._run_once()
            failures = 1 if anyio.current_time() - started_s >= self._restarts.lived_s else failures + 1
            if self._restarts.restarts_max is not None and failures > self._restarts.restarts_max:
                self.on_given_up(detail, failures)
                return
            pause_s = self._restarts.pause(failures)
            self.on_ended(detail, pause_s)
            await anyio.sleep(pause_s)

    async def stop(self) -> None:
        """Stops the child if it runs: ends its standard input, then sends SIGKILL. Cancellation does not skip it."""
        child, self._child = self._child, None
        if child is not None and not await child.close(self._stop_timeout_s):
            self.on_killed()

    async def _run_once(self) -> str:
        """Returns how the child ended, or why it did not start."""
        try:
            child = self._child
            if child is None:
                child = await self._start()
                self.on_started()
            return await child.ended()
        except ChildFailedError as error:
            return error.detail
        finally:
            await self.stop()

    async def _start(self) -> _Child:
        self._child = child = await _spawn(self)
        self.pid = child.pid
        try:
            announcement = await self._announcement(child)
            try:
                self.accept(announcement)
            except (KeyError, TypeError, ValueError):
                raise ChildFailedError(self.command.name, f"announced itself with {announcement}") from None
        except BaseException:
            await self.stop()
            raise
        return child

    async def _announcement(self, child: _Child) -> dict[str, Any]:
        name = self.command.name
        with anyio.move_on_after(self._start_timeout_s):
            line = await child.first_line()
            if line is None:
                raise ChildFailedError(name, await child.ended())
            try:
                announcement = json.loads(line)
            except ValueError:
                announcement = None
            if not isinstance(announcement, dict):
                raise ChildFailedError(name, f"announced itself with {line[:_SHOWN_CHARACTERS]!r}")
            return announcement
        detail = child.with_stderr(f"has not announced itself within {self._start_timeout_s:g} s")
        raise ChildFailedError(name, detail)


@asynccontextmanager
async def supervised(*supervisors: ChildSupervisor) -> AsyncIterator[None]:
    """Starts the children side by side, keeps them running while the block runs, and stops them side by side.

    Raises:
        ChildFailedError: a first start failed. Later failures go to the hooks.
    """
    try:
        await _start_all(supervisors)
        async with anyio.create_task_group() as tasks:
            for supervisor in supervisors:
                tasks.start_soon(supervisor.run)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The tasks raise nothing: the one error in the group is the block's own.
        if len(group.exceptions) != 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for supervisor in supervisors:
                    tasks.start_soon(supervisor.stop)


async def _start_all(supervisors: Sequence[ChildSupervisor]) -> None:
    failures: list[ChildFailedError] = []
    async with anyio.create_task_group() as tasks:

        async def start(supervisor: ChildSupervisor) -> None:
            try:
                await supervisor.start()
            except ChildFailedError as error:
                failures.append(error)
                tasks.cancel_scope.cancel()

        for supervisor in supervisors:
            tasks.start_soon(start, supervisor)
    if failures:
        raise failures[0]


class _Child:
    """One running process. `close` releases its descriptors."""

    def __init__(self, process: Process, supervisor: ChildSupervisor) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        self.pid = process.pid
        self._process = process
        self._supervisor = supervisor
        self._stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)
        self._stderr = TextReceiveStream(process.stderr, errors="replace") if process.stderr else None
        self._stderr_tail: deque[str] = deque(maxlen=_STDERR_CHUNKS_MAX)
        self._stderr_ended = anyio.Event()

    async def first_line(self) -> bytes | None:
        """Returns the first line of standard output, cut when it is too long; None when the output ends first."""
        line: bytes | None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_stderr)
            try:
                line = await self._stdout.receive_until(b"\n", _ANNOUNCEMENT_BYTES_MAX)
            except anyio.DelimiterNotFound:
                line = self._stdout.buffer
            except (anyio.IncompleteRead, anyio.BrokenResourceError):
                line = None
            tasks.cancel_scope.cancel()
        return line

    async def ended(self) -> str:
        """Waits for the end and returns the exit code and the end of standard error in words.

        Reads all output meanwhile, so that the child never blocks on a full pipe.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._discard_stdout)
            tasks.start_soon(self._read_stderr)
            await self._process.wait()
            with anyio.move_on_after(_LAST_OUTPUT_S):  # a grandchild may hold the pipe open
                await self._stderr_ended.wait()
            tasks.cancel_scope.cancel()
        return self.with_stderr(f"ended with code {self._process.returncode}")

    def with_stderr(self, detail: str) -> str:
        """Returns `detail` followed by the end of standard error, if there is any."""
        text = "".join(self._stderr_tail).strip()[-_STDERR_CHARACTERS_MAX:]
        return f"{detail}: {text}" if text else detail

    async def close(self, timeout_s: float) -> bool:
        """Ends standard input, sends SIGKILL after `timeout_s` and closes the pipes; whether the child ended itself."""
        with anyio.CancelScope(shield=True):
            await self._stdin.aclose()
            with anyio.move_on_after(timeout_s):
                await self.ended()
            stopped = self._process.returncode is not None
            if not stopped:
                with suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.aclose()
        return stopped

    async def _read_stderr(self) -> None:
        if self._stderr is not None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for text in self._stderr:
                    self._stderr_tail.append(text[-_STDERR_CHARACTERS_MAX:])
                    self._supervisor.on_stderr(text)
        self._stderr_ended.set()

    async def _discard_stdout(self) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for _ in self._stdout:
                pass


async def _spawn(supervisor: ChildSupervisor) -> _Child:
    command = supervisor.command
    # Shielded: a process that is being started when the caller is cancelled must still be stopped by the caller.
    with anyio.CancelScope(shield=True):
        try:
            # Its own session: Ctrl-C in a terminal is for the service, which drains before its children may go.
            process = await anyio.open_process(
                command.arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if command.keep_stderr else None,
                env=command.environment,
                start_new_session=True,
            )
        except OSError as error:
            raise ChildFailedError(command.name, f"cannot be started: {error}") from error
    return _Child(process, supervisor)
