"""`Rendezvous`: where other machines join the group, and which of them take part in each generation of it.

The machines stay connected while the group is started again. Who takes part is decided before each start and does not
change until the group ends: a machine that comes later waits for the next start, so that it disturbs no sound run.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

import anyio
import anyio.to_thread
import structlog
from anyio.abc import SocketStream, TaskGroup, TaskStatus
from anyio.streams.memory import MemoryObjectReceiveStream

from tolaria.config import Address, Settings
from tolaria.config.ranks import PEER_LOST, read_secret
from tolaria.errors import BindError, ChannelError, JoinRefusedError
from tolaria.ranks import admission
from tolaria.ranks.admission import (
    Accepted,
    Alive,
    AskStacks,
    Joining,
    KeepReplicas,
    RanksEnded,
    RankSilent,
    RankStacks,
    Ready,
    Refused,
    ReplicaFollows,
    ReplicaReady,
    ReplicasHeld,
    ReplicaStored,
    RunOver,
    StartRanks,
    StopRanks,
)
from tolaria.ranks.channel import Channel, remote_host
from tolaria.ranks.liveness import BEATS, Standstill
from tolaria.ranks.replicas import piece_of
from tolaria.transport.nodes import Formation, JoinedNode

_HANDSHAKE_S: Final = 10.0
_HANDSHAKES_MAX: Final = 32
_UNSENT_MAX: Final = 64
_SAY_S: Final = 30.0
_LAST_WORDS_S: Final = 1.0
_STACKS_S: Final = 4.0
_FAILURES_SAID_MAX: Final = 10
_LOSSES_MAX: Final = 3
"""Losses of a machine within `lane.restarts_within_s` after which a group starts without it if it can."""

_log = structlog.get_logger(__name__)


class GroupOwner(Protocol):
    """What a `Rendezvous` reports the end of a group to."""

    def on_node_lost(self, host: str, why: str) -> None:
        """A machine of the present group has gone."""

    def on_ranks_ended(self, host: str, code: int, lines: Sequence[str]) -> None:
        """The ranks on a machine of the present group have failed, with that code and these last lines."""


class Rendezvous:
    """The machines that have joined. Used on the event loop only; `serve` is its task.

    Args:
        settings: the group's, and the job that machines must have.
        owner: learns of what ends the group.

    Attributes:
        settings: those of the lane; a reload replaces them.
        waiting: what a start waits for, since `waiting_since_s` of the monotonic clock; empty if none does.
        silent_rank_ns: when a machine has said that one of its ranks is silent, as `LanePage.silent_rank_ns`.
    """

    def __init__(self, settings: Settings, owner: GroupOwner) -> None:
        self.settings, self._job = settings.lane, settings.training.job
        self._with_replicas = settings.rollback.replicas > 0
        self._secret = b""
        self._owner = owner
        self._address = Address.parse(settings.lane.rendezvous)
        self._nodes: list[JoinedNode] = []
        self._handshakes: list[anyio.CancelScope] = []
        self._generation = 0  # of the present group; 0: there is none
        self._tasks: TaskGroup | None = None
        self._losses: dict[str, list[float]] = {}
        self._failed: deque[float] = deque()
        self._changed, self._heard = anyio.Event(), anyio.Event()
        self.waiting, self.waiting_since_s = "", 0.0
        self.silent_rank_ns = 0
        self._stacks: dict[int, str] = {}
        self._stacks_wanted = 0
        self._stacks_complete = anyio.Event()

    async def serve(self, *, task_status: TaskStatus[None]) -> None:
        """Accepts machines until cancelled.

        Raises:
            ConfigurationError: the file with the secret cannot be read, or is too short.
            BindError: the address cannot be listened on.
        """
        self._secret = await anyio.to_thread.run_sync(read_secret, self.settings.secret_file)
        await anyio.to_thread.run_sync(admission.torch_version)
        try:
            listener = await anyio.create_tcp_listener(local_host=self._address.host, local_port=self._address.port)
        except OSError as error:
            cause = error.strerror or str(error)
            raise BindError("lane.rendezvous", str(self._address), cause) from error
        async with listener, anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._watch)
            task_status.started()
            await listener.serve(self._serve_connection)

    # -- the group ---------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[JoinedNode, ...]:
        """The machines that are connected, in the order of joining."""
        return tuple(self._nodes)

    async def changed(self) -> None:
        """Waits until a machine joins, is ready, or leaves."""
        await self._changed.wait()

    @property
    def can_grow(self) -> bool:
        """Whether a new start of the group would have more machines."""
        members = sum(node.member for node in self._nodes)
        return len(self._usable(members)) > 0 and members < self.settings.nodes_max - 1

    def _usable(self, others: int = 0) -> list[JoinedNode]:
        """Returns the machines that can start ranks, beside `others` that have.

        One that was lost again and again comes last, and only if there are too few: it must not use up the restarts.
        """
        ready = [node for node in self._nodes if node.ready]
        flaky = [node for node in ready if self._lost_often(node.host)]
        steady = [node for node in ready if node not in flaky]
        return [*steady, *flaky[: max(0, self.settings.nodes_min - 1 - others - len(steady))]]

    def _lost_often(self, host: str) -> bool:
        since_s = time.monotonic() - self.settings.restarts_within_s
        self._losses[host] = [at_s for at_s in self._losses.get(host, []) if at_s >= since_s]
        return len(self._losses[host]) >= _LOSSES_MAX

    async def form(self) -> Formation:
        """Waits for enough machines; returns those of the next group, in the order of joining.

        As soon as `lane.nodes` permits the group, further machines have `lane.join_wait_s` to come.
        """
        others_min, others_max = self.settings.nodes_min - 1, self.settings.nodes_max - 1
        enough_s, said_s, self.waiting_since_s = math.inf, -math.inf, time.monotonic()
        try:
            while len(found := self._usable()) < others_max:
                now_s = time.monotonic()
                enough_s = min(enough_s, now_s) if len(found) >= others_min else math.inf
                if now_s - enough_s >= self.settings.join_wait_s:
                    break
                self.waiting = f"waiting for machines: {len(found) + 1} of {self.settings.nodes} are there"
                if now_s - said_s >= _SAY_S:
                    _log.info("waiting_for_nodes", detail=self.waiting, rendezvous=str(self._address))
                    said_s = now_s
                with anyio.move_on_after(min(_SAY_S, enough_s + self.settings.join_wait_s - now_s)):
                    await self._changed.wait()
        finally:
            self.waiting = ""
        return Formation(found[:others_max])

    def start(self, formation: Formation, generation: int) -> None:
        """Has the ranks of its machines started."""
        for node in formation.nodes:
            if node not in self._nodes:  # since `form`
                self._owner.on_node_lost(node.host, node.gone)
                return
        self._generation = generation
        for number, node in enumerate(formation.nodes, 1):
            node.ready, node.member = False, True
            node.put(StartRanks(generation, number, len(formation.nodes) + 1, formation.host, formation.port))

    def stop(self, why: str) -> None:
        """Has the ranks of the present group stopped on all machines."""
        self._generation = 0
        for node in self._nodes:
            if node.member:
                node.member = False
                node.put(StopRanks(why[:1000]))

    async def stacks(self) -> dict[int, str]:
        """Returns the stacks of the ranks on other machines of the present group, of those that answer within 4 s."""
        members = [node for node in self._nodes if node.member]
        self._stacks, self._stacks_complete = {}, anyio.Event()
        self._stacks_wanted = sum(node.asked.processes for node in members)
        for node in members:
            node.put(AskStacks())
        if members:
            with anyio.move_on_after(_STACKS_S):
                await self._stacks_complete.wait()
        return self._stacks

    def _take_stacks(self, message: RankStacks) -> None:
        if len(self._stacks) < self._stacks_wanted:
            self._stacks[message.rank] = message.stacks
        if len(self._stacks) == self._stacks_wanted:
            self._stacks_complete.set()

    async def settled(self) -> bool:
        """Waits until each machine of the present group has been heard from again, or one is lost; False then.

        Ranks that lost the connection to others may have ended before the silence of a machine has lasted for
        `lane.node_timeout_s`, so that it is not known yet whether it is the cause. A loss is reported meanwhile.
        """
        since_s, members = time.monotonic(), [node for node in self._nodes if node.member]
        while all(node in self._nodes for node in members) and any(node.heard_s <= since_s for node in members):
            await self._heard.wait()
        return all(node in self._nodes for node in members)

    async def end(self, *, failed: bool, detail: str) -> None:
        """Has all machines end their commands, since the run has ended."""
        for node in self._nodes:
            node.member = False
            node.put(RunOver(failed, detail[:1000]))
        with anyio.move_on_after(_LAST_WORDS_S):
            while self._nodes:  # each hangs up
                await self._changed.wait()

    # -- connections -------------------------------------------------------------------------------------------------

    async def _serve_connection(self, stream: SocketStream) -> None:
        """Serves one connection, from a machine or from anything else."""
        async with stream:
            try:
                address = remote_host(stream)
                channel, asked = await self._admitted(stream)
            except (OSError, LookupError):  # it has gone before its address could be asked for
                return
            except (ChannelError, JoinRefusedError) as error:
                self._say_failed(address, str(error))
            else:
                await self._serve_node(channel, asked)

    async def _admitted(self, stream: SocketStream) -> tuple[Channel, Joining]:
        """Opens the channel and answers the machine. Raises ChannelError or JoinRefusedError if it may not join.

        Of too many that have not proved to have the secret, the oldest one is hung up on.
        """
        if len(self._handshakes) >= _HANDSHAKES_MAX:
            self._handshakes.pop(0).cancel()
        with anyio.CancelScope() as scope:
            self._handshakes.append(scope)
            try:
                with anyio.move_on_after(_HANDSHAKE_S):
                    channel, content = await Channel.accept(stream, self._secret)
                    asked = admission.for_service(content)
                    if not isinstance(asked, Joining):
                        raise ChannelError(f"the first message is {asked.kind}")
                    await self._answer(channel, asked)
                    return channel, asked
                raise ChannelError(f"it has not proved to have the secret within {_HANDSHAKE_S:g} s")
            finally:
                with suppress(ValueError):
                    self._handshakes.remove(scope)
        raise ChannelError("too many connections at once")

    def _say_failed(self, address: str, detail: str) -> None:
        """Logs a connection that was no join, at most ten a minute."""
        now_s = time.monotonic()
        while self._failed and self._failed[0] < now_s - 60:
            self._failed.popleft()
        if len(self._failed) < _FAILURES_SAID_MAX:
            self._failed.append(now_s)
            _log.warning("join_failed", address=address, detail=detail)

    async def _answer(self, channel: Channel, asked: Joining) -> None:
        refused: Refused | None = None
        others = [node for node in self._nodes if node.asked.identity != asked.identity]
        if problem := admission.version_problem(asked):
            refused = Refused("version", problem)
        elif len(others) >= self.settings.nodes_max - 1:
            names = ", ".join(node.host for node in others)
            refused = Refused(
                "full", f"lane.nodes is {self.settings.nodes}, and there are this service's and {names}"[:4096]
            )
        if refused is not None:
            await channel.send(admission.packed(refused))
            raise JoinRefusedError(refused.reason, refused.detail)
        digest = await anyio.to_thread.run_sync(admission.job_digest, self._job)
        await channel.send(admission.packed(Accepted(self._job, digest, self.settings.node_timeout_s)))

    async def _serve_node(self, channel: Channel, asked: Joining) -> None:
        for old in [node for node in self._nodes if node.asked.identity == asked.identity]:
            old.drop("it has connected again")
        put, take = anyio.create_memory_object_stream[admission.ToMachine](_UNSENT_MAX)
        async with put, take, anyio.create_task_group() as tasks:
            timeout_s = self.settings.node_timeout_s
            node = JoinedNode(asked, channel, put, tasks.cancel_scope, time.monotonic(), timeout_s)
            self._nodes.append(node)
            self._wake_changed()
            _log.info("node_joined", host=node.host, processes=asked.processes)
            if not self._with_replicas:  # what it keeps for an earlier service is of no use
                node.put(KeepReplicas(()))
            try:
                tasks.start_soon(self._send_all, node, take)
                await self._receive_all(node)
            finally:
                self._nodes.remove(node)
                node.replicas.close()
                self._wake_changed()
                self._wake_settled()
                tasks.cancel_scope.cancel()
                _log.info("node_left", host=node.host, detail=node.gone)
                if node.member:
                    node.member = False
                    self._losses.setdefault(node.host, []).append(time.monotonic())
                    if self._lost_often(node.host):
                        _log.warning("node_lost_often", host=node.host, detail="the group starts without it if it can")
                    self._owner.on_node_lost(node.host, node.gone)

    async def _receive_all(self, node: JoinedNode) -> None:
        try:
            while True:
                content = await node.channel.receive()
                node.heard_s = time.monotonic()
                self._wake_settled()
                if (piece := piece_of(content)) is not None:
                    await node.replicas.take_in(piece)
                else:
                    await self._take(node, admission.for_service(content))
        except ChannelError as error:
            node.gone = str(error)

    async def _take(self, node: JoinedNode, message: admission.ToService) -> None:
        """Handles a message. Raises ChannelError if it ends the connection."""
        match message:
            case ReplicaReady() | ReplicaStored() | ReplicasHeld() | ReplicaFollows():
                await node.replicas.take_in(message)
            case Ready() if not node.member:
                node.ready = True
                self._wake_changed()
            case RanksEnded() if node.member and message.generation == self._generation:
                node.member = False
                self._report(node.host, message)
            case RankStacks() if node.member:
                self._take_stacks(message)
            case RankSilent() if node.member:
                self.silent_rank_ns = time.monotonic_ns()
            case Joining():
                raise ChannelError("it joins twice")
            case Ready() | RanksEnded() | RankStacks() | RankSilent() | Alive():
                pass

    def _wake_changed(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _wake_settled(self) -> None:
        self._heard.set()
        self._heard = anyio.Event()

    def _report(self, host: str, message: RanksEnded) -> None:
        """Reports ranks that have failed: at once, or if they only miss others, once it is known who is lost."""
        if message.code == PEER_LOST and self._tasks is not None:
            self._tasks.start_soon(self._report_when_settled, host, message)
        elif message.code:
            self._owner.on_ranks_ended(host, message.code, message.lines)

    async def _report_when_settled(self, host: str, message: RanksEnded) -> None:
        if await self.settled() and message.generation == self._generation:
            self._owner.on_ranks_ended(host, message.code, message.lines)

    async def _send_all(self, node: JoinedNode, messages: MemoryObjectReceiveStream[admission.ToMachine]) -> None:
        with suppress(ChannelError):
            async for message in messages:
                await node.send(admission.packed(message))

    async def _watch(self) -> None:
        """Sends heartbeats, and drops machines that have been silent for too long."""
        timeout_s = self.settings.node_timeout_s
        standstill = Standstill(timeout_s / BEATS, timeout_s)
        while True:
            await standstill.sleep()
            for node in list(self._nodes):
                node.put(Alive())
                silent_s = time.monotonic() - node.heard_s
                if silent_s > timeout_s and standstill.is_over:
                    node.drop(f"it has been silent for {silent_s:.0f} s")
