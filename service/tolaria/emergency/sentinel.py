"""The sentinel: a process that watches the service's heartbeats on the signal board, even while the GIL is held.

When the event loop or the lane is silent, the sentinel raises HALT from its own block, writes the stacks of the
service to a file and, after the grace period, ends the service, so that its supervisor restarts it. Its first line on
standard output announces that it watches. Exit code 0: the service ended or closed standard input; 3: it cannot watch.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import selectors
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from tolaria.emergency.protocol import SENTINEL, TOLARIA, Trigger
from tolaria.errors import SignalError
from tolaria.ranks.stacks import append_stacks, stacks_of, summary
from tolaria.signals import ParticipantWriter, SignalBoard
from tolaria.signals.layout import LanePhase

CANNOT_WATCH = 3
LOOP, LANE = "the event loop", "the lane"
_LOOKS_PER_TIMEOUT = 20
_LOOK_S_MIN, _LOOK_S_MAX = 0.02, 0.5
_PHASES = {phase.value: phase.name.lower() for phase in LanePhase}
_LINE_BYTES_MAX = 2000  # far below PIPE_BUF, so that a line is written whole, and at once when the pipe has room
_STACKS_S = 5.0
"""How long collecting stacks, and a disk that hangs, may keep the sentinel from what comes next."""


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """Durations in seconds.

    `startup_s` before silence counts, `timeout_s` of silence unless a look permits another, `grace_s` between the
    alarm and SIGTERM, `drain_s` between SIGTERM and SIGKILL. The time between two looks counts as at most
    `look_s_max`.
    """

    startup_s: float
    timeout_s: float
    grace_s: float
    drain_s: float
    look_s_max: float


class Stage(Enum):
    """Progress of the response to silence."""

    WATCHING = auto()
    """Entered again when heartbeats return within the grace period. The halt stays until it is cleared."""
    ALARMED = auto()
    TERMINATED = auto()
    KILLED = auto()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last value of a heartbeat, and how long it did not change while it was observed."""

    value: int = -1
    silent_s: float = 0.0

    def after(self, value: int, observed_s: float) -> Heartbeat:
        """Returns the heartbeat after another look, `observed_s` later."""
        return Heartbeat(value) if value != self.value else replace(self, silent_s=self.silent_s + observed_s)


@dataclass(frozen=True, slots=True)
class SilenceMonitor:
    """Decides when silent heartbeats require the next stage. Immutable: `look` returns the next monitor.

    A heartbeat is silent while its value does not change; the value is not compared with a clock. Only observed time
    counts: a sentinel that was stopped, perhaps with the whole machine, saw no silence.
    `observed_s` is the time observed so far, `waited_s` that in this stage; `heartbeats` are keyed by name, and so is
    `permitted_s`, the silence that is permitted at the last look where it is not the limits'.
    """

    limits: SilenceLimits
    heartbeats: Mapping[str, Heartbeat] = field(default_factory=dict)
    permitted_s: Mapping[str, float] = field(default_factory=dict)
    stage: Stage = Stage.WATCHING
    observed_s: float = 0.0
    waited_s: float = 0.0

    @property
    def silent(self) -> tuple[str, ...]:
        """Names of the silent heartbeats."""
        limit_s = self.limits.timeout_s
        return tuple(
            name for name, beat in self.heartbeats.items() if beat.silent_s >= self.permitted_s.get(name, limit_s)
        )

    @property
    def next_stage(self) -> Stage:
        """The stage that follows from what was observed; the present one unless something is due."""
        match self.stage:
            case Stage.WATCHING if self.silent:
                return Stage.ALARMED
            case Stage.ALARMED if not self.silent:
                return Stage.WATCHING
            case Stage.ALARMED if self.waited_s >= self.limits.grace_s:
                return Stage.TERMINATED
            case Stage.TERMINATED if self.waited_s >= self.limits.drain_s:
                return Stage.KILLED
            case stage:
                return stage

    def look(
        self, values: Mapping[str, int], elapsed_s: float, permitted_s: Mapping[str, float] = MappingProxyType({})
    ) -> SilenceMonitor:
        """Returns the monitor after a look at the heartbeats' `values`, `elapsed_s` after the last one.

        `permitted_s`: the silence that is permitted now, for heartbeats whose limit is not `limits.timeout_s`.
        """
        observed_s = min(elapsed_s, self.limits.look_s_max)
        counted_s = observed_s if self.observed_s >= self.limits.startup_s else 0.0
        beats = {name: self.heartbeats.get(name, Heartbeat()).after(value, counted_s) for name, value in values.items()}
        seen = replace(
            self,
            heartbeats=beats,
            permitted_s=permitted_s,
            observed_s=self.observed_s + observed_s,
            waited_s=self.waited_s + observed_s,
        )
        return seen if seen.next_stage is self.stage else replace(seen, stage=seen.next_stage, waited_s=0.0)


class ServiceProcess:
    """A handle on the watched process; a context manager that does not end the process.

    On Linux a pidfd, which never refers to a later process of the same number; elsewhere only the end of `while_open`,
    a file descriptor, counts as the end of the process. Raises ProcessLookupError when there is no such process.
    """

    def __init__(self, pid: int, *, while_open: int | None) -> None:
        self.pid = pid
        self._pidfd: int | None = None
        if sys.platform == "linux":
            self._pidfd = os.pidfd_open(pid)
        else:
            os.kill(pid, 0)
        self._selector = selectors.DefaultSelector()
        for fd in (self._pidfd, while_open):
            if fd is not None:
                self._selector.register(fd, selectors.EVENT_READ)

    def ended_within(self, timeout_s: float) -> bool:
        """Waits up to `timeout_s`; returns whether the process ended or `while_open` was closed."""
        return any(key.fd == self._pidfd or not os.read(key.fd, 4096) for key, _ in self._selector.select(timeout_s))

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; does nothing if the process has ended."""
        with suppress(ProcessLookupError):
            if sys.platform == "linux" and self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the handle."""
        self._selector.close()
        if self._pidfd is not None:
            os.close(self._pidfd)


class Sentinel:
    """Watches `service` through `board`, as its participant, and acts on what the monitor decides."""

    def __init__(
        self, service: ServiceProcess, board: SignalBoard, participant: ParticipantWriter, options: argparse.Namespace
    ) -> None:
        self._service = service
        self._board = board
        self._participant = participant
        self._stacks: Path = options.stacks
        timeout_s = options.heartbeat_timeout_s
        self._look_s = min(max(timeout_s / _LOOKS_PER_TIMEOUT, _LOOK_S_MIN), _LOOK_S_MAX)
        self._phase = 0
        self._monitor = SilenceMonitor(
            SilenceLimits(options.startup_s, timeout_s, options.grace_s, options.drain_s, look_s_max=2 * self._look_s)
        )

    def watch(self) -> None:
        """Returns when the service ended. Raises BoardLostError when the heartbeats cannot be read."""
        looked_at_s = time.monotonic()
        while not self._service.ended_within(self._look_s):
            self._participant.beat()
            state = self._board.read(TOLARIA)
            now_s = time.monotonic()
            values = {LOOP: state.heartbeat_ns, LANE: state.lane_heartbeat_ns}
            self._phase, silence_ms = state.lane_work
            permitted_s = {LANE: silence_ms / 1000} if silence_ms else {}
            stage, self._monitor = self._monitor.stage, self._monitor.look(values, now_s - looked_at_s, permitted_s)
            looked_at_s = now_s
            if self._monitor.stage is not stage:
                self._enter(self._monitor.stage)

    def _enter(self, stage: Stage) -> None:
        match stage:
            case Stage.WATCHING:
                _log("sentinel_hears_heartbeats_again")
            case Stage.ALARMED:
                beats = self._monitor.heartbeats
                silent = [f"{name} for {beats[name].silent_s:.1f} s" for name in self._monitor.silent]
                if LANE in self._monitor.silent and self._phase in _PHASES:
                    silent[-1] += f" while {_PHASES[self._phase]}"
                silence = "no heartbeat of " + " and ".join(silent)
                self._raise_halt(f"{Trigger.HEARTBEAT_SILENT.value}: {silence}")
                self._dump_stacks(silence)
            case Stage.TERMINATED:
                self._end_service(signal.SIGTERM)
            case Stage.KILLED:
                self._end_service(signal.SIGKILL)

    def _end_service(self, number: signal.Signals) -> None:
        self._service.send(number)
        _log("sentinel_ends_service", signal=number.name, silent=self._monitor.silent)

    def _raise_halt(self, reason: str) -> None:
        try:
            self._participant.raise_level(EMERGENCY_LEVEL_HALT, reason)
        except SignalError as error:  # the process is still silent: go on
            _log("sentinel_cannot_raise", detail=str(error))
        _log("sentinel_raised_halt", reason=reason)

    def _dump_stacks(self, silence: str) -> None:
        writing = threading.Thread(target=self._write_stacks, args=(silence,), daemon=True)
        writing.start()
        writing.join(_STACKS_S)

    def _write_stacks(self, silence: str) -> None:
        found = stacks_of({0: self._service.pid})
        _log("sentinel_took_stacks", where=summary(found), file=str(self._stacks))
        try:
            append_stacks(self._stacks, silence, {"the service": found[0]})
        except OSError as error:
            _log("sentinel_cannot_write_stacks", detail=str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Watches until the service ends; returns the exit code."""
    options = _options(arguments)
    try:
        with (
            ServiceProcess(options.service_pid, while_open=0 if options.while_stdin else None) as service,
            SignalBoard.attach(options.board, options.run_id) as board,
        ):
            sentinel = Sentinel(service, board, board.claim(SENTINEL), options)
            os.write(1, json.dumps({"watching": options.service_pid}).encode() + b"\n")
            sentinel.watch()
    except (SignalError, ProcessLookupError) as error:
        _log("sentinel_cannot_watch", detail=str(error))
        return CANNOT_WATCH
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tolaria.emergency.sentinel", description="Watches a service.")
    add = partial(parser.add_argument, required=True)
    add("--board", type=Path, help="the signal board")
    add("--run-id", help="the run of the board")
    add("--service-pid", type=int, help="the process to watch")
    add("--heartbeat-timeout-s", type=float, help="longest silence permitted")
    add("--startup-s", type=float, help="time before silence counts")
    add("--grace-s", type=float, help="time from HALT to SIGTERM")
    add("--drain-s", type=float, help="time from SIGTERM to SIGKILL")
    add("--stacks", type=Path, help="the file for the stacks of the service")
    parser.add_argument("--while-stdin", action="store_true", help="end when standard input ends")
    return parser.parse_args(arguments)


def _log(event: str, **fields: object) -> None:
    """Writes a JSON line to standard error, which the service shares: a hung service could not pass it on.

    Drops the line when standard error is closed, or full, so that the sentinel does not hang as well.
    """
    line = json.dumps({"event": event, "level": "critical", **fields}).encode()[:_LINE_BYTES_MAX] + b"\n"
    with suppress(OSError):
        _, writable, _ = select.select([], [2], [], 0)
        if writable:
            os.write(2, line)


if __name__ == "__main__":
    sys.exit(main())
