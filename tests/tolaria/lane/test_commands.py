from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from support.lane_driver import driven, seed
from tolaria.errors import (
    AdjustmentRefusedError,
    HyperparameterError,
    InvalidFieldError,
    LaneError,
    RestoreAbandonedError,
    UnknownGroupError,
)
from tolaria.lane.commands import CommandQueue, PageGate, QueuedCommand, RestoreGate
from tolaria.lane.messages import (
    BatchesSkipped,
    CaptureImage,
    CaptureProfile,
    ChangeOptimizer,
    Hold,
    ImageCaptured,
    OptimizerChanged,
    ReconcileSeeds,
    Release,
    Restore,
    RunEpoch,
    SeedsChanged,
    SkipBatches,
    Stop,
)
from tolaria.signals.lane_page import LanePage
from tolaria.values.optimization import Adjustment
from tolaria.values.training import Position

SEEDS = ReconcileSeeds(())
RESTORE = Restore(0, 1e12)


class Holds:
    """The holds that a queue has reported."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.event = threading.Event()

    def __call__(self, number: int) -> None:
        self.numbers.append(number)
        self.event.set()


def new_queue(holds: Holds | None = None) -> CommandQueue:
    """An empty queue."""
    return CommandQueue(holds or Holds(), nullcontext)


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Calls in a thread; the result is put into the list."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


# -- queue -----------------------------------------------------------------------------------------------------------


def test_epochs_are_taken_in_order() -> None:
    """The first order is taken first, and the newest one is known."""
    queue = new_queue()
    queue.put(1, RunEpoch(1))
    queue.put(2, RunEpoch(2))
    assert (queue.epochs_queued, queue.latest_order) == (True, 2)
    assert [queue.next_work(), queue.next_work()] == [RunEpoch(1), RunEpoch(2)]
    assert (queue.epochs_queued, queue.latest_order) == (False, 2)


def test_the_queue_is_bounded() -> None:
    """Too many orders, or too many commands, are an error."""
    queue = new_queue()
    for order in range(4):
        queue.put(order, RunEpoch(order))
    with pytest.raises(LaneError, match="waiting for the lane"):
        queue.put(5, RunEpoch(5))
    for command_id in range(256):
        queue.put(command_id, SEEDS)
    with pytest.raises(LaneError, match="256 commands are waiting"):
        queue.put(256, SEEDS)
    queue.put(257, Stop())  # flags always have room


def test_a_lane_that_is_not_held_continues_its_step() -> None:
    """Nothing waits and nothing is reported."""
    holds = Holds()
    assert new_queue(holds).continue_step()
    assert holds.numbers == []


def test_a_held_lane_waits_between_microbatches_until_released() -> None:
    """A hold is reported once; after the release the step continues, and the lane can be held again."""
    holds = Holds()
    queue = new_queue(holds)
    for number in (1, 2):
        queue.put(0, Hold(number))
        holds.event.clear()
        thread, results = in_thread(queue.continue_step)
        assert holds.event.wait(180)
        assert thread.is_alive()
        assert holds.numbers == list(range(1, number + 1))
        queue.put(0, Release())
        thread.join(180)
        assert results == [True]


def test_a_second_hold_is_reported_with_its_own_number() -> None:
    """A lane that is held already reports a second hold, so that no hold is confirmed by another's event."""
    holds = Holds()
    queue = new_queue(holds)
    queue.put(0, Hold(1))
    thread, results = in_thread(queue.continue_step)
    assert holds.event.wait(180)
    holds.event.clear()
    queue.put(0, Hold(2))
    assert holds.event.wait(180)
    assert holds.numbers == [1, 2]
    queue.put(0, Release())
    thread.join(180)
    assert results == [True]


def test_a_held_idle_lane_takes_no_epoch_until_released() -> None:
    """A hold is reported also while the lane waits for work; an order is taken after the release."""
    holds = Holds()
    queue = new_queue(holds)
    queue.put(0, Hold(1))
    thread, results = in_thread(queue.next_work)
    assert holds.event.wait(180)
    queue.put(1, RunEpoch(3))
    thread.join(0.05)
    assert thread.is_alive()
    queue.put(0, Release())
    thread.join(180)
    assert results == [RunEpoch(3)]


def test_a_stop_abandons_a_held_step_and_ends_an_idle_lane() -> None:
    """A stop reaches a held lane, and one that waits for work."""
    holds = Holds()
    queue = new_queue(holds)
    queue.put(0, Hold(1))
    thread, results = in_thread(queue.continue_step)
    assert holds.event.wait(180)
    queue.put(0, Stop())
    thread.join(180)
    assert results == [False]
    assert queue.next_work() is None


def test_a_stop_lets_a_running_step_finish() -> None:
    """A lane that is not held continues its step although it ends after it."""
    queue = new_queue()
    queue.put(0, Stop())
    assert queue.continue_step()
    assert queue.stopping


def test_commands_are_taken_while_held_and_before_the_end() -> None:
    """A command is taken between two steps, also while held, and before an end that was requested after it."""
    queue = new_queue()
    assert queue.next_command() is None
    queue.put(7, SEEDS)
    queue.put(0, Hold(1))
    assert queue.next_command() == QueuedCommand(7, SEEDS)
    queue.put(8, CaptureImage())
    queue.put(0, Stop())
    assert queue.next_command() is None
    assert queue.next_work() == QueuedCommand(8, CaptureImage())
    assert queue.next_work() is None


def test_commands_are_taken_before_epochs() -> None:
    """A command does not wait for the end of an epoch that was ordered before it."""
    queue = new_queue()
    queue.put(1, RunEpoch(1))
    queue.put(2, SEEDS)
    assert queue.next_work() == QueuedCommand(2, SEEDS)
    assert queue.next_work() == RunEpoch(1)


def test_only_a_restore_abandons_a_running_step() -> None:
    """Other commands wait for its end; once the restore is taken, steps continue."""
    queue = new_queue()
    queue.put(1, SEEDS)
    assert queue.continue_step()
    queue.put(2, RESTORE)
    assert not queue.continue_step()
    assert queue.next_command() == QueuedCommand(1, SEEDS)
    assert not queue.continue_step()
    assert queue.next_command() == QueuedCommand(2, RESTORE)
    assert queue.continue_step()


def test_any_command_abandons_a_held_step() -> None:
    """A command that is sent while the lane is held in a step does not wait for the release."""
    holds = Holds()
    queue = new_queue(holds)
    queue.put(0, Hold(1))
    thread, results = in_thread(queue.continue_step)
    assert holds.event.wait(180)
    queue.put(1, SEEDS)
    thread.join(180)
    assert results == [False]


# -- restore gate ----------------------------------------------------------------------------------------------------


def test_the_first_decision_about_a_restore_is_final() -> None:
    """Either the lane is granted the change or the run forbids it, for each restore by itself."""
    gate, later = RestoreGate(), time.monotonic() + 180
    assert gate.grant(1, later)
    assert not gate.forbid(1)
    assert gate.forbid(2)
    assert not gate.grant(2, later)
    assert gate.expired(2, later)
    assert not gate.expired(1, later)
    assert gate.grant(3, later)


def test_a_restore_past_its_deadline_is_not_granted() -> None:
    """It stays forbidden, and `expired` alone decides nothing."""
    gate, now = RestoreGate(), time.monotonic()
    assert gate.expired(1, now)
    assert gate.grant(1, now + 60)
    assert not gate.grant(2, now)
    assert not gate.grant(2, now + 60)
    assert gate.forbid(2)


def test_only_recent_decisions_are_kept() -> None:
    """Memory is bounded: of more decisions than the queue has commands, twice over, the oldest is forgotten."""
    gate, later = RestoreGate(), time.monotonic() + 180
    assert gate.grant(0, later)
    assert all(gate.forbid(command_id) for command_id in range(1, 512))
    assert not gate.forbid(0)
    assert gate.grant(512, later)
    assert gate.forbid(0)
    assert not gate.grant(511, later)


def test_of_two_threads_exactly_one_decides() -> None:
    """Grant and forbid at the same time: never both, never neither."""
    gate, later = RestoreGate(), time.monotonic() + 180
    for command_id in range(200):
        barrier = threading.Barrier(2)

        def forbid(number: int = command_id, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return gate.forbid(number)

        thread, forbidden = in_thread(forbid)
        barrier.wait()
        granted = gate.grant(command_id, later)
        thread.join(180)
        assert [granted] != forbidden


# -- execution -------------------------------------------------------------------------------------------------------


def adjustment(**fields: object) -> Adjustment:
    """A change of learning rates to half."""
    given: dict[str, object] = {"group": None, "factor": 0.5, "origin": "operator", "request_id": "r", "reason": "x"}
    return Adjustment(**{**given, **fields})  # type: ignore[arg-type]


def test_a_change_of_the_optimizer_changes_rates_and_hyperparameters() -> None:
    """The result has the rates before and after, the changes as sentences, and the active adjustments."""
    run = driven("SlotJob")
    run.train_to(2)
    done = run.execute(ChangeOptimizer(adjustment(), {"momentum": 0.5}, None))
    assert (done.global_step, done.failure) == (2, None)
    assert isinstance(done.result, OptimizerChanged)
    assert (done.result.before, done.result.after) == ({"host": 0.05}, {"host": 0.025})
    assert done.result.hyperparameters == ("host momentum: 0.9 -> 0.5",)
    assert [active.at_step for active in done.result.adjustments] == [2]
    assert run.module.optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (ChangeOptimizer(adjustment(), {"momentum": -1.0}, None), HyperparameterError),
        (ChangeOptimizer(adjustment(), {"beta9": 0.5}, None), HyperparameterError),
        (ChangeOptimizer(adjustment(group="seed:x"), {}, None), UnknownGroupError),
        (ChangeOptimizer(adjustment(factor=1e9), {}, None), AdjustmentRefusedError),
    ],
)
def test_a_rejected_change_of_the_optimizer_changes_nothing(command: ChangeOptimizer, error: type[Exception]) -> None:
    """Neither rates nor hyperparameters, and the failure is the same error."""
    run = driven("SlotJob")
    run.train_to(1)
    before = run.digest
    done = run.execute(command)
    assert done.result is None
    assert done.failure is not None
    assert isinstance(done.failure.error(), error)
    assert run.digest == before


def test_seeds_batches_and_profiles() -> None:
    """Each command has its result; an invalid profile is rejected."""
    run = driven("SlotJob")
    seeds = run.execute(ReconcileSeeds(seed())).result
    assert isinstance(seeds, SeedsChanged)
    assert [group["name"] for group in run.module.optimizer.param_groups] == ["host", "seed:a"]
    assert any(".seeds." in name for name, _ in run.module.model.named_parameters())
    assert run.execute(SkipBatches(((1, 2), (1, 3)))).result == BatchesSkipped(2)
    assert run.execute(SkipBatches(((1, 3),))).result == BatchesSkipped(2)
    for command, words in ((CaptureProfile(0), "steps"), (CaptureProfile(1, rank=1), "the lane is one process")):
        failure = run.execute(command).failure
        assert failure is not None
        assert isinstance(failure.error(), InvalidFieldError)
        assert words in str(failure)


def test_a_captured_image_crosses_by_its_id() -> None:
    """The image is in the pool until it is taken or discarded."""
    run = driven("SlotJob")
    run.train_to(2)
    result = run.execute(CaptureImage()).result
    assert isinstance(result, ImageCaptured)
    assert len(run.images) == 1
    with run.images.take(result.image_id) as image:
        assert image.position == Position(2, 1)
    assert len(run.images) == 0


def test_a_forbidden_restore_and_a_discarded_image_are_abandoned() -> None:
    """Late commands are answered with the same error as those past their deadline."""
    run = driven("SlotJob")
    lease = run.capture()  # the first command of this lane
    run.train_to(2)
    before = run.digest
    assert run.gate.forbid(2)
    discarded = run.images.put(lease)
    run.images.discard(discarded)
    for command in (RESTORE, Restore(0, 1e12, discarded)):
        failure = run.execute(command).failure
        assert failure is not None
        assert isinstance(failure.error(), RestoreAbandonedError)
    assert run.digest == before
    assert run.restore(0).position.global_step == 0


# -- shared memory ---------------------------------------------------------------------------------------------------


def test_a_hold_in_shared_memory_precedes_its_command() -> None:
    """It holds the lane at once; the command that follows is the same hold, and a release ends both."""
    holds, wanted = Holds(), [0]
    queue = CommandQueue(holds, nullcontext, hold_number=lambda: wanted[0])
    assert queue.continue_step()
    wanted[0] = 5
    thread, results = in_thread(queue.continue_step)
    assert holds.event.wait(180)
    queue.put(0, Hold(5))
    wanted[0] = 0
    queue.put(0, Release())
    thread.join(180)
    assert (results, holds.numbers) == ([True], [5])


def test_a_hold_in_shared_memory_that_was_released_is_over() -> None:
    """A word that was read just before the service cleared it holds nothing any more."""
    queue = CommandQueue(Holds(), nullcontext, hold_number=lambda: 5)
    queue.put(0, Hold(5))
    queue.put(0, Release())
    assert queue.continue_step()
    assert queue.next_command() is None


def test_the_gate_in_shared_memory_grants_or_forbids() -> None:
    """The first of the two decides; a restore past its deadline is forbidden whatever the page says."""
    page = LanePage.create()
    gate = PageGate(page)
    assert not gate.expired(1, 1e12)
    assert gate.grant(1, 1e12)
    assert not page.forbid(1)
    assert page.forbid(2)
    assert gate.expired(2, 1e12)
    assert not gate.grant(2, 1e12)
    assert gate.expired(3, 0.0)
    assert not gate.grant(3, 0.0)
