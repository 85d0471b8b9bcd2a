"""How a process of the lane is started: the program, what it inherits, and this side of the connection to it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tolaria.config import LaneSettings, Settings, child_environment
from tolaria.processes import ChildCommand, ChildProcess
from tolaria.signals.lane_page import LanePage
from tolaria.transport.nodes import Formation

PROGRAM: Final = (sys.executable, "-m", "tolaria.lane")
GROUP_PROGRAM: Final = (sys.executable, "-m", "tolaria.ranks.agent")


@dataclass(frozen=True, slots=True)
class StartedLane:
    """A process that waits for its order of what to build, its page, and this side of the connection to it."""

    child: ChildProcess
    page: LanePage
    connection: socket.socket


def lane_command(settings: Settings) -> ChildCommand:
    """Returns the command of every process of the lane, without the arguments, which differ."""
    return ChildCommand("lane", (), child_environment(settings, secrets=False), keep_stderr=True)


@contextmanager
def connected(page: LanePage, lane: LaneSettings, formation: Formation) -> Iterator[_Connected]:
    """Yields what one process is to be started with. Its side of the connection is closed at the end.

    So is this side after an exception.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stdout = os.dup(1)
    try:
        descriptors = {"connection": theirs.fileno(), "page": page.segment.descriptor, "stdout": stdout}
        descriptors |= formation.descriptors
        passed = [f"--{name}={descriptor}" for name, descriptor in descriptors.items()]
        program = (*GROUP_PROGRAM, f"--processes={lane.processes}") if lane.mode == "torchrun" else PROGRAM
        arguments = (*program, *formation.arguments, f"--service-pid={os.getpid()}", *passed)
        yield _Connected(arguments, tuple(descriptors.values()), ours)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(stdout)


@dataclass(frozen=True, slots=True)
class _Connected:
    arguments: tuple[str, ...]
    descriptors: tuple[int, ...]
    connection: socket.socket


def accept_lane(announcement: Mapping[str, Any]) -> None:
    """Checks what a process says first: {"lane": its process id}. Raises KeyError or TypeError to refuse it."""
    if not isinstance(announcement["lane"], int):
        raise TypeError("not a process id")
