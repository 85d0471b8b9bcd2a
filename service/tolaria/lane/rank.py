"""The process of one rank of a group: `python -m tolaria.lane.rank`, started by the agent of the group."""

from __future__ import annotations

import importlib
import socket
import sys

from tolaria.config.ranks import RankEnvironment
from tolaria.lane.process import serve
from tolaria.ranks.child import begin, keep_imports


def main() -> int:
    """Runs one rank until the group ends; returns the exit code. The first one speaks with the service."""
    place = RankEnvironment.read()
    begin(place.agent)
    if place.rank == 0:
        return serve(*_descriptors(place.address))
    follow = importlib.import_module("tolaria.lane.hosting").follow
    keep_imports()
    return int(follow())


def _descriptors(address: str) -> tuple[int, int]:
    """Returns the service's connection and page, which the agent passes on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.connect("\0" + address)
        _, (connection, page), _, _ = socket.recv_fds(asking, 1, 2)
    return connection, page


if __name__ == "__main__":
    sys.exit(main())
