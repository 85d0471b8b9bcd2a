"""The reference peers as child processes of the service, for runs without another Tamiyo or Kasmina."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from tolaria.config import Address
from tolaria.errors import ChildFailedError, PeerUnavailableError
from tolaria.peers.connect import Peer
from tolaria.processes import ChildCommand, ChildSupervisor, RestartPolicy, supervised

RESTARTS = RestartPolicy(pause_s=0.5, restarts_max=5, lived_s=30.0)
"""Restarts for about 15 s: a failure that lasts longer is permanent."""

_ANY_PORT = "127.0.0.1:0"
_log = structlog.get_logger(__name__)


class EmbeddedPeer(ChildSupervisor):
    """One reference peer. Restarts listen on the port of the first start, which its clients use."""

    target: str = ""
    """Its address as host:port; empty before the first start."""

    def accept(self, announcement: Mapping[str, Any]) -> None:
        """Reads the address from {"listening": "host:port"}."""
        self.target = str(Address.parse(str(announcement["listening"])))
        arguments = [self.target if argument == _ANY_PORT else argument for argument in self.command.arguments]
        self.command = replace(self.command, arguments=arguments)

    def on_started(self) -> None:
        _log.info("embedded_peer_restarted", peer=self.command.name, listening=self.target)

    def on_ended(self, detail: str, restart_in_s: float) -> None:
        _log.warning("embedded_peer_died", peer=self.command.name, detail=detail, starts_again_in_s=restart_in_s)

    def on_given_up(self, detail: str, failures: int) -> None:
        _log.error("embedded_peer_given_up", peer=self.command.name, deaths_in_a_row=failures, detail=detail)

    def on_stderr(self, text: str) -> None:
        _log.debug("embedded_peer_wrote", peer=self.command.name, text=text.rstrip())

    def on_killed(self) -> None:
        _log.warning("embedded_peer_killed", peer=self.command.name, then="SIGKILL")


@asynccontextmanager
async def embedded_peers(
    environment: Mapping[str, str],
    peers: Sequence[Peer] = ("tamiyo", "kasmina"),
    *,
    command: Sequence[str] = (sys.executable, "-m", "tolaria"),
    board: Path | None = None,
    state_dir: Path | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 3.0,
    restarts: RestartPolicy = RESTARTS,
) -> AsyncIterator[Mapping[Peer, EmbeddedPeer]]:
    """Runs `command peer NAME --listen 127.0.0.1:0 --while-stdin` for each of `peers` while the block runs.

    At the end of the block a child has `stop_timeout_s` to exit before SIGKILL. With `board` the peers attach to that
    signal board; Tamiyo keeps its history in `state_dir`. Raises `PeerUnavailableError` when a first start failed;
    later failures are logged.
    """
    options = ("--listen", _ANY_PORT, "--while-stdin", *([] if board is None else [f"--board={board}"]))

    def options_of(peer: Peer) -> tuple[str, ...]:
        memory = state_dir is not None and peer == "tamiyo"
        return (*options, f"--state-dir={state_dir}") if memory else options

    supervisors = {
        peer: EmbeddedPeer(
            ChildCommand(peer, (*command, "peer", peer, *options_of(peer)), environment, keep_stderr=True),
            restarts=restarts,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
        )
        for peer in peers
    }
    try:
        async with supervised(*supervisors.values()):
            yield supervisors
    except ChildFailedError as error:
        raise PeerUnavailableError(error.child, error.detail) from error
