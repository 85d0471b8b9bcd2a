"""`Chaos`: kills processes of a service's lane while it trains, one after another, and records each recovery."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from leyline.v1.admin_service_pb2 import GetStatusRequest, GetStatusResponse, RunState
from tolaria.checkpoint.directory import JOURNAL
from tolaria.cli.admin_commands import TIMEOUT_S
from tolaria.cli.client import Target, admin_stub
from tolaria.cli.process_tree import ProcessTree
from tolaria.config import Settings
from tolaria.errors import ConfigurationError, TolariaError
from tolaria.processes import running
from tolaria.ranks.local_ranks import ranks_of

CHAOS_SETTINGS: Final[Mapping[str, object]] = {
    "training.deterministic": True,
    # Few steps are taken again, however long they take.
    "rollback.every_steps": 10,
    # A stopped process is missed within seconds.
    "emergency.heartbeat_timeout_s": 5,
    "emergency.phase_timeout_s": 20,
}
"""Settings of a demo with chaos; each can be overridden."""

DEATHS_MAX: Final = 4
_EPOCHS_PER_DEATH: Final = 3
_SIGNALS: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
_AGENT: Final = "the agent"
_LANE: Final = "the lane"
_POLL_S: Final = 0.02
_RETRY_S: Final = 0.5
_LIVE: Final = {RunState.RUN_STATE_RUNNING, RunState.RUN_STATE_FINISHED}


@dataclass(frozen=True, slots=True)
class Injury:
    """What is done to a process of the lane, once a share `at` of the run's steps is done."""

    victim: str
    signal: signal.Signals
    at: float


@dataclass(slots=True)
class Death:
    """What followed an injury.

    Attributes:
        injury: what was done.
        step: the step that the run had reached.
        at_s: when, on the monotonic clock.
        cause: the service's word for it; empty if it has not noticed.
        processes: how many processes of the lane have died until one was back.
        lost_step: the last step before the death that the service knows.
        restored_step: the step of the state with which training went on; None if it did not.
        recovery_s: seconds from the injury to the first step after that; None if there was none.
    """

    injury: Injury
    step: int
    at_s: float
    cause: str = ""
    processes: int = 0
    lost_step: int = 0
    restored_step: int | None = None
    recovery_s: float | None = None

    @property
    def repeated(self) -> int:
        """Steps that were taken again."""
        return max(0, self.lost_step - (self.lost_step if self.restored_step is None else self.restored_step))


def ranks_in(settings: Settings) -> int:
    """Returns the number of processes that train."""
    return settings.lane.processes if settings.lane.mode == "torchrun" else 1


def injuries_of(settings: Settings) -> tuple[Injury, ...]:
    """Returns what is done in a run with these settings; equal settings give equal injuries.

    Victims and signals take turns, in a random order.
    """
    generator = random.Random(settings.training.seed)  # noqa: S311 - repeatable, not secret
    victims = [_LANE]
    if settings.lane.mode == "torchrun":
        victims = [_AGENT, *(f"rank {rank}" for rank in range(settings.lane.processes))]
    possible = [(victim, how) for victim in victims for how in _SIGNALS]
    generator.shuffle(possible)
    count = min(DEATHS_MAX, 1 + settings.training.epochs // _EPOCHS_PER_DEATH)
    used, found = Counter[object](), list[Injury]()
    for number in range(count):
        victim, how = min(possible, key=lambda pair: sum(used[each] for each in (*pair, pair)))
        used.update((victim, how, (victim, how)))
        found.append(Injury(victim, how, (number + generator.uniform(0.6, 1.0)) / (count + 0.5)))
    return tuple(found)


def check_chaos(settings: Settings, *, stay: bool, alone: bool) -> None:
    """Raises ConfigurationError with each reason for which a demo could not show what chaos costs."""
    problems = []
    if stay:
        problems.append("--chaos cannot be combined with --stay: it shows that no process is left")
    if alone:
        problems.append("--chaos cannot be combined with --alone: it compares with an undisturbed run beside it")
    if sys.platform != "linux":
        problems.append("--chaos needs Linux, where the processes of the lane can be found")
    if settings.lane.mode == "thread":
        problems.append("lane.mode is thread: --chaos would kill the service itself; process and torchrun are possible")
    if not settings.training.deterministic:
        problems.append("training.deterministic is off: --chaos compares two runs bit by bit")
    if not (settings.checkpoint.every_epochs or settings.checkpoint.every_steps):
        problems.append("checkpoint.every_epochs and every_steps are 0: --chaos compares the last checkpoints")
    if settings.lane.restarts_max < DEATHS_MAX:
        problems.append(f"lane.restarts_max is {settings.lane.restarts_max}: --chaos needs {DEATHS_MAX} at least")
    if "dir" in settings.state.model_fields_set and (Path(settings.state.dir) / JOURNAL).exists():
        problems.append(f"state.dir: {settings.state.dir} holds earlier runs; --chaos needs an empty directory")
    if problems:
        raise ConfigurationError(problems)


class Chaos:
    """Injures the lane of one service.

    Attributes:
        injuries: what is to be done, in this order.
        deaths: what has been done.
        uninvited: causes of deaths that nothing done here explains.
        tree: all processes of the demo's services.
    """

    def __init__(self, injuries: Sequence[Injury]) -> None:
        self.injuries = tuple(injuries)
        self.deaths: list[Death] = []
        self.uninvited: list[str] = []
        self.tree = ProcessTree()
        self._pid = 0

    def on_entry(self, entry: Mapping[str, Any]) -> None:
        """Handles an entry of the service's log."""
        death = self._open
        match entry:
            case {"event": "lane_started", "pid": int(pid)}:
                self._pid = pid
            case {"event": "tolaria.lane_lost", "cause": cause, "step": int(step), "detail": detail}:
                if death is None or death.restored_step is not None:
                    self.uninvited.append(str(detail))
                else:
                    death.cause, death.lost_step = death.cause or str(cause), max(step, death.lost_step)
                    death.processes += 1
            case {"event": "tolaria.lane_recovered", "step": int(step)} if death is not None:
                death.restored_step = step

    def observe(self, status: GetStatusResponse) -> None:
        """Handles a status: the first step after a recovery ends it."""
        death = self._open
        if death is None or death.restored_step is None or status.state not in _LIVE:
            return
        if status.global_step > death.restored_step:
            death.recovery_s = time.monotonic() - death.at_s

    @asynccontextmanager
    async def inflicted(self, service: int, target: Target) -> AsyncIterator[None]:
        """Injures the lane of the service, a running process, while the block runs."""
        self.tree.add(service)
        async with running(self.tree.watch, partial(self._inflict, target)):
            yield
            await anyio.to_thread.run_sync(self.tree.look)

    @property
    def _open(self) -> Death | None:
        """The latest death, as long as the service has not recovered from it."""
        return self.deaths[-1] if self.deaths and self.deaths[-1].recovery_s is None else None

    async def _inflict(self, target: Target) -> None:
        """A task: injures and observes, until cancelled."""
        while True:
            try:
                async with admin_stub(target) as stub:
                    while True:
                        status = await stub.GetStatus(GetStatusRequest(), timeout=TIMEOUT_S)
                        self.observe(status)
                        await self._injure(status)
                        await anyio.sleep(_POLL_S)
            except TolariaError:  # the service is busy, or ends
                await anyio.sleep(_RETRY_S)

    async def _injure(self, status: GetStatusResponse) -> None:
        """Does what is due."""
        if status.state != RunState.RUN_STATE_RUNNING or self._open is not None:
            return
        if len(self.deaths) == len(self.injuries):
            return
        injury = self.injuries[len(self.deaths)]
        steps = status.steps or status.epochs * status.steps_per_epoch
        if not steps or status.global_step < injury.at * steps:
            return
        await anyio.to_thread.run_sync(self.tree.look)
        pid = await anyio.to_thread.run_sync(self._pid_of, injury.victim)
        if not pid:
            return
        self.deaths.append(Death(injury, status.global_step, time.monotonic()))
        try:
            os.kill(pid, injury.signal)
        except ProcessLookupError:
            self.deaths.pop()

    def _pid_of(self, victim: str) -> int:
        """Returns the id of a running process; 0 if there is none now."""
        if not self._pid or victim in {_AGENT, _LANE}:
            return self._pid
        return ranks_of(self._pid).get(int(victim.removeprefix("rank ")), 0)
