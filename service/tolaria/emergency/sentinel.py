"""The sentinel: a process of its own that watches the service's heartbeats on the board, GIL held or not.

    python -m tolaria.emergency.sentinel --board PATH --run-id ID --service-pid PID
        [--heartbeat-timeout-s 30] [--startup-s 60] [--grace-s 10] [--drain-s 15] [--stacks FILE] [--while-stdin]

When the event loop or the lane is silent it raises HALT from its own block, has the service dump its stacks, and after
the grace period ends it, for its supervisor to start it again. Its first line on standard output says that it watches.
It ends with the service. Exit code: 0 the service has ended or wants no sentinel any more, 3 it cannot watch.

Owns that process. Decisions are `vigil`'s. Must not import torch or grpc, or wait for anything without a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_HALT
from tolaria.emergency.protocol import SENTINEL, TOLARIA
from tolaria.emergency.stacks import DUMP_SIGNAL, handles_dump, mark
from tolaria.emergency.target import ServiceProcess
from tolaria.emergency.triggers import Trigger
from tolaria.emergency.vigil import Action, Patience, Vigil, begin, look
from tolaria.errors import SignalError
from tolaria.signals import Participant, SignalBoard

CANNOT_WATCH = 3
LOOP, LANE = "the event loop", "the lane"
_LOOKS_PER_TIMEOUT = 20
_LOOK_S_LEAST, _LOOK_S_MOST = 0.02, 0.5
_LINE_BYTES_MAX = 2000  # far below PIPE_BUF: a line goes out whole, and at once where the pipe has room


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until the service ends; the exit code."""
    options = _options(arguments)
    try:
        with (
            ServiceProcess(options.service_pid, while_open=0 if options.while_stdin else None) as service,
            SignalBoard.attach(options.board, options.run_id) as board,
        ):
            sentinel = _Sentinel(service, board, board.claim(SENTINEL), options)
            os.write(1, json.dumps({"watching": options.service_pid}).encode() + b"\n")
            sentinel.watch()
    except (SignalError, ProcessLookupError) as error:
        _say("sentinel_cannot_watch", detail=str(error))
        return CANNOT_WATCH
    return 0


class _Sentinel:
    """Looks, asks the vigil, acts."""

    def __init__(
        self, service: ServiceProcess, board: SignalBoard, participant: Participant, options: argparse.Namespace
    ) -> None:
        self._service = service
        self._board = board
        self._participant = participant
        self._stacks: Path | None = options.stacks
        self._look_s = min(max(options.heartbeat_timeout_s / _LOOKS_PER_TIMEOUT, _LOOK_S_LEAST), _LOOK_S_MOST)
        self._patience = Patience(
            startup_s=options.startup_s,
            timeout_s=options.heartbeat_timeout_s,
            grace_s=options.grace_s,
            drain_s=options.drain_s,
            look_s_max=2 * self._look_s,
        )
        self._vigil: Vigil = begin((LOOP, LANE), self._patience)

    def watch(self) -> None:
        """Until the service has ended. Raises BoardLostError when the heartbeats cannot be read any more."""
        looked_at_s = time.monotonic()
        while not self._service.ended_within(self._look_s):
            self._participant.beat()
            state = self._board.read(TOLARIA)
            now_s = time.monotonic()
            beats = {LOOP: state.heartbeat_ns, LANE: state.lane_heartbeat_ns}
            self._vigil, actions = look(self._vigil, beats, now_s - looked_at_s, self._patience)
            looked_at_s = now_s
            for action in actions:
                self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Action.RAISE_HALT:
                self._raise_halt()
            case Action.DUMP_STACKS:
                self._dump_stacks()
            case Action.CALM_DOWN:
                _say("sentinel_hears_heartbeats_again")
            case Action.TERMINATE:
                self._service.send(signal.SIGTERM)
                _say("sentinel_ends_service", signal="SIGTERM", silent=self._vigil.silent)
            case Action.KILL:
                self._service.send(signal.SIGKILL)
                _say("sentinel_ends_service", signal="SIGKILL", silent=self._vigil.silent)

    def _raise_halt(self) -> None:
        reason = f"{Trigger.HEARTBEAT_SILENT.value}: {self._silence()}"
        try:
            self._participant.raise_level(EMERGENCY_LEVEL_HALT, reason)
        except SignalError as error:  # the process is silent all the same: the rest must be done
            _say("sentinel_cannot_raise", detail=str(error))
        _say("sentinel_raised_halt", reason=reason)

    def _dump_stacks(self) -> None:
        if self._stacks is None or not handles_dump(self._service.pid):
            _say(
                "sentinel_no_stacks", detail="the service has no handler for them" if self._stacks else "not asked for"
            )
            return
        try:
            mark(self._stacks, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {self._silence()}")
        except OSError as error:  # a full disk: the service's own file may be there already
            _say("sentinel_cannot_mark_stacks", detail=str(error))
        self._service.send(DUMP_SIGNAL)
        _say("sentinel_asked_for_stacks", file=str(self._stacks))

    def _silence(self) -> str:
        hearts = [f"{name} for {self._vigil.hearts[name].quiet_s:.1f} s" for name in self._vigil.silent]
        return "no heartbeat of " + " and ".join(hearts)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tolaria.emergency.sentinel", description="Watches a service.")
    parser.add_argument("--board", type=Path, required=True, help="the signal board")
    parser.add_argument("--run-id", required=True, help="the run that the board must be of")
    parser.add_argument("--service-pid", type=int, required=True, help="the process to watch")
    parser.add_argument("--heartbeat-timeout-s", type=_seconds, default=30.0, help="how long silence may last")
    parser.add_argument("--startup-s", type=_seconds, default=60.0, help="time before silence begins to count")
    parser.add_argument("--grace-s", type=_seconds, default=10.0, help="from HALT to SIGTERM")
    parser.add_argument("--drain-s", type=_seconds, default=15.0, help="from SIGTERM to SIGKILL")
    parser.add_argument("--stacks", type=Path, help="the file that the service dumps its stacks to")
    parser.add_argument("--while-stdin", action="store_true", help="end when standard input ends")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 1e9:  # refuses NaN too
        raise ValueError(f"{text} is no number of seconds")
    return seconds


def _say(event: str, **facts: object) -> None:
    """One JSON line on standard error, which is the service's own: nobody in a hung service could pass it on.

    Left out where standard error is full and nobody reads it: the sentinel must not hang as well.
    """
    line = json.dumps({"event": event, "level": "critical", **facts}).encode()[:_LINE_BYTES_MAX] + b"\n"
    try:
        _, writable, _ = select.select([], [2], [], 0)
        if writable:
            os.write(2, line)
    except OSError:
        return  # standard error is closed: there is nowhere left to say so


if __name__ == "__main__":
    sys.exit(main())
