"""`GroupProfiles`: profiles of any rank of a group, one at a time; the leader keeps the traces of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tolaria.errors import InvalidFieldError, PeerLostError, TolariaError, WrongStateError
from tolaria.lane.encoding import from_bytes, to_bytes
from tolaria.lane.messages import (
    CaptureProfile,
    CommandDone,
    ProfileDone,
    ProfileStarted,
    TraceFailed,
    TraceWritten,
)
from tolaria.lane.profiling import LaneProfiler
from tolaria.ranks.group import Group
from tolaria.values.failure import Failure


class GroupProfiles:
    """Starts and ends profiles on all ranks alike, of which one is traced.

    `profiler` is that of this rank. Where it does not lead, its traces are taken from it and deleted.
    """

    def __init__(self, profiler: LaneProfiler, group: Group) -> None:
        self._profiler = profiler
        self._group = group
        self._rank = self._steps_left = 0

    def start(self, command_id: int, global_step: int, command: CaptureProfile) -> CommandDone:
        """Opens a window on one rank; returns the answer of that rank on all of them. Raises PeerLostError."""
        refusal: TolariaError | None = None
        if command.rank >= self._group.world:
            refusal = InvalidFieldError("rank", f"must be below {self._group.world}, is {command.rank}")
        elif self._steps_left:
            refusal = WrongStateError(f"a profile of rank {self._rank} is being taken, {self._steps_left} steps to go")
        if refusal is not None:
            return CommandDone(command_id, global_step, None, Failure.of(refusal))
        own = to_bytes(self._start(command_id, global_step, command)) if command.rank == self._group.rank else b""
        answer = from_bytes(self._group.broadcast_bytes(own, command.rank))
        if not isinstance(answer, CommandDone):
            raise PeerLostError(f"rank {command.rank} answered by a {type(answer).__name__}")
        if isinstance(answer.result, ProfileStarted):
            self._rank, self._steps_left = command.rank, command.steps
        return answer

    def after_step(self, global_step: int) -> ProfileDone | None:
        """Counts a step; after the window's last one returns, on the leader, what became of the trace.

        Raises PeerLostError.
        """
        if not self._steps_left:
            return None
        self._steps_left -= 1
        done = self._profiler.after_step(global_step) if self._rank == self._group.rank else None
        return done if self._steps_left or not self._rank else self._fetched(done)

    def _start(self, command_id: int, global_step: int, command: CaptureProfile) -> CommandDone:
        try:
            return CommandDone(command_id, global_step, self._profiler.start(command.steps), None)
        except TolariaError as error:
            return CommandDone(command_id, global_step, None, Failure.of(error))

    def _fetched(self, own: ProfileDone | None) -> ProfileDone | None:
        """Moves the trace from its rank to the leader, and returns there where it is now."""
        group, content = self._group, b""
        if own is not None and isinstance(own.outcome, TraceWritten):
            try:
                content = self._profiler.taken(Path(own.outcome.path))
            except OSError as error:
                own = replace(own, outcome=TraceFailed("export", str(error)))
        with self._profiler.resting():  # the trace is being written
            done = from_bytes(group.broadcast_bytes(to_bytes(own) if own is not None else b"", self._rank))
        if not isinstance(done, ProfileDone):
            raise PeerLostError(f"rank {self._rank} sent a {type(done).__name__} for its profile")
        trace = done.outcome
        if isinstance(trace, TraceWritten):
            if content:
                group.send_to_leader(content)
            elif group.leads:
                content = group.receive_bytes(self._rank, trace.size_bytes)
                done = replace(done, outcome=self._profiler.keep(content, self._rank, trace))
        return done if group.leads else None
