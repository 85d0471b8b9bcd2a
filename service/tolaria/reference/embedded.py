"""The reference peers as child processes of the service, for runs without a Tamiyo or Kasmina of their own."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from tolaria.config import Address
from tolaria.errors import ChildFailedError, PeerUnavailableError
from tolaria.peers.connect import Peer
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy, supervised

BOTH: tuple[Peer, ...] = ("tamiyo", "kasmina")
RESTARTS = RestartPolicy(pause_s=0.5, restarts_max=5, lived_s=30.0)
"""About 15 s of restarts: a failure that lasts longer does not pass by itself."""

_ANY_PORT = "127.0.0.1:0"
_log = structlog.get_logger(__name__)


class EmbeddedPeer(ChildSupervisor):
    """One reference peer. Restarts listen on the port of the first start, where clients look for it.

    Attributes:
        peer: which one.
        target: its address as host:port; empty before the first start.
    """

    def __init__(
        self,
        peer: Peer,
        command: ChildCommand,
        *,
        restarts: RestartPolicy,
        start_timeout_s: float,
        stop_timeout_s: float,
    ) -> None:
        super().__init__(command, restarts=restarts, start_timeout_s=start_timeout_s, stop_timeout_s=stop_timeout_s)
        self.peer = peer
        self.target = ""

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Takes the address from {"listening": "host:port"}."""
        self.target = str(Address.parse(str(announcement["listening"])))
        arguments = [self.target if argument == _ANY_PORT else argument for argument in self.command.arguments]
        self.command = replace(self.command, arguments=arguments)

    def on_started(self) -> None:
        """Logs a restart."""
        _log.info("embedded peer started again", peer=self.peer, listening=self.target)

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        """Logs that the peer does not serve until its restart."""
        _log.warning("embedded peer died", peer=self.peer, detail=detail, starts_again_in_s=restart_in_s)

    def on_given_up(self, detail: str, failures: int) -> None:
        """Logs that the peer stays away."""
        _log.error("embedded peer given up", peer=self.peer, deaths_in_a_row=failures, detail=detail)

    def on_stderr(self, text: str) -> None:
        """Logs what the peer wrote."""
        _log.debug("peer wrote", peer=self.peer, text=text.rstrip())

    def on_killed(self) -> None:
        """Logs that the end of standard input was not enough."""
        _log.warning("embedded peer does not stop", peer=self.peer, then="SIGKILL")


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """The running peers, in the order in which they were asked for."""

    peers: tuple[EmbeddedPeer, ...]

    @property
    def tamiyo(self) -> str:
        """Tamiyo's address as host:port; empty when it was not asked for."""
        return self._target("tamiyo")

    @property
    def kasmina(self) -> str:
        """Kasmina's address as host:port; empty when it was not asked for."""
        return self._target("kasmina")

    @property
    def pids(self) -> tuple[int, ...]:
        """The latest process of each peer."""
        return tuple(peer.pid for peer in self.peers)

    def _target(self, name: Peer) -> str:
        return next((peer.target for peer in self.peers if peer.peer == name), "")


@asynccontextmanager
async def embedded_pair(
    environment: Mapping[str, str],
    peers: Sequence[Peer] = BOTH,
    *,
    command: Sequence[str] = (sys.executable, "-m", "tolaria"),
    board: Path | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 3.0,
    restarts: RestartPolicy = RESTARTS,
) -> AsyncIterator[EmbeddedPair]:
    """Runs `command peer NAME --listen 127.0.0.1:0 --while-stdin` for each of `peers` while the block runs.

    Each child gets `start_timeout_s` to announce its address and, at the end of the block, `stop_timeout_s` to exit
    before SIGKILL. With `board` the peers attend that signal board. Calls to a peer fail while it restarts.

    Raises:
        PeerUnavailableError: a first start failed; later ones are logged.
    """
    options = () if board is None else (f"--board={board}",)
    supervisors = tuple(
        EmbeddedPeer(
            peer,
            ChildCommand(
                peer,
                (*command, "peer", peer, "--listen", _ANY_PORT, "--while-stdin", *options),
                environment=environment,
                keep_stderr=True,
            ),
            restarts=restarts,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
        )
        for peer in peers
    )
    try:
        async with supervised(*supervisors):
            yield EmbeddedPair(supervisors)
    except ChildFailedError as error:
        raise PeerUnavailableError(error.child, error.detail) from error
