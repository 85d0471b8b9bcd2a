"""Child processes: started in a separate session, awaited until they announce themselves, restarted and stopped.

A child keeps reading standard input and exits at its end, so no child outlives this process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

from tolaria import forks
from tolaria.errors import ChildFailedError

_ANNOUNCEMENT_BYTES_MAX = 4096
_STDERR_CHARACTERS_MAX = 2000
_STDERR_CHUNKS_MAX = 50
_LAST_OUTPUT_S = 1.0
_DOUBLINGS_MAX = 30


@dataclass(frozen=True, slots=True)
class ChildCommand:
    """What to run: a name for errors, the program and its arguments, and the environment; None inherits it.

    `keep_stderr` reads standard error and adds its end to errors; otherwise the child shares this process's.
    `descriptors` are passed on under the same numbers.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None
    keep_stderr: bool = False
    descriptors: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a child that has ended is restarted.

    The pause begins at `pause_s` and doubles with each further restart in a row, up to `pause_s_max`. The child is
    given up after `restarts_max` restarts in a row; one that ran for `lived_s` begins a new row.
    """

    pause_s: float
    pause_s_max: float = math.inf
    restarts_max: int | None = None
    lived_s: float = 30.0

    def pause(self, restart: int) -> float:
        """Returns the seconds to wait before restart number `restart` (from 1) in a row."""
        return min(self.pause_s * 2.0 ** min(restart - 1, _DOUBLINGS_MAX), self.pause_s_max)


class ChildProcess:
    """One running process. `on_stderr`, which may be replaced, is called with what it writes there, if that is kept.

    `stdin` is the descriptor of the pipe to it, which this object closes.
    """

    def __init__(self, process: Process, stdin: int, on_stderr: Callable[[str], None]) -> None:
        self.process = process
        self.on_stderr = on_stderr
        self._stdin: int | None = stdin
        self._stdout = BufferedByteReceiveStream(cast("ByteReceiveStream", process.stdout))
        self._stderr = TextReceiveStream(process.stderr, errors="replace") if process.stderr else None
        self._stderr_tail: deque[str] = deque(maxlen=_STDERR_CHUNKS_MAX)
        self._stderr_ended = anyio.Event()
        self._is_read = False

    @classmethod
    async def spawn(cls, command: ChildCommand, on_stderr: Callable[[str], None]) -> ChildProcess:
        """Starts a process. Cancellation takes effect once it runs. Raises ChildFailedError if it cannot be started."""
        # Without forks, which would inherit the ends of pipes that are for the child.
        with anyio.CancelScope(shield=True), ExitStack() as on_failure:
            async with forks.without_forks():
                for_child, stdin = os.pipe()
                on_failure.callback(forks.close, forks.keep_private(stdin))
                try:
                    # A separate session: Ctrl-C is for the service, which drains before its children stop.
                    process = await anyio.open_process(
                        command.arguments,
                        stdin=for_child,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE if command.keep_stderr else None,
                        env=command.environment,
                        start_new_session=True,
                        pass_fds=command.descriptors,
                    )
                except OSError as error:
                    raise ChildFailedError(command.name, f"cannot be started: {error}") from error
                finally:
                    os.close(for_child)
            on_failure.pop_all()
        return cls(process, stdin, on_stderr)

    async def first_line(self) -> bytes | None:
        """Returns the first line of standard output, cut when it is too long; None when the output ends first."""
        line = None
        async with running(self._read_stderr):
            with suppress(anyio.IncompleteRead, anyio.BrokenResourceError):
                try:
                    line = await self._stdout.receive_until(b"\n", _ANNOUNCEMENT_BYTES_MAX)
                except anyio.DelimiterNotFound:
                    line = self._stdout.buffer
        return line

    async def ended(self) -> str:
        """Waits for the end and describes it by the exit code and the end of standard error.

        Reads all output meanwhile, so that the child never blocks on a full pipe. Several tasks may wait if the
        first to begin is the last to stop waiting.
        """
        readers = () if self._is_read else (self._discard_stdout, self._read_stderr)
        self._is_read = True
        try:
            async with running(*readers):
                await self.process.wait()
                with anyio.move_on_after(_LAST_OUTPUT_S):  # a grandchild may hold the pipe open
                    await self._stderr_ended.wait()
        finally:
            self._is_read = not readers
        return self.with_stderr(f"ended with code {self.process.returncode}")

    def with_stderr(self, detail: str) -> str:
        """Returns `detail` followed by the end of standard error, if there is any."""
        text = "".join(self._stderr_tail).strip()[-_STDERR_CHARACTERS_MAX:]
        return f"{detail}: {text}" if text else detail

    async def close(self, timeout_s: float) -> bool:
        """Ends standard input, and kills the process group after `timeout_s`; returns whether the child ended by then.

        Cancel scopes around it have no effect; cancelling the asyncio task kills at once.
        """
        with anyio.CancelScope(shield=True):
            try:
                if self._stdin is not None:
                    stdin, self._stdin = self._stdin, None
                    forks.close(stdin)
                with anyio.move_on_after(timeout_s):
                    await self.ended()
            finally:
                if kills := self.process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)
                await self.process.aclose()
        return not kills

    async def _read_stderr(self) -> None:
        if self._stderr is not None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for text in self._stderr:
                    self._stderr_tail.append(text[-_STDERR_CHARACTERS_MAX:])
                    self.on_stderr(text)
        self._stderr_ended.set()

    async def _discard_stdout(self) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for _ in self._stdout:
                pass


class ChildSupervisor:
    """Starts, restarts and stops one child process. Subclasses override the hooks.

    Args:
        command: run at every start; a subclass may replace it in between.
        restarts: when to start the child again.
        start_timeout_s: seconds from a start to the announcement.
        stop_timeout_s: seconds from the end of standard input to SIGKILL; may be changed.
    """

    def __init__(
        self, command: ChildCommand, *, restarts: RestartPolicy, start_timeout_s: float, stop_timeout_s: float
    ) -> None:
        self.command = command
        self.pid = 0
        """The latest process; 0 before the first start."""
        self._restarts = restarts
        self._start_timeout_s = start_timeout_s
        self.stop_timeout_s = stop_timeout_s
        self.wanted = True
        """Whether `run` starts the child again when it has ended."""
        self._child: ChildProcess | None = None

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Hook: checks the announcement. Raises KeyError, TypeError or ValueError to refuse it."""

    def on_started(self) -> None:
        """Hook: `run` started the child."""

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Hook: the child ended or failed to start, and `run` restarts it after a pause."""

    def on_last_end(self, detail: str) -> None:
        """Hook: the child ended or failed to start, and is not `wanted` any more, so that `run` returns."""

    def on_given_up(self, detail: str, failures: int) -> None:
        """Hook: the child ended or failed to start `failures` times in a row, and `run` returns."""

    def on_stderr(self, text: str) -> None:
        """Hook: the child wrote to standard error; only with `keep_stderr`."""

    def on_killed(self) -> None:
        """Hook: the child did not stop in time and got SIGKILL."""

    async def start(self) -> ChildProcess:
        """Starts the child; returns once it has announced itself by a JSON object on the first line of its output.

        Raises:
            ChildFailedError: it cannot be started, ends first, or makes no valid announcement in time. No process
                is left running then, nor after cancellation.
        """
        name = self.command.name
        self._child = child = await ChildProcess.spawn(self.command, self.on_stderr)
        self.pid = child.process.pid
        async with AsyncExitStack() as on_failure:
            on_failure.push_async_callback(self.stop)
            with anyio.move_on_after(self._start_timeout_s):
                line = await child.first_line()
                if line is None:
                    raise ChildFailedError(name, await child.ended())
                try:
                    self.accept(json.loads(line))
                except (KeyError, TypeError, ValueError):
                    raise ChildFailedError(name, f"announced itself with {line[:200]!r}") from None
                on_failure.pop_all()
                return child
            silent = f"has not announced itself within {self._start_timeout_s:g} s"
            raise ChildFailedError(name, child.with_stderr(silent))

    async def run(self) -> None:
        """Keeps the child running until it is given up or this is cancelled; then stops it. Starts it if needed."""
        failures = 0
        while True:
            started_s = anyio.current_time()
            try:
                if (child := self._child) is None:
                    child = await self.start()
                    self.on_started()
                detail = await child.ended()
            except ChildFailedError as error:
                detail = error.detail
            finally:
                await self.stop()
            if not self.wanted:
                self.on_last_end(detail)
                return
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
        if child is not None and not await child.close(self.stop_timeout_s):
            self.on_killed()


@asynccontextmanager
async def running(*functions: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Runs the functions, which must not raise, while the block runs, and cancels them at its end.

    Unlike in a task group, an error in the block is raised unchanged.
    """
    try:
        async with anyio.create_task_group() as tasks:
            for function in functions:
                tasks.start_soon(function)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__


@asynccontextmanager
async def supervised(*supervisors: ChildSupervisor) -> AsyncIterator[None]:
    """Starts the children concurrently, keeps them running while the block runs, and stops them concurrently.

    Raises:
        ChildFailedError: a first start failed. Later failures go to the hooks.
    """
    try:
        try:
            await _all(supervisor.start for supervisor in supervisors)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        async with running(*(supervisor.run for supervisor in supervisors)):
            yield
    finally:
        with anyio.CancelScope(shield=True):
            await _all(supervisor.stop for supervisor in supervisors)


async def _all(functions: Iterable[Callable[[], Coroutine[Any, Any, object]]]) -> None:
    async with anyio.create_task_group() as tasks:
        for function in functions:
            tasks.start_soon(function)
