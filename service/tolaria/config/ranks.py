"""The environment of the ranks of a group: torchrun's variables, and one of Tolaria's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tolaria.errors import ConfigurationError

_AGENT: Final = "TOLARIA_LANE_AGENT"

_SECRET_BYTES_MIN: Final = 16

PEER_LOST: Final = 86
"""Exit code of a rank that ends because another one has gone."""

RAISED: Final = 85
"""Exit code of a rank that does not lead, after an exception of the job's."""


RANK_ENDED: Final = re.compile(r"rank \d+ of \d+ (was killed|ended)")
"""Matches the beginning of `rank_ended`."""


RANK_RAISED: Final = re.compile(r"rank \d+ has raised ")
"""Matches the beginning of `rank_raised`."""


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """The place of this process in its group.

    Attributes:
        rank: among all `world` ranks, from 0, which leads.
        local_rank: among the `local_world` ranks on this machine.
        node: number of this machine in the group, from 0, which is that of the service.
        agent: process id of the agent that has started it; 0 if something else has.
        address: the abstract Unix socket where the agent passes on the connection to the service.
        store_host, store_port: where the store of the group listens.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    agent: int = 0
    address: str = ""
    store_host: str = ""
    store_port: int = 0

    @classmethod
    def read(cls) -> RankEnvironment:
        """Returns the place that the environment names; that of a process alone if no agent has started it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if any(name not in os.environ for name in (*names, _AGENT)):  # torchrun's are left of something else
            return cls()
        agent, _, address = os.environ[_AGENT].partition(":")
        rank, world, local_rank, local_world = (int(os.environ[name]) for name in names)
        node = int(os.environ.get("GROUP_RANK", "0"))
        host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
        return cls(rank, world, local_rank, local_world, node, int(agent), address, host, port)


@dataclass(frozen=True, slots=True)
class NodePlace:
    """The place of a machine in a group: it is number `node` of `nodes`, of which 0 is that of the service.

    `store_listener` is a descriptor on which the store listens, on machine 0; -1: it opens one itself.
    """

    node: int = 0
    nodes: int = 1
    store_host: str = "127.0.0.1"
    store_port: int = 0
    store_listener: int = -1


def prepare_ranks(address: str, interface: str) -> None:
    """Sets what the ranks that this process, their agent, is about to start inherit.

    `interface` is the network interface through which they reach each other; empty: gloo finds one by the host's name.
    """
    os.environ[_AGENT] = f"{os.getpid()}:{address}"
    # The agent keeps its handlers of signals: SIGTERM is for the service, which then ends the agent.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGUSR2"
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("PYTHONHASHSEED", "0")  # so that sets have one order on all of them


def rank_ended(rank: int, world: int, how: str) -> str:
    """Returns the line by which an agent says how the first failed rank has ended, such as "was killed by SIGKILL"."""
    return f"rank {rank} of {world} {how}"


def rank_raised(rank: int, what: str) -> str:
    """Returns the line by which a rank says which exception of the job's ends it."""
    return f"rank {rank} has raised {what}"


def read_secret(file: str) -> bytes:
    """Returns the secret that machines of a group share, without white space around it. Raises ConfigurationError."""
    try:
        secret = Path(file).read_bytes().strip()
    except OSError as error:
        raise ConfigurationError([f"lane.secret_file: {file} cannot be read: {error.strerror or error}"]) from None
    if len(secret) < _SECRET_BYTES_MIN:
        problem = f"lane.secret_file: {file} has {len(secret)} bytes, at least {_SECRET_BYTES_MIN} are needed"
        raise ConfigurationError([f"{problem}: `openssl rand -hex 32` makes a secret"])
    return secret
