"""`serve_child`: `tolaria serve` as a child process, whose log is read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import anyio

from tolaria.cli import errors
from tolaria.config import Address
from tolaria.processes import ChildCommand, ChildProcess, running

LOG_LINES_MAX: Final = 200
LINE_LENGTH_MAX: Final = 64 * 1024
_LOG_LINES_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """The addresses that a service has logged."""

    grpc: Address
    metrics: Address

    @classmethod
    def from_log(cls, entry: Mapping[str, Any]) -> ServiceAddresses | None:
        """Reads the log event `serving`; returns None for any other entry."""
        try:
            if entry["event"] == "serving":
                return cls(Address.parse(entry["grpc"]), Address.parse(entry["metrics"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return None


class ServeChild:
    """A `tolaria serve` child process: the last lines of its log, the addresses that it has logged, and its exit code.

    Attributes:
        log_lines: at most LOG_LINES_MAX lines of standard error, the oldest first.
        returncode: None until `wait` returns.
        pid: of the process.
    """

    def __init__(self, on_entry: Callable[[Mapping[str, Any]], None]) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self._on_entry = on_entry
        self.log_lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._unfinished = ""
        self._addresses: ServiceAddresses | None = None
        self._serving_or_ended, self._ended = anyio.Event(), anyio.Event()

    def failure(
        self, what: str, kind: type[errors.CommandFailedError] = errors.CommandFailedError
    ) -> errors.CommandFailedError:
        """Returns an error whose message ends with the last lines of the log."""
        shown = "".join(f"\n  {line}" for line in [*self.log_lines][-_LOG_LINES_SHOWN:])
        return kind(f"{what}\nlast lines of its log:{shown}" if shown else what)

    async def addresses(self, timeout_s: float) -> ServiceAddresses | None:
        """Waits until the service listens; returns None if it exits instead. Raises TimeoutError."""
        with anyio.fail_after(timeout_s):
            await self._serving_or_ended.wait()
        return self._addresses

    async def wait(self) -> None:
        """Waits until it has exited and its log has been read."""
        await self._ended.wait()

    async def watch(self, child: ChildProcess) -> None:
        """A task: reads the log until the process has exited."""
        await child.ended()
        self.returncode = child.process.returncode
        if self._unfinished:
            self._keep(self._unfinished)
        self._ended.set()
        self._serving_or_ended.set()

    def read(self, text: str) -> None:
        """Splits output into lines of bounded length."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        if len(self._unfinished) > LINE_LENGTH_MAX:
            lines, self._unfinished = [*lines, self._unfinished], ""
        for line in lines:
            self._keep(line)

    def _keep(self, line: str) -> None:
        self.log_lines.append(line[:LINE_LENGTH_MAX])
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict):
            return
        if self._addresses is None and (addresses := ServiceAddresses.from_log(entry)):
            self._addresses = addresses
            self._serving_or_ended.set()
        self._on_entry(entry)


def ignore_entry(_entry: Mapping[str, Any]) -> None:
    """Does nothing with an entry of a log."""


@asynccontextmanager
async def serve_child(
    command: Sequence[str], *, stop_timeout_s: float, on_entry: Callable[[Mapping[str, Any]], None] = ignore_entry
) -> AsyncIterator[ServeChild]:
    """Runs `command` until the block ends, then ends its standard input, and kills it after `stop_timeout_s`.

    Its standard input also ends when this process dies. `on_entry` is called with each entry of its log.
    """
    child = ServeChild(on_entry)
    process = await ChildProcess.spawn(ChildCommand("the service", command, keep_stderr=True), child.read)
    child.pid = process.process.pid
    async with running(partial(child.watch, process)):
        try:
            yield child
        finally:
            await process.close(stop_timeout_s)
