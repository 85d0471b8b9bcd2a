"""Commands to the lane: their queue with its hold and stop flags, the gate of a restore, and their execution."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, assert_never

from tolaria.errors import HyperparameterError, InvalidFieldError, LaneError, RestoreAbandonedError, TolariaError
from tolaria.images import ImagePool
from tolaria.lane.messages import (
    AcceptRegime,
    BatchesSkipped,
    BoundaryCommand,
    CaptureImage,
    CaptureProfile,
    ChangeOptimizer,
    Command,
    CommandDone,
    Hold,
    ImageCaptured,
    OptimizerChanged,
    ReconcileSeeds,
    Release,
    Restore,
    Result,
    RunEpoch,
    SetSkippedRanges,
    SkipBatches,
    Stop,
)
from tolaria.lane.profiling import LaneProfiler
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.train_module import TrainModule
from tolaria.optimization import change_hyperparameters
from tolaria.optimization.hyperparameters import HyperparameterChange
from tolaria.signals.lane_page import LanePage
from tolaria.values.failure import Failure

_EPOCHS_QUEUED_MAX: Final = 4
_COMMANDS_QUEUED_MAX: Final = 256

_DECISIONS_MAX: Final = 2 * _COMMANDS_QUEUED_MAX
"""Number of restore decisions kept. Fewer can be made between `forbid` of a queued restore and its execution."""


@dataclass(frozen=True, slots=True)
class QueuedCommand:
    """A command for the next step boundary, and the id of its `CommandDone`."""

    command_id: int
    command: BoundaryCommand


class CommandQueue:
    """Commands on their way to the lane's thread, and the flags for hold and stop.

    Args:
        on_held: called in the lane's thread, once for each `Hold`, with its number. Must not block: the queue is
            locked meanwhile.
        resting: its context manager spans every wait in the middle of an epoch.
        hold_number: returns the number of a hold that another process wants, which may not be queued yet; 0: of none.

    Attributes:
        stopping: whether the lane has to end at the next step boundary.
        latest_order: number of the newest order for an epoch, taken or not; 0 before the first.
    """

    def __init__(
        self,
        on_held: Callable[[int], None],
        resting: Callable[[], AbstractContextManager[None]],
        *,
        hold_number: Callable[[], int] = lambda: 0,
    ) -> None:
        self.stopping = False
        self.latest_order = 0
        # The lane reads these three without the lock, once for each microbatch.
        self._held = self._command_due = self._urgent = False
        self._on_held = on_held
        self._resting = resting
        self._shared_hold = hold_number
        self._hold_number = self._reported_hold = self._released_hold = 0
        self._orders: deque[RunEpoch] = deque()
        self._commands: deque[QueuedCommand] = deque()
        self._changed = threading.Condition()

    @property
    def due(self) -> bool:
        """Whether the next step boundary has anything to do but to go on."""
        self._look_at_shared_hold()
        return self._held or self._command_due or self.stopping

    @property
    def epochs_queued(self) -> bool:
        """Whether an order for an epoch has not been taken yet."""
        return bool(self._orders)

    def put(self, command_id: int, command: Command) -> None:
        """Queues a command; a `Restore` is urgent, see `continue_step`. Raises LaneError when too many are queued."""
        with self._changed:
            match command:
                case RunEpoch(order):
                    if len(self._orders) >= _EPOCHS_QUEUED_MAX:
                        raise LaneError(f"{_EPOCHS_QUEUED_MAX} epochs are waiting for the lane already")
                    self._orders.append(command)
                    self.latest_order = order
                case Hold(number):
                    self._held, self._hold_number = True, number
                case Release():
                    self._held, self._released_hold = False, self._hold_number
                case Stop():
                    self.stopping = True
                case _:
                    if len(self._commands) >= _COMMANDS_QUEUED_MAX:
                        raise LaneError(f"{_COMMANDS_QUEUED_MAX} commands are waiting for a step boundary already")
                    self._commands.append(QueuedCommand(command_id, command))
                    self._command_due = True
                    self._urgent = self._urgent or isinstance(command, Restore)
            self._changed.notify_all()

    def next_work(self) -> RunEpoch | QueuedCommand | None:
        """Waits for an epoch or a command; commands come first. None: the lane has to end, and none is queued."""
        with self._changed:
            while not (self.stopping and not self._commands):
                held = self._report_hold()
                if self._commands:
                    return self._take_command()
                if self._orders and not held:
                    return self._orders.popleft()
                self._changed.wait()
            return None

    def next_command(self) -> QueuedCommand | None:
        """Returns the next command for a step boundary, waiting while held; None: training goes on, or ends."""
        self._look_at_shared_hold()
        if not (self._held or self._command_due):
            return None
        with self._changed:
            while not self.stopping:
                held = self._report_hold()
                if self._commands:
                    return self._take_command()
                if not held:
                    return None
                self._wait()
            return None

    def continue_step(self) -> bool:
        """Waits between two microbatches while held; returns False if the unfinished step has to be abandoned.

        This is the case for an urgent command and, while held, for any command or a stop.
        """
        self._look_at_shared_hold()
        if not (self._held or self._urgent):
            return True
        with self._changed:
            while self._report_hold() and not self.stopping and not self._commands:
                self._wait()
            return not (self._urgent or (self._held and (self.stopping or self._commands)))

    def continue_evaluation(self, place: int) -> bool:  # noqa: ARG002 - in a group, ranks compare it
        """Waits before the batch of that place while held; returns False if the evaluation has to be abandoned."""
        return not self.stopping and self.continue_step()

    def _look_at_shared_hold(self) -> None:
        """Begins a hold that is seen in shared memory before its command arrives."""
        if (number := self._shared_hold()) and not self._held:
            with self._changed:
                if number > self._released_hold:
                    self._held, self._hold_number = True, number

    def _take_command(self) -> QueuedCommand:
        queued = self._commands.popleft()
        self._command_due = bool(self._commands)
        self._urgent = self._urgent and self._command_due
        return queued

    def _wait(self) -> None:
        with self._resting():
            self._changed.wait()

    def _report_hold(self) -> bool:
        """Reports a hold that has not been reported yet, and returns whether the lane is held."""
        if self._held and self._reported_hold != self._hold_number:
            self._reported_hold = self._hold_number
            self._on_held(self._hold_number)
        return self._held


class RestoreGate:
    """Decides, once for each restore, whether it may change live state. Thread-safe.

    The lane requests permission right before the change, the run forbids it at its deadline: the first call decides.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._granted: dict[int, bool] = {}

    def expired(self, command_id: int, deadline_s: float) -> bool:
        """Whether the restore is forbidden or past its deadline. Decides nothing."""
        return time.monotonic() >= deadline_s or self._granted.get(command_id) is False

    def grant(self, command_id: int, deadline_s: float) -> bool:
        """Whether live state may change now; if so, it must change. Past the deadline, the restore is forbidden."""
        return self._decide(command_id, granted=time.monotonic() < deadline_s)

    def forbid(self, command_id: int) -> bool:
        """Forbids the restore to change live state; False if it has already been granted."""
        return not self._decide(command_id, granted=False)

    def _decide(self, command_id: int, *, granted: bool) -> bool:
        with self._lock:
            granted = self._granted.setdefault(command_id, granted)
            if len(self._granted) > _DECISIONS_MAX:
                del self._granted[next(iter(self._granted))]  # the oldest
            return granted


class PageGate(RestoreGate):
    """The gate of a lane in a separate process: the service forbids a restore on the lane's page."""

    def __init__(self, page: LanePage) -> None:
        super().__init__()
        self._page = page

    def hold_number(self) -> int:
        """Returns the number of the hold that the service wants; 0 if it wants none."""
        return self._page.hold_number()

    def expired(self, command_id: int, deadline_s: float) -> bool:
        """Whether the restore is forbidden or past its deadline. Decides nothing."""
        return super().expired(command_id, deadline_s) or self._page.forbidden(command_id)

    def grant(self, command_id: int, deadline_s: float) -> bool:
        """Whether live state may change now; if so, it must change."""
        return super().grant(command_id, deadline_s) and self._page.grant(command_id)


class CommandExecutor:
    """Carries out commands at a step boundary, in the lane's thread.

    Attributes:
        images: the pool through which lane and run exchange captured and loaded images.
        gate: grants or refuses each restore, right before it changes live state.
    """

    def __init__(
        self, module: TrainModule, snapshots: SnapshotManager, profiler: LaneProfiler, gate: RestoreGate | None = None
    ) -> None:
        self.images = ImagePool()
        self.gate = gate or RestoreGate()
        self._module = module
        self._snapshots = snapshots
        self._profiler = profiler

    def execute(self, queued: QueuedCommand) -> CommandDone:
        """Carries out a command. After a `TolariaError`, which becomes the failure, nothing has changed."""
        result, failure = None, None
        try:
            result = self._result(queued.command_id, queued.command)
        except TolariaError as error:
            failure = Failure.of(error)
        return CommandDone(queued.command_id, self._module.global_step, result, failure)

    def _result(self, command_id: int, command: BoundaryCommand) -> Result:
        module = self._module
        match command:
            case ReconcileSeeds(desired):
                changed = module.seeds.reconcile(desired, module.global_step)
                module.refresh()
                return changed
            case ChangeOptimizer():
                return self._change_optimizer(command)
            case Restore():
                return self._restore(command_id, command)
            case CaptureImage(beside):
                return ImageCaptured(self.images.put(self._snapshots.capture_image(beside=beside)))
            case SkipBatches() | SetSkippedRanges() | AcceptRegime():
                return self._change_skipped(command)
            case CaptureProfile(steps, rank):
                if rank:
                    raise InvalidFieldError("rank", f"must be 0, since the lane is one process, is {rank}")
                return self._profiler.start(steps)
            case _:
                assert_never(command)

    def _change_skipped(self, command: SkipBatches | SetSkippedRanges | AcceptRegime) -> BatchesSkipped:
        module = self._module
        if isinstance(command, SetSkippedRanges):
            module.skipped.ranges = command.ranges
            return BatchesSkipped(len(module.skipped))
        if isinstance(command, AcceptRegime):
            module.skipped.added.difference_update(command.batches)
            module.begin_regime(command.reason, announced=False)
        else:
            module.skipped.added.update(command.batches)
        return BatchesSkipped(len(module.skipped))

    def _change_optimizer(self, command: ChangeOptimizer) -> OptimizerChanged:
        module, controller = self._module, self._module.seeds.controller
        if "weight_decay" in command.hyperparameters and controller.weight_decay.on:
            raise HyperparameterError("weight_decay", "follows optimizer.weight_decay_policy")
        saved, record = controller.state_dict(), None
        if command.adjustment is not None:
            record = controller.adjust(command.adjustment, at_step=module.global_step)
        changes: list[HyperparameterChange] = []
        if command.hyperparameters:
            try:
                changes = change_hyperparameters(module.optimizer, command.hyperparameters, group=command.group)
            except TolariaError:
                controller.load_state_dict(saved)
                raise
        controller.apply(module.global_step)
        before, after, limits = (record.before, record.after, record.limits) if record else ({}, {}, ())
        changed = tuple(f"{change.group} {change.name}: {change.before:g} -> {change.after:g}" for change in changes)
        return OptimizerChanged(before, after, changed, controller.adjustments, limits)

    def _restore(self, command_id: int, command: Restore) -> Result:
        """Raises RestoreAbandonedError past the deadline, also when the image has been discarded by then."""
        if self.gate.expired(command_id, command.deadline_s):
            raise RestoreAbandonedError("waiting for its step boundary")

        def refused() -> bool:
            return not self.gate.grant(command_id, command.deadline_s)

        with self._profiler.mark("rollback"):
            if not command.image_id:
                return self._snapshots.restore_snapshot(command.target_step, refused)
            try:
                lease = self.images.take(command.image_id)
            except KeyError:
                raise RestoreAbandonedError("waiting for its step boundary") from None
            with lease as image:
                restored = self._snapshots.restore_image(image, refused)
            if command.other_branch:
                self._snapshots.forget_snapshots()
            return restored
