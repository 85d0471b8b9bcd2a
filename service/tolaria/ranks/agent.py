"""The agent of a group: starts the ranks of its machine with torch's elastic agent, and ends with the first that fails.

The process that the service starts in mode `torchrun`, as the process of the lane. It passes the service's connection
on to the rank that leads, and ends as the first rank that failed has ended, so that the service learns the cause. On
another machine `tolaria lane join` starts it, without a connection.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from tolaria.config.ranks import PEER_LOST, NodePlace, prepare_ranks, rank_ended
from tolaria.ranks.child import announce, is_child_of, keep_imports, lane_options
from tolaria.segments import Segment
from tolaria.signals.lane_page import SILENT_SIGNAL, LanePage

_POLL_S: Final = 0.05
_BEAT_S: Final = 0.2


def main(arguments: Sequence[str]) -> int:
    """Runs the ranks of this machine; returns 0, or ends as the first of them that failed has ended."""
    options = _options(arguments)
    announce(options)
    page = LanePage(Segment(0, os.dup(options.page)))
    signal.signal(SILENT_SIGNAL, lambda _number, _frame: page.show_silent_rank())
    address = serve_leader(options) if options.connection >= 0 else ""
    place = NodePlace(options.node, options.nodes, options.store_host, options.store_port, options.store_listener)
    prepare_ranks(address, options.interface)
    failures, world = _run(options.processes, place, page)
    if not failures:
        return 0
    rank = next((rank for rank, code in failures.items() if code != PEER_LOST), next(iter(failures)))
    return _end_like(rank, failures[rank], world)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = lane_options("python -m tolaria.ranks.agent", "The agent of a group of lanes.")
    parser.add_argument("--processes", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--interface", default="lo", help="network interface between the machines")
    one = NodePlace()
    parser.add_argument("--node", type=int, default=one.node, help="number of this machine")
    parser.add_argument("--nodes", type=int, default=one.nodes, help="number of machines")
    parser.add_argument("--store-host", default=one.store_host, help="where the store of the group listens")
    parser.add_argument("--store-port", type=int, default=one.store_port)
    parser.add_argument("--store-listener", type=int, default=one.store_listener, metavar="FD")
    return parser.parse_args(arguments)


def serve_leader(options: argparse.Namespace) -> str:
    """Gives the service's connection and page to the first of its ranks that asks; returns the address where to ask."""
    address = f"tolaria-lane-{os.getpid()}-{os.urandom(8).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + address)
    listener.listen(1)

    def serve() -> None:
        with listener:
            while not is_child_of(os.getpid(), asking := listener.accept()[0]):
                asking.close()
        with asking:
            socket.send_fds(asking, [b"\0"], [options.connection, options.page])
        os.close(options.connection)  # the service sees at once when the leader has gone
        os.close(options.page)

    threading.Thread(target=serve, name="tolaria-leader", daemon=True).start()
    return address


def _run(processes: int, place: NodePlace, page: LanePage) -> tuple[Mapping[int, int], int]:
    """Runs the ranks until all have ended or one has failed.

    Returns the exit codes of failed ones by rank, and the number of ranks on all machines.
    """
    # Only now, since it imports torch, which takes seconds.
    elastic = importlib.import_module("tolaria.ranks.elastic")
    keep_imports()
    ranks = elastic.Ranks((sys.executable, "-m", "tolaria.lane.rank"), processes, place, poll_s=_POLL_S)
    threading.Thread(target=_beat, args=(page,), name="tolaria-heartbeat", daemon=True).start()
    return dict(ranks.run()), int(ranks.world)


def _beat(page: LanePage) -> None:
    """Shows that this process runs; one that is stopped would notice no rank that ends."""
    while True:
        page.beat_agent()
        time.sleep(_BEAT_S)


def _end_like(rank: int, code: int, world: int) -> int:
    """Says which rank failed, and ends this process by the same signal, or returns the same exit code."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    os.write(2, f"{rank_ended(rank, world, how)}\n".encode())
    if code < 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank's own is enough
        with suppress(OSError):  # SIGKILL has no other action
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
