"""The reference peers as child processes of this one: started, started again when they die, gone when the block ends.

Owns when a peer runs. Must not know what the peers serve, nor how a process is kept (`peer_process`).
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio.abc import TaskGroup

from tolaria.errors import PeerUnavailableError
from tolaria.peers.connect import Peer
from tolaria.reference.peer_process import PeerProcess, spawn, stop

BOTH: tuple[Peer, ...] = ("tamiyo", "kasmina")
_ANY_PORT = "127.0.0.1:0"
_LAST_WORDS_S = 1.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a peer that died is started again: on the port that it had, where its callers look for it."""

    in_a_row_max: int = 5
    """Starts anew in a row before it is given up. 5: what a quarter of a minute does not mend, stays."""

    pause_s: float = 0.5
    """Wait before the first start anew; each further one in a row waits twice as long. 0.5: a boundary or two."""

    lived_s: float = 30.0
    """A life of this length ends the row. 30: a peer that serves so long did not die of being started."""


RESTARTS = Restarts()


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """Where the peers listen, as host:port; empty for one that was not asked for."""

    tamiyo: str
    kasmina: str
    _keepers: tuple[_Keeper, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that serve them, or did last."""
        return tuple(keeper.child.process.pid for keeper in self._keepers)


@asynccontextmanager
async def embedded_pair(
    environment: Mapping[str, str],
    peers: Sequence[Peer] = BOTH,
    *,
    command: Sequence[str] = (sys.executable, "-m", "tolaria"),
    board: Path | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 3.0,
    restarts: Restarts = RESTARTS,
) -> AsyncIterator[EmbeddedPair]:
    """Run `command peer NAME --listen 127.0.0.1:0 --while-stdin` for each of `peers` while the block runs.

    With a `board` they attend it too.

    A child's first line on standard output is {"listening": "host:port"}. It ends with its standard input, so that it
    outlives this process in no case. One that dies within the block is logged and, as `restarts` says, started again
    on its port; calls to it fail meanwhile. At the end each has `stop_timeout_s` to go by itself and as long again
    after SIGTERM, then it is killed; cancellation does not skip that, nor does a start that is under way.

    Raises:
        PeerUnavailableError: when a child cannot be started, dies, or is silent for `start_timeout_s` at the first
            start. A later one is logged.
    """
    keepers: list[_Keeper] = []
    try:
        async with anyio.create_task_group() as tasks:
            options = () if board is None else (f"--board={board}",)
            start = _Start(command, environment, options, start_timeout_s, tasks)
            try:
                for peer in peers:
                    child = await start.process(peer, _ANY_PORT)
                    keepers.append(_Keeper(child, start, restarts))
                targets = await _targets([keeper.child for keeper in keepers], start_timeout_s)
                for keeper in keepers:
                    tasks.start_soon(keeper.keep, targets[keeper.child.peer])
                yield EmbeddedPair(targets.get("tamiyo", ""), targets.get("kasmina", ""), tuple(keepers))
            finally:
                for keeper in keepers:
                    keeper.give_up()
                # While the tasks still read what the children say: none must wait for a reader.
                await stop([keeper.child for keeper in keepers], stop_timeout_s)
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Tasks raise nothing: the one error inside is the block's own, and its caller knows it by its own type.
        if len(group.exceptions) != 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
    finally:
        # Also what a start that was under way has brought since.
        for keeper in keepers:
            await keeper.child.discard()


@dataclass(frozen=True, slots=True)
class _Start:
    """How a child is started; `tasks` read what it writes."""

    command: Sequence[str]
    environment: Mapping[str, str]
    options: Sequence[str]
    timeout_s: float
    tasks: TaskGroup

    async def process(self, peer: Peer, listen: str) -> PeerProcess:
        child = await spawn(peer, self.command, self.environment, listen, self.options)
        self.tasks.start_soon(child.collect)
        return child


class _Keeper:
    """Keeps one peer alive. `child` is its process, the latest when there were several."""

    def __init__(self, child: PeerProcess, start: _Start, restarts: Restarts) -> None:
        self.child = child
        self._start = start
        self._restarts = restarts
        self._scope = anyio.CancelScope()

    def give_up(self) -> None:
        """From now on a death is no news, and nothing is started any more."""
        self._scope.cancel()

    async def keep(self, target: str) -> None:
        """See the child to its end and start another at `target`, until it is given up."""
        peer, in_a_row = self.child.peer, 0
        with self._scope:
            born_s = anyio.current_time()
            detail = await self._death()
            while True:
                await self.child.discard()
                in_a_row = 1 if anyio.current_time() - born_s >= self._restarts.lived_s else in_a_row + 1
                if in_a_row > self._restarts.in_a_row_max:
                    _log.error("embedded peer given up", peer=peer, deaths_in_a_row=in_a_row, detail=detail)
                    return
                pause_s = self._restarts.pause_s * 2 ** (in_a_row - 1)
                _log.warning("embedded peer died", peer=peer, detail=detail, starts_again_in_s=pause_s)
                await anyio.sleep(pause_s)
                born_s = anyio.current_time()
                detail = await self._another_life(target)

    async def _another_life(self, target: str) -> str:
        """Start the peer anew and see it to its end; how it ended, or why it did not start."""
        try:
            self.child = await self._start.process(self.child.peer, target)
            await _targets([self.child], self._start.timeout_s)
        except PeerUnavailableError as error:
            return str(error)
        _log.info("embedded peer started again", peer=self.child.peer, listening=target)
        return await self._death()

    async def _death(self) -> str:
        await self.child.died()
        with anyio.move_on_after(_LAST_WORDS_S):  # a process of its own may hold the pipe open
            await self.child.said_all.wait()
        return self.child.obituary()


async def _targets(children: Sequence[PeerProcess], timeout_s: float) -> dict[Peer, str]:
    """Every child's announced target. They start side by side; the time is for all of them together."""
    targets: dict[Peer, str] = {}
    with anyio.move_on_after(timeout_s):
        for child in children:
            targets[child.peer] = await child.announced()
    for child in children:
        if child.peer not in targets:
            words, detail = child.last_words(), f"has not announced where it listens within {timeout_s:g} s"
            raise PeerUnavailableError(child.peer, f"{detail}: {words}" if words else detail)
    return targets
