"""How a process of the lane begins: it ends with the one that started it, and not by signals for the service."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import io
import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

from tolaria import forks
from tolaria.ranks.stacks import dump_on_request

_CREDENTIALS: Final = struct.Struct("3i")


def lane_options(program: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that the service gives the process it starts."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--service-pid", type=int, required=True, help="process id of the service")
    for name, text in (("page", "the lane's page in shared memory"), ("stdout", "standard output of the service")):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="FD", help=text)
    parser.add_argument("--connection", type=int, default=-1, metavar="FD", help="a Unix stream socket to the service")
    return parser


def announce(options: argparse.Namespace) -> None:
    """Tells the service that this process runs, and gives it the service's standard output."""
    begin(options.service_pid)
    os.write(1, json.dumps({"lane": os.getpid()}).encode() + b"\n")
    os.dup2(options.stdout, 1)
    os.close(options.stdout)
    for descriptor in (options.connection, options.page):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)  # not for programs that the job starts


def is_child_of(parent: int, asking: socket.socket) -> bool:
    """Whether the process on the other side is one that `parent` has started: abstract sockets have no owner."""
    pid, uid, _ = _CREDENTIALS.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    with suppress(OSError, IndexError):
        found = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        return uid == os.getuid() and int(found) == parent
    return False


def begin(parent: int) -> None:
    """Has this process end with the one that started it, and not by the signals that are for the service.

    The garbage collector is off until `keep_imports` is called.
    """
    gc.disable()
    forks.end_with(parent)  # also while the GIL is held
    faulthandler.enable()
    dump_on_request()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the pipe is not for the job
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a job has printed is not lost with it
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal, of systemd: the service drains, and then ends this
        signal.signal(number, _ignore)  # unlike SIG_IGN, programs that the job starts do not inherit it


def keep_imports() -> None:
    """Enables the garbage collector, which leaves out what has been imported: that stays until the end.

    Looking for garbage among it takes about a fifth of the time of the imports.
    """
    gc.freeze()
    gc.enable()


def _ignore(number: int, frame: FrameType | None) -> None:
    del number, frame
