"""`tolaria serve` as a child process: started, listened to, and never left behind.

Owns the process, its pipes and the tail of its log. Must not know why it is started.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from tolaria.config import Address

LOG_LINES_MAX = 200
LINE_BYTES_MAX = 64 * 1024
_KILL_TIMEOUT_S = 5.0
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Serving:
    """Where a service says that it listens."""

    grpc: Address
    metrics: Address


class ServeChild:
    """A running child. `log_lines` are the latest lines that it wrote, the oldest first."""

    def __init__(self, transport: asyncio.SubprocessTransport, output: _Output) -> None:
        self._transport = transport
        self._output = output

    @property
    def log_lines(self) -> list[str]:
        """At most LOG_LINES_MAX lines of its standard output and error."""
        return list(self._output.lines)

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._transport.get_returncode()

    @property
    def pid(self) -> int:
        """Its process id, which leads a process group of its own."""
        return self._transport.get_pid()

    async def serving(self, timeout_s: float) -> Serving | None:
        """Wait until it serves. None when it has ended instead.

        Raises:
            TimeoutError: when neither happens within `timeout_s`.
        """
        async with asyncio.timeout(timeout_s):
            await self._output.settled.wait()
        return self._output.serving

    async def ended(self) -> None:
        """Wait until it has ended and everything that it wrote has been read."""
        await self._output.closed.wait()

    async def stop(self, timeout_s: float) -> None:
        """End it: SIGTERM, and SIGKILL to its whole group when it takes longer than `timeout_s`, or when cancelled."""
        try:
            if self.returncode is None:
                self._transport.terminate()
            async with asyncio.timeout(timeout_s):
                await self._output.exited.wait()
        except TimeoutError:
            pass
        finally:
            await self._kill_if_running()

    async def _kill_if_running(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it may have ended in this instant
                os.killpg(self.pid, signal.SIGKILL)
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await self._output.exited.wait()
        self._transport.close()


@asynccontextmanager
async def serve_child(command: Sequence[str], *, stop_timeout_s: float) -> AsyncIterator[ServeChild]:
    """Run `command` until the block ends; then it is stopped, whatever ended the block.

    The child's standard input stays open as long as this process lives: a child that ends with it survives nothing.
    It has a session of its own, so that Ctrl-C reaches it as this process decides.
    """
    loop = asyncio.get_running_loop()
    transport, output = await loop.subprocess_exec(
        _Output,
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    child = ServeChild(transport, output)
    try:
        yield child
    finally:
        await child.stop(stop_timeout_s)


class _Output(asyncio.SubprocessProtocol):
    """Reads what the child writes as it comes: no pipe fills up, and memory is bounded by lines and their length."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self.serving: Serving | None = None
        self.settled = asyncio.Event()
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()
        self._unfinished: dict[int, bytes] = {}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *finished, rest = (self._unfinished.get(fd, b"") + data).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            finished, rest = [*finished, rest], b""
        self._unfinished[fd] = rest
        for line in finished:
            self._take(line[:LINE_BYTES_MAX].decode(errors="replace"))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        if rest := self._unfinished.pop(fd, b""):
            self._take(rest.decode(errors="replace"))

    def process_exited(self) -> None:
        self.exited.set()
        # A process of the child's own that outlives it would hold the pipes open for as long as it likes.
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._close)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._close()

    def _close(self) -> None:
        self.settled.set()
        self.closed.set()

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if self.serving is None and (serving := _serving(line)):
            self.serving = serving
            self.settled.set()


def _serving(line: str) -> Serving | None:
    """The addresses in a log line that tells them; None for every other line."""
    try:
        entry = json.loads(line)
        if entry["event"] != "serving":
            return None
        return Serving(Address.parse(entry["grpc"]), Address.parse(entry["metrics"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
