"""Commands in a group of ranks: the leader takes them from the service, and all ranks carry out the same ones.

With the losses of each step the ranks learn whether the leader has a command (`Group.commands_due`), and exchange it at
the step boundary that follows. Between two microbatches, and two batches of an evaluation, they ask for it separately.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final

from tolaria.errors import PeerLostError, RanksDifferError, TolariaError
from tolaria.lane.commands import CommandExecutor, CommandQueue, QueuedCommand, RestoreGate
from tolaria.lane.encoding import from_bytes, to_bytes
from tolaria.lane.evaluation import EVALUATED
from tolaria.lane.group_profiles import GroupProfiles
from tolaria.lane.group_state import GroupRestore
from tolaria.lane.messages import (
    BoundaryCommand,
    CaptureImage,
    CaptureProfile,
    Command,
    CommandDone,
    ReconcileSeeds,
    Restore,
    Restored,
    Result,
    RunEpoch,
)
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import Group
from tolaria.shards import is_sharded

_GO_ON, _STOP, _END, _WORK = b"G", b"S", b"E", b"W"
_ID: Final = struct.Struct("<q")


class LeaderCommands:
    """The queue of the rank that leads: what it returns, it broadcasts first.

    Methods and attributes are as in `CommandQueue`.
    """

    def __init__(self, queue: CommandQueue, group: Group) -> None:
        self.stopping = False
        self._queue = queue
        self._group = group
        group.has_commands = lambda: queue.due

    @property
    def latest_order(self) -> int:
        """Number of the newest order for an epoch."""
        return self._queue.latest_order

    @property
    def epochs_queued(self) -> bool:
        """Whether an order for an epoch has not been taken yet."""
        return self._queue.epochs_queued

    def put(self, command_id: int, command: Command) -> None:
        """Queues a command. Raises LaneError when too many are queued."""
        self._queue.put(command_id, command)

    def next_work(self) -> RunEpoch | QueuedCommand | None:
        """Waits for an epoch or a command; None: the lane has to end."""
        work = self._queue.next_work()
        self._group.broadcast_bytes(_END if work is None else _packed(work))
        self._group.commands_due = True
        return work

    def next_command(self) -> QueuedCommand | None:
        """Returns the next command for this step boundary if one is due, waiting while held."""
        if not self._group.commands_due:
            return None
        command = self._queue.next_command()
        if command is not None:
            self._group.broadcast_bytes(_packed(command))
            return command
        self.stopping, self._group.commands_due = self._queue.stopping, False
        self._group.broadcast_bytes(_STOP if self.stopping else _GO_ON)
        return None

    def continue_step(self) -> bool:
        """Waits between two microbatches while held; returns False if the ranks abandon the step for a command."""
        goes_on = self._group.all(self._queue.continue_step())
        self._group.commands_due = not goes_on
        return goes_on

    def continue_evaluation(self, place: int) -> bool:
        """Waits before the batch of that place while held; returns False if the ranks abandon the evaluation."""
        goes_on = self._group.all(self._queue.continue_evaluation(place), {EVALUATED: place})
        self._group.commands_due = not goes_on
        return goes_on


class FollowerCommands:
    """The commands of a rank that does not lead, as the leader broadcasts them. Used as a `CommandQueue`.

    `resting` spans what waits for the leader, which may be held.
    """

    latest_order = 0
    epochs_queued = False

    def __init__(self, group: Group, resting: Callable[[], AbstractContextManager[None]]) -> None:
        self.stopping = False
        self._group = group
        self._resting = resting

    def put(self, command_id: int, command: Command) -> None:
        """Raises PeerLostError: commands come from the leader."""
        raise PeerLostError(f"command {command_id} ({type(command).__name__}) did not come from the leader")

    def next_work(self) -> RunEpoch | QueuedCommand | None:
        """Waits for an epoch or a command; None: the lane has to end."""
        said = self._group.broadcast_bytes()
        self._group.commands_due = True
        if said == _END:
            self.stopping = True
            return None
        return _unpacked(said)

    def next_command(self) -> QueuedCommand | None:
        """Returns the next command for this step boundary if one is due."""
        if not self._group.commands_due:
            return None
        with self._resting():  # as long as the leader is held
            said = self._group.broadcast_bytes()
        if said in {_STOP, _GO_ON}:
            self.stopping, self._group.commands_due = said == _STOP, False
            return None
        work = _unpacked(said)
        if not isinstance(work, QueuedCommand):
            raise PeerLostError("the leader begins an epoch in the middle of one")
        return work

    def continue_step(self) -> bool:
        """Returns False if the ranks abandon the step for a command."""
        with self._resting():
            goes_on = self._group.all(value=True)
        self._group.commands_due = not goes_on
        return goes_on

    def continue_evaluation(self, place: int) -> bool:
        """Returns False if the ranks abandon the evaluation."""
        with self._resting():
            goes_on = self._group.all(value=True, must_match={EVALUATED: place})
        self._group.commands_due = not goes_on
        return goes_on


def _packed(work: RunEpoch | QueuedCommand) -> bytes:
    if isinstance(work, RunEpoch):
        return _WORK + _ID.pack(0) + to_bytes(work)
    return _WORK + _ID.pack(work.command_id) + to_bytes(work.command)


def _unpacked(said: bytes) -> RunEpoch | QueuedCommand:
    command = from_bytes(said[1 + _ID.size :])
    if isinstance(command, RunEpoch):
        return command
    if said[:1] != _WORK or not isinstance(command, BoundaryCommand):
        raise PeerLostError(f"the leader said {said[:20]!r}")
    return QueuedCommand(_ID.unpack_from(said, 1)[0], command)


class GroupExecutor(CommandExecutor):
    """Carries out commands on every rank: on all of them or, where one rank cannot, on none.

    Images are the leader's, which has the only snapshots: the others take part in its captures, and get the image of a
    restore from it. `profiles` are those of any rank.
    """

    def __init__(
        self,
        module: TrainModule,
        snapshots: SnapshotManager,
        profiler: LaneProfiler,
        gate: RestoreGate | None,
        group: Group,
    ) -> None:
        super().__init__(module, snapshots, profiler, gate)
        self._group = group
        self._restoring = GroupRestore(group, snapshots)
        self.profiles = GroupProfiles(profiler, group)

    def execute(self, queued: QueuedCommand) -> CommandDone:
        """Carries out a command. Raises RanksDifferError if it fails on some ranks only: their states differ then."""
        command, group = queued.command, self._group
        if isinstance(command, CaptureProfile):
            return self.profiles.start(queued.command_id, self._module.global_step, command)
        if isinstance(command, CaptureImage) and not group.leads:
            self._snapshots.take_part()
            return CommandDone(queued.command_id, self._module.global_step, None, None)
        done = super().execute(queued)
        if isinstance(command, CaptureImage):
            return done
        result = done.result
        problem = "" if done.failure is None else str(done.failure) or done.failure.name
        digest = result.state_digest if isinstance(result, Restored) else ""
        gathered = group.all_gather_text(json.dumps([problem, digest]))
        problems, digests = zip(*map(json.loads, gathered), strict=True)
        if any(problems) and not all(problems):
            rank = next(number for number, problem in enumerate(problems) if problem)
            raise RanksDifferError(f"{type(command).__name__} failed on rank {rank} only: {problems[rank]}")
        if isinstance(command, ReconcileSeeds) and not any(problems):
            model = self._module.model
            tensors = [*model.parameters(), *model.buffers()]  # seeds are built with random values
            group.broadcast_tensors([tensor for tensor in tensors if not is_sharded(tensor)])
        if isinstance(result, Restored):
            differing = [each for each in digests if each != result.expected_digest]
            done = replace(done, result=replace(result, state_digest=(differing or digests)[0]))
        return done

    def _restore(self, command_id: int, command: Restore) -> Result:
        self._restoring.begin()
        return super()._restore(command_id, command) if self._group.leads else self._restoring.follow()

    def _result(self, command_id: int, command: BoundaryCommand) -> Result:
        try:
            return super()._result(command_id, command)
        except TolariaError:
            if isinstance(command, Restore):
                self._restoring.give_up()
            raise
