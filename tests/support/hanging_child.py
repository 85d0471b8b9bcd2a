"""The child process of `support.hanging`: both peers on one port, which hang or answer immediately. Imports no torch.

python tests/support/hanging_child.py (hang | answer)

It prints its address, then a line of counts for each line of standard input, and exits at the end of standard input.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import anyio
import anyio.to_thread

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import FakeKasmina, FakeTamiyo, no_delay, serving

Behaviour = Literal["hang", "answer"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resources of a process."""

    threads: int
    tasks: int
    descriptors: int

    def beyond(self, before: Footprint) -> Footprint:
        """Returns how much more there is than before."""
        return Footprint(
            max(0, self.threads - before.threads),
            max(0, self.tasks - before.tasks),
            max(0, self.descriptors - before.descriptors),
        )


@dataclass(frozen=True, slots=True)
class Handlers:
    """Numbers of calls to a peer process, and its resources."""

    begun: int
    running: int
    cancelled: int
    footprint: Footprint


async def footprint() -> Footprint:
    """Returns the resources of this process after a garbage collection."""
    gc.collect()
    descriptors = await anyio.to_thread.run_sync(lambda: len(list(Path("/proc/self/fd").iterdir())))
    return Footprint(threading.active_count(), len(asyncio.all_tasks()), descriptors)


async def _hang(_state: SystemStatePacket | None = None) -> NoReturn:
    await anyio.sleep_forever()
    raise AssertionError("forever has ended")


async def _no_change(_state: SystemStatePacket) -> AdaptationCommand | None:
    return None


async def _serve(behaviour: str) -> None:
    hangs = behaviour == "hang"
    tamiyo = FakeTamiyo(_hang if hangs else _no_change)
    kasmina = FakeKasmina(before_answer=_hang if hangs else no_delay)
    async with serving(tamiyo, kasmina) as target:
        _print(target)
        while await anyio.to_thread.run_sync(sys.stdin.readline):
            tamiyo.states.clear()
            begun, running = tamiyo.begun + kasmina.begun, tamiyo.running + kasmina.running
            counts = Handlers(begun, running, tamiyo.cancelled + kasmina.cancelled, await footprint())
            _print(json.dumps(asdict(counts)))


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    anyio.run(_serve, sys.argv[1])
