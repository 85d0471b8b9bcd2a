"""`Node`: this machine as a part of a group whose service runs elsewhere; what `tolaria lane join` runs.

It connects to the rendezvous of the service, starts an agent with ranks when the group starts, stops them when the
group ends, and connects again when the connection has ended, until the run is over. Imports no torch.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from tolaria import __version__
from tolaria.config import Address, Settings, child_environment
from tolaria.errors import ChannelError, ChildFailedError, JoinRefusedError, LaneFailedError, ServiceAbsentError
from tolaria.processes import ChildCommand, ChildProcess
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    Accepted,
    Alive,
    AskStacks,
    Joining,
    RanksEnded,
    RankSilent,
    RankStacks,
    Ready,
    Refused,
    RunOver,
    StartRanks,
    StopRanks,
)
from tolaria.ranks.channel import Channel, interface_of
from tolaria.ranks.liveness import BEATS, Standstill
from tolaria.ranks.local_ranks import children_of, ranks_of
from tolaria.ranks.replica_store import ReplicaSession, ReplicaStore
from tolaria.ranks.replicas import piece_of
from tolaria.ranks.stacks import stacks_of
from tolaria.signals.lane_page import LanePage

PROGRAM: Final = (sys.executable, "-m", "tolaria.ranks.agent")
_CONNECT_S: Final = 5.0
_HANDSHAKE_S: Final = 10.0
_RETRY_S: Final = 0.5
_LOOK_S: Final = 0.5


class Node:
    """One machine that joins.

    Args:
        address: the rendezvous of the service.
        secret: that of the group.
        processes: ranks to start here.
        wait_s: seconds to wait for a service, at first or again; infinite for ever.
        full_s: seconds to try again while the group is full: the service may not have noticed that a machine is lost.
        say: prints a line for the operator; must not block.
        write: writes what the ranks write to standard error; must not block.
    """

    def __init__(
        self,
        address: Address,
        secret: bytes,
        processes: int,
        *,
        wait_s: float,
        full_s: float,
        say: Callable[[str], object],
        write: Callable[[str], object],
    ) -> None:
        self._address, self._secret, self._wait_s, self._full_s = address, secret, wait_s, full_s
        self._asked = Joining(uuid.uuid4().hex, platform.node(), processes, __version__, admission.torch_version())
        self._say, self._said = say, ""
        self._write = write
        self._replicas = ReplicaStore()

    async def run(self) -> None:
        """Takes part until the run is over.

        Raises:
            JoinRefusedError: the service refuses this machine, or this machine has another job than the service.
            ServiceAbsentError: there has been no service for too long.
            LaneFailedError: the run has failed.
        """
        absent_s = refused_s = time.monotonic()
        while True:
            try:
                channel, accepted = await self._joined()
            except ChannelError as error:
                self._say_once(f"waiting for the service at {self._address}: {error}")
                if time.monotonic() - absent_s > self._wait_s:
                    waited = f"no service at {self._address} within {self._wait_s:g} s: {error}"
                    raise ServiceAbsentError(waited) from None
            except JoinRefusedError as error:
                if error.reason != "full" or time.monotonic() - refused_s > self._full_s:
                    raise
                self._say_once(f"waiting for a place: {error.detail}")
                absent_s = time.monotonic()
            else:
                self._say_once(f"joined the group at {self._address} for {accepted.job}; waiting for its next start")
                session = _Session(
                    channel,
                    accepted,
                    self._asked.processes,
                    say=self._say_once,
                    write=self._write,
                    replicas=self._replicas,
                )
                over = await session.run()
                if over is not None:
                    if over.failed:
                        raise LaneFailedError(over.detail)
                    self._say_once(over.detail)
                    return
                absent_s = refused_s = time.monotonic()
            await anyio.sleep(_RETRY_S)

    async def _joined(self) -> tuple[Channel, Accepted]:
        """Returns an open connection to a service that accepts this machine."""
        try:
            with anyio.fail_after(_CONNECT_S):
                stream = await anyio.connect_tcp(self._address.host, self._address.port)
        except (OSError, TimeoutError) as error:
            raise ChannelError(_cause(error)) from None
        opened = False
        try:
            with anyio.fail_after(_HANDSHAKE_S):
                channel, content = await Channel.open(stream, self._secret, admission.packed(self._asked))
                accepted = await self._checked(content)
                opened = True
                return channel, accepted
        except (OSError, TimeoutError):
            raise ChannelError("no answer in time") from None
        finally:
            if not opened:
                await anyio.aclose_forcefully(stream)

    async def _checked(self, content: bytes) -> Accepted:
        """Returns the service's answer to a machine that it accepts, and that has its job."""
        answer = admission.for_machine(content)
        if isinstance(answer, Refused):
            raise JoinRefusedError(answer.reason, answer.detail)
        if not isinstance(answer, Accepted):
            raise ChannelError(f"the first answer is {answer.kind}")
        await self._check_job(answer)
        return answer

    async def _check_job(self, accepted: Accepted) -> None:
        digest = await anyio.to_thread.run_sync(admission.job_digest, accepted.job)
        if not accepted.job_digest or digest == accepted.job_digest:
            return
        if not digest:
            raise JoinRefusedError("job", f"this machine finds no module for {accepted.job}; is PYTHONPATH set?")
        raise JoinRefusedError("job", f"the file of {accepted.job} is another one than on the service's machine")

    def _say_once(self, text: str) -> None:
        """Prints a line unless it was the last one too."""
        if text != self._said:
            self._said = text
            self._say(text)


class _Session:
    """One connection to the service, and the ranks that it has started."""

    def __init__(
        self,
        channel: Channel,
        accepted: Accepted,
        processes: int,
        *,
        say: Callable[[str], object],
        write: Callable[[str], object],
        replicas: ReplicaStore,
    ) -> None:
        self._channel, self._timeout_s, self._processes = channel, accepted.timeout_s, processes
        self._say, self._write = say, write
        self._replicas = ReplicaSession(replicas, self._send_frame)
        self._sending = anyio.Lock()
        self._heard_s = time.monotonic()
        self._ranks: _LocalRanks | None = None
        self._ranks_gone = anyio.Event()
        self._why = ""

    async def run(self) -> RunOver | None:
        """Takes part until the run is over, or the connection ends; returns None then. No rank is left."""
        over: RunOver | None = None
        try:
            async with anyio.create_task_group() as tasks, self._replicas.open():
                tasks.start_soon(self._beat, tasks.cancel_scope)
                await self._send(Ready())
                while over is None:
                    content = await self._channel.receive()
                    self._heard_s = time.monotonic()
                    if (piece := piece_of(content)) is None:
                        over = await self._obey(admission.for_machine(content), tasks)
                    else:
                        self._replicas.take(piece)
                    self._heard_s = time.monotonic()
                tasks.cancel_scope.cancel()
        except* ChannelError as group:
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            self._why = self._why or str(first)
        finally:
            await self._channel.close()
        if over is None:
            self._say(f"the connection to the service is lost ({self._why}); joining again")
        return over

    async def _obey(self, message: admission.ToMachine, tasks: TaskGroup) -> RunOver | None:
        """Does what the service says; returns the message if it is the last one."""
        match message:
            case StartRanks() if self._ranks is None:
                number = f"machine {message.node + 1} of {message.nodes}"
                self._say(f"training as {number}, in generation {message.generation} of the group")
                self._ranks = _LocalRanks(message, self._processes, self._channel, self._write, self._send_silent)
                self._ranks_gone = anyio.Event()
                tasks.start_soon(self._serve_ranks, self._ranks)
            case StopRanks():
                await self._stop_ranks()
                self._say(f"{message.why}; waiting for its next start")
                await self._send(Ready())
            case AskStacks():
                if self._ranks is not None:
                    tasks.start_soon(self._send_stacks, self._ranks)
            case RunOver():
                await self._stop_ranks()
                return message
            case Alive():
                pass
            case _:
                if not self._replicas.obey(message):
                    raise ChannelError(f"the service sent {message.kind}")
        return None

    async def _serve_ranks(self, ranks: _LocalRanks) -> None:
        try:
            await ranks.run(self._timeout_s)
        finally:
            self._ranks = None
            self._ranks_gone.set()
        if not ranks.stopped:
            await self._send(RanksEnded(ranks.generation, ranks.code, tuple(ranks.lines)))
            await self._send(Ready())

    async def _send_stacks(self, ranks: _LocalRanks) -> None:
        for rank, stacks in (await ranks.stacks()).items():
            await self._send(RankStacks(rank, stacks))

    async def _send_silent(self) -> None:
        await self._send(RankSilent())

    async def _stop_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()
            await self._ranks_gone.wait()

    async def _send(self, message: admission.ToService) -> None:
        await self._send_frame(admission.packed(message))

    async def _send_frame(self, content: bytes) -> None:
        async with self._sending:
            await self._channel.send(content)

    async def _beat(self, scope: anyio.CancelScope) -> None:
        """Sends heartbeats; ends the session when the service has been silent for too long."""
        standstill = Standstill(self._timeout_s / BEATS, self._timeout_s)
        while True:
            await standstill.sleep()
            await self._send(Alive())
            silent_s = time.monotonic() - self._heard_s
            if silent_s > self._timeout_s and standstill.is_over:
                self._why = f"it has been silent for {silent_s:.0f} s"
                scope.cancel()


class _LocalRanks:
    """The agent on this machine in one generation of the group.

    Attributes:
        generation: number of the group's start.
        code: how the agent has ended: as the first of its ranks that failed; 1 if it could not be started.
        lines: the last lines of standard error.
        stopped: whether the ranks were stopped, so that how they ended says nothing.
    """

    def __init__(
        self,
        order: StartRanks,
        processes: int,
        channel: Channel,
        write: Callable[[str], object],
        on_silent: Callable[[], Awaitable[object]],
    ) -> None:
        self.generation, self.code = order.generation, 0
        self._agent = 0
        self._on_silent = on_silent
        self.lines: deque[str] = deque(maxlen=admission.LINES_MAX)
        self.stopped = False
        self._ranks: set[int] = set()
        self._line = ""
        self._order, self._processes, self._write = order, processes, write
        self._interface = interface_of(channel.local)
        self._scope = anyio.CancelScope()

    def stop(self) -> None:
        """Ends `run`, and all ranks."""
        self.stopped = True
        self._scope.cancel()

    async def stacks(self) -> dict[int, str]:
        """Returns the stacks of the ranks here, by rank."""
        return await anyio.to_thread.run_sync(lambda: stacks_of(ranks_of(self._agent) if self._agent else {}))

    async def run(self, silence_s: float) -> None:
        """Runs the agent until it ends, is stopped, or gives no heartbeat for `silence_s`."""
        page, stdout, order = LanePage.create(), os.dup(1), self._order
        place = {
            "node": order.node,
            "nodes": order.nodes,
            "store-host": order.store_host,
            "store-port": order.store_port,
        }
        options = {
            **place,
            "service-pid": os.getpid(),
            "page": page.segment.descriptor,
            "stdout": stdout,
            "processes": self._processes,
            "interface": self._interface,
        }
        command = (*PROGRAM, *(f"--{name}={value}" for name, value in options.items()))
        environment = child_environment(Settings())
        descriptors = (page.segment.descriptor, stdout)
        child: ChildProcess | None = None
        with self._scope:
            try:
                child = await ChildProcess.spawn(
                    ChildCommand("agent", command, environment, keep_stderr=True, descriptors=descriptors),
                    self._on_stderr,
                )
                await child.first_line()
                self._agent = child.process.pid
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch, page, silence_s, child)
                    await child.ended()
                    tasks.cancel_scope.cancel()
            except ChildFailedError as error:  # such as without memory: the service learns it, and may start again
                self.code = 1
                self._on_stderr(f"{error}\n")
            finally:
                os.close(stdout)
                if child is not None:
                    await self._end_all(child)
                    self.code = child.process.returncode or 0
                    self._keep_lines("\n")

    async def _watch(self, page: LanePage, silence_s: float, child: ChildProcess) -> None:
        """Kills an agent that is silent, such as a stopped one, which would notice no rank that ends."""
        said_ns = 0
        while child.process.returncode is None:
            if (silent_ns := page.silent_rank_ns) != said_ns:
                said_ns = silent_ns
                await self._on_silent()
            self._ranks.update(await anyio.to_thread.run_sync(children_of, child.process.pid))
            if (silent_s := page.agent_silent_s()) > silence_s:
                self._on_stderr(f"\nthe agent of the group has given no heartbeat for {silent_s:.0f} s\n")
                with suppress(ProcessLookupError):
                    os.kill(child.process.pid, signal.SIGKILL)
                return
            await anyio.sleep(min(_LOOK_S, silence_s / BEATS))

    async def _end_all(self, child: ChildProcess) -> None:
        """Ends the agent, its ranks, and what they have started: each rank leads a process group."""
        with anyio.CancelScope(shield=True):
            self._ranks.update(await anyio.to_thread.run_sync(children_of, child.process.pid))
            await child.close(0)
            for pid in self._ranks:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)

    def _on_stderr(self, text: str) -> None:
        self._write(text)
        self._keep_lines(text)

    def _keep_lines(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line[-admission.LINE_CHARACTERS_MAX :]
        self.lines.extend(line[: admission.LINE_CHARACTERS_MAX] for line in lines if line.strip())


def _cause(error: BaseException) -> str:
    """Returns the first cause of a failed connection, as the system says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return _cause(error.exceptions[0])
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # asyncio's own text is longer
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or "no answer"
