"""The agent of a group: starts the ranks with torch's elastic agent, and ends with the first one that fails.

The process that the service starts in mode `torchrun`, as the process of the lane. It passes the service's connection
on to the rank that leads, and ends as the first rank that failed has ended, so that the service learns the cause.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from tolaria.config.ranks import PEER_LOST, prepare_ranks, rank_ended
from tolaria.ranks.child import announce, lane_options
from tolaria.signals.lane_page import STACKS_SIGNAL

_POLL_S: Final = 0.05
_CREDENTIALS: Final = struct.Struct("3i")


def main(arguments: Sequence[str]) -> int:
    """Runs one group; returns 0, or ends as its first failed rank has ended."""
    parser = lane_options("python -m tolaria.ranks.agent", "The agent of a group of lanes.")
    parser.add_argument("--processes", type=int, required=True, help="ranks on this machine")
    options = parser.parse_args(arguments)
    announce(options)
    address = serve_leader(options)
    prepare_ranks(address)
    failures = _run(options.processes)
    if not failures:
        return 0
    rank = next((rank for rank, code in failures.items() if code != PEER_LOST), next(iter(failures)))
    return _end_like(rank, failures[rank], options.processes)


def serve_leader(options: argparse.Namespace) -> str:
    """Gives the service's connection and page to the first of its ranks that asks; returns the address where to ask."""
    address = f"tolaria-lane-{os.getpid()}-{os.urandom(8).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + address)
    listener.listen(1)

    def serve() -> None:
        with listener:
            while not _is_own_child(asking := listener.accept()[0]):
                asking.close()
        with asking:
            socket.send_fds(asking, [b"\0"], [options.connection, options.page])
        os.close(options.connection)  # the service sees at once when the leader has gone
        os.close(options.page)

    threading.Thread(target=serve, name="tolaria-leader", daemon=True).start()
    return address


def _is_own_child(asking: socket.socket) -> bool:
    """Whether the process on the other side is one that this process has started: abstract sockets have no owner."""
    pid, uid, _ = _CREDENTIALS.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    with suppress(OSError, IndexError):
        parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        return uid == os.getuid() and int(parent) == os.getpid()
    return False


def _run(processes: int) -> Mapping[int, int]:
    """Runs the ranks until all have ended or one has failed; returns the exit codes of failed ones by rank."""
    # Only now, since it imports torch, which takes seconds.
    elastic = importlib.import_module("tolaria.ranks.elastic")
    ranks = elastic.Ranks((sys.executable, "-m", "tolaria.lane.rank"), processes, poll_s=_POLL_S)
    signal.signal(STACKS_SIGNAL, lambda _number, _frame: _pass_on(STACKS_SIGNAL, ranks.pids()))
    return dict(ranks.run())


def _pass_on(number: int, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


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
