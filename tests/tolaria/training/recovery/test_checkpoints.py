from __future__ import annotations

import errno
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, CIRCUIT_STATE_OPEN
from tolaria.config import CheckpointSettings
from tolaria.errors import CheckpointWriteError, LaneStoppedError, StateUnsupportedError, TolariaError
from tolaria.resilience.breaker import Breaker
from tolaria.rollback import (
    CheckpointRow,
    CheckpointWriter,
    FastRollbackCache,
    FaultRow,
    Filesystem,
    Lease,
    Position,
    Retention,
    Storage,
    open_storage,
)
from tolaria.telemetry.emitter import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.training.recovery.checkpoints import (
    BUSY_S,
    CheckpointDesk,
    DeskTools,
    Evaluation,
    due_by_epochs,
    due_by_steps,
    retention_of,
)

if TYPE_CHECKING:
    from faults.small_training import Training

pytestmark = pytest.mark.anyio

COOLDOWN_S = 30.0


class Disk(Filesystem):
    """Full when told, or so slow that nothing is made before the gate opens."""

    def __init__(self) -> None:
        self.full = False
        self.gate = threading.Event()
        self.gate.set()

    def make_directory(self, path: Path) -> None:
        assert self.gate.wait(20)
        super().make_directory(path)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, content)


class Room:
    """A desk with real storage, ring and writer; in place of sleeping it waits until the test lets it go on."""

    def __init__(self, training: Training, directory: Path, settings: CheckpointSettings) -> None:
        self.training = training
        self.disk = Disk()
        self.storage: Storage = open_storage(directory, run_id="run", retention=Retention(last=100), files=self.disk)
        self.cache = FastRollbackCache(entries_max=8, seal=False)
        self.writer = CheckpointWriter(self.storage.checkpoints)
        self.metrics, self.emitter = Metrics(), Emitter()
        self.now_s = 0.0
        self.breaker = Breaker("checkpoint", clock=lambda: self.now_s)
        self.log: list[tuple[str, str]] = []
        self.refusal: TolariaError | OSError | None = None
        self.kept = 0
        self.slept_s: list[float] = []
        self.morning = anyio.Event()
        tools = DeskTools(
            writer=self.writer,
            keep=self.keep,
            hold=lambda reason: self.log.append(("hold", reason)),
            go_on=lambda reason: self.log.append(("go_on", reason)),
            breaker=self.breaker,
            metrics=self.metrics,
            emitter=self.emitter,
        )
        self.desk = CheckpointDesk(
            settings,
            tools,
            changed=lambda: self.log.append(("failing", self.desk.failing)),
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )

    async def keep(self) -> Lease:
        self.kept += 1
        if self.refusal is not None:
            raise self.refusal
        return await anyio.to_thread.run_sync(self.leased)

    def leased(self) -> Lease:
        self.cache.capture(self.training.state())
        lease = self.cache.hold(self.training.position.global_step)
        assert lease is not None
        return lease

    async def sleep(self, time_s: float) -> None:
        self.slept_s.append(time_s)
        await self.morning.wait()

    def wake(self) -> None:
        """End the sleep that goes on."""
        self.morning.set()
        self.morning = anyio.Event()

    def at(self, step: int) -> None:
        """Training has got to this step."""
        self.training.position = Position(step, 1)

    async def quiet(self, sleeps: int = 0) -> None:
        """Until the desk has nothing to do at present, having gone to sleep so many times."""
        await anyio.wait_all_tasks_blocked()
        await self.asleep(sleeps)
        with anyio.fail_after(20):
            while self.desk._turn.locked():
                await anyio.sleep(0.001)
        await anyio.wait_all_tasks_blocked()

    async def asleep(self, times: int) -> None:
        """Until the desk, or who waits there, has gone to sleep so many times."""
        with anyio.fail_after(20):
            while len(self.slept_s) < times:
                await anyio.sleep(0.001)

    async def rows(self) -> list[CheckpointRow]:
        return list(await anyio.to_thread.run_sync(self.storage.checkpoints.restore_points))

    async def steps(self) -> list[int]:
        return [row.global_step for row in await self.rows()]

    def words(self) -> list[str]:
        return [word for word, _ in self.log]

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tolaria.checkpoint.{name}")


class Rooms:
    """Makes rooms and closes them."""

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        self.directory = directory
        self.made: list[Room] = []

    async def __call__(self, **settings: object) -> Room:
        room = await anyio.to_thread.run_sync(
            Room, self.training, self.directory, CheckpointSettings.model_validate(settings)
        )
        self.made.append(room)
        return room


@pytest.fixture
def rooms(training: Training, tmp_path: Path) -> Iterator[Rooms]:
    """Makes rooms; at the end writers and journals are closed."""
    rooms = Rooms(training, tmp_path)
    yield rooms
    for room in rooms.made:
        room.disk.gate.set()
        room.writer.__exit__(None, None, None)
        room.storage.journal.close()


@asynccontextmanager
async def serving(room: Room) -> AsyncIterator[None]:
    """While the block runs, the desk's task does."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.serve)
        yield
        tasks.cancel_scope.cancel()


def evaluation(step: int, epoch: int = 1, accuracy: float = 0.5, loss: float = 2.0) -> Evaluation:
    """What validation found."""
    return Evaluation(step, epoch, accuracy, loss)


# -- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "now", "last", "due"),
    [
        (0, 100, 0, False),
        (10, 9, 0, False),
        (10, 10, 0, True),
        (10, 25, 10, True),
        (10, 19, 10, False),
        (1, 1, 1, False),
    ],
)
def test_due_by_steps(every: int, now: int, last: int, due: bool) -> None:
    """So many updates after the last one, also when reports skip the very step; 0 is never."""
    assert due_by_steps(every, now, last) is due


@pytest.mark.parametrize(("every", "epoch", "due"), [(0, 1, False), (1, 1, True), (3, 2, False), (3, 3, True)])
def test_due_by_epochs(every: int, epoch: int, due: bool) -> None:
    """Every so many epochs; 0 is never."""
    assert due_by_epochs(every, epoch) is due


def test_retention_follows_the_settings() -> None:
    """Accuracy is best when highest, loss when lowest."""
    assert retention_of(CheckpointSettings(keep_last=7)) == Retention(last=7, best="highest")
    assert retention_of(CheckpointSettings(best="loss")) == Retention(last=3, best="lowest")


async def test_checkpoints_at_epochs_ends_and_between(rooms: Rooms) -> None:
    """Each is at the step where it fell due; what is not due writes nothing; a rollback starts the count again."""
    room = await rooms(every_epochs=2, every_steps=10)
    async with serving(room):
        for step in (9, 10, 15, 21):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
        for epoch in (1, 2):
            room.at(25 + epoch)
            room.desk.epoch_over(evaluation(25 + epoch, epoch))
            await room.quiet()
        for step in (4, 13, 14):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
    assert await room.steps() == [10, 21, 27, 14]
    assert room.value("duration_seconds_count") == 4
    assert room.value("size_bytes") == (await room.rows())[-1].size_bytes
    assert (room.log, room.desk.failing, room.value("failures_total")) == ([], "", 0)


async def test_a_resumed_run_counts_from_where_it_goes_on(rooms: Rooms) -> None:
    """Its first steps are no reason to write again what it was read from."""
    room = await rooms(every_steps=10)
    room.desk = CheckpointDesk(CheckpointSettings(every_steps=10), room.desk._tools, from_step=1000)
    async with serving(room):
        room.desk.stepped(1009)
        await room.quiet()
        assert room.kept == 0
        room.desk.stepped(1010)
        await room.quiet()
    assert room.kept == 1


async def test_updates_are_counted_from_an_operators_checkpoint_too(rooms: Rooms) -> None:
    """The next periodic one comes its full distance after it."""
    room = await rooms(every_steps=10)
    async with serving(room):
        room.at(8)
        await room.desk.create("test")
        for step in (17, 18):
            room.at(step)
            room.desk.stepped(step)
            await room.quiet()
    assert await room.steps() == [8, 18]


@pytest.mark.parametrize(("best", "metric"), [("accuracy", 0.5), ("loss", 2.0)])
async def test_only_a_validated_state_can_be_the_best(rooms: Rooms, best: str, metric: float) -> None:
    """An epoch's checkpoint has its figure, also when its fence is a little later, and one of the same step as well."""
    room = await rooms(every_steps=10, best=best)
    async with serving(room):
        room.at(12)
        room.desk.epoch_over(evaluation(10))
        await room.quiet()
        await room.desk.create("test")
        room.at(22)
        room.desk.stepped(22)
        await room.quiet()
        room.at(30)
        room.desk.epoch_over(evaluation(30, accuracy=math.nan, loss=math.nan))
        await room.quiet()
    assert [(row.global_step, row.metric) for row in await room.rows()] == [
        (12, metric),
        (12, metric),
        (22, None),
        (30, None),
    ]


async def test_a_figure_of_a_past_that_never_was_is_forgotten(rooms: Rooms) -> None:
    """After a rollback behind it, the same step again is another state."""
    room = await rooms(every_epochs=0)
    room.desk.epoch_over(evaluation(10))
    room.desk.stepped(5)
    room.at(10)
    assert (await room.desk.create("test")).metric is None


# -- a busy writer ---------------------------------------------------------------------------------------------------


async def test_what_falls_due_while_one_is_written_is_left_out_quietly(rooms: Rooms) -> None:
    """Nothing piles up behind a slow disk, the loop goes on, and the next one due is made."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    async with serving(room):
        for step in (1, 2, 3):
            room.at(step)
            room.desk.stepped(step)
            await anyio.wait_all_tasks_blocked()
        assert room.kept == 1
        room.disk.gate.set()
        await room.quiet()
        room.at(4)
        room.desk.stepped(4)
        await room.quiet()
    assert (room.kept, await room.steps(), room.log) == (2, [1, 4], [])


async def test_a_disk_that_hangs_is_told_of(rooms: Rooms) -> None:
    """It refuses nothing, so nothing has failed; but that there is no checkpoint shows until there is one."""
    room = await rooms()
    room.desk = CheckpointDesk(
        CheckpointSettings(), room.desk._tools, stalled_s=0.01, changed=lambda: room.log.append(("", room.desk.failing))
    )
    room.disk.gate.clear()
    async with serving(room):
        room.desk.epoch_over(evaluation(0))
        with anyio.fail_after(20):
            while not room.desk.failing:
                await anyio.sleep(0.001)
        room.disk.gate.set()
        await room.quiet()
    assert room.log == [("", "the checkpoint of step 0 takes longer than 0.01 s"), ("", "")]
    assert (await room.steps(), room.value("failures_total")) == ([0], 0)


async def test_an_operators_checkpoint_waits_for_its_turn(rooms: Rooms) -> None:
    """It comes after the one that is being written, and has the state of its own time."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    created: list[CheckpointRow] = []

    async def create() -> None:
        created.append(await room.desk.create("before lunch"))

    async with serving(room):
        room.at(1)
        room.desk.stepped(1)
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await anyio.wait_all_tasks_blocked()
            assert (room.kept, created) == (1, [])
            room.at(2)
            room.disk.gate.set()
    assert ([row.global_step for row in created], await room.steps()) == ([2], [1, 2])


async def test_a_writer_that_seals_is_waited_for_by_an_operator_and_by_nobody_else(rooms: Rooms) -> None:
    """A periodic one is left out; an operator's is tried again until it is taken; no lease is kept back."""
    room = await rooms(every_steps=1)
    room.disk.gate.clear()
    for step in (1, 2):
        room.at(step)
        assert room.writer.write(await anyio.to_thread.run_sync(room.leased), metric=None) is not None
    async with serving(room):
        room.at(3)
        room.desk.stepped(3)
        await room.quiet()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(room.desk.create, "test")
            await room.asleep(1)
            room.disk.gate.set()
            with anyio.fail_after(20):
                while len(await room.steps()) < 2:
                    await anyio.sleep(0.001)
            room.wake()
    assert (await room.steps(), room.slept_s, room.log) == ([1, 2, 3], [BUSY_S], [])
    assert all(slot.leases == 0 for slot in room.cache._slots)


async def test_one_that_nobody_waits_for_any_more_is_still_written(rooms: Rooms) -> None:
    """An operator who gives up leaves the desk as it was: no lease, no turn is lost."""
    room = await rooms(every_epochs=0)
    room.disk.gate.clear()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.create, "test")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    room.disk.gate.set()
    room.at(1)
    await room.desk.create("again")
    assert await room.steps() == [0, 1]
    assert all(slot.leases == 0 for slot in room.cache._slots)


# -- a disk that refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_failure", "held"), [("pause", ["hold", "go_on"]), ("continue", [])])
async def test_a_full_disk_is_told_and_mends_by_itself(rooms: Rooms, on_failure: str, held: list[str]) -> None:
    """Held or not, as set; tried again with a fresh state until there is space; then all is as before."""
    room = await rooms(on_failure=on_failure, retry_s=7.0)
    room.disk.full = True
    async with serving(room):
        room.at(10)
        room.desk.epoch_over(evaluation(10))
        await room.quiet(sleeps=1)
        assert "ENOSPC" in room.desk.failing
        room.at(11)
        room.wake()
        await room.quiet(sleeps=2)
        assert await room.steps() == []
        room.disk.full = False
        room.at(12)
        room.wake()
        await room.quiet()
        assert (room.desk.failing, await room.steps()) == ("", [12])
        room.at(20)
        room.desk.epoch_over(evaluation(20))
        await room.quiet()
    assert await room.steps() == [12, 20]
    assert room.slept_s == [7.0, 7.0]
    told = [event.attributes for event in room.emitter.recent if event.description == "tolaria.checkpoint_failed"]
    assert [dict(each) for each in told] == [
        {"step": str(step), "stage": "write", "reason": "ENOSPC"} for step in (10, 11)
    ]
    assert (room.value("failures_total"), room.value("duration_seconds_count")) == (2, 2)
    assert [word for word in room.words() if word != "failing"] == held
    assert len({reason for word, reason in room.log if word != "failing"}) <= 1
    assert [reason for word, reason in room.log if word == "failing"][-1] == ""
    faults = await anyio.to_thread.run_sync(room.storage.journal.rows, FaultRow)
    assert [fault.kind for fault in faults] == ["checkpoint_failed"] * 2


async def test_the_figure_of_a_held_state_survives_the_retries(rooms: Rooms) -> None:
    """A run that stands is written late as what it was validated as."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        room.at(11)
        room.desk.epoch_over(evaluation(10))
        await room.quiet(sleeps=1)
        room.disk.full = False
        room.wake()
        await room.quiet()
    assert [(row.global_step, row.metric) for row in await room.rows()] == [(11, 0.5)]


async def test_nothing_more_is_asked_for_while_it_is_mended(rooms: Rooms) -> None:
    """Epochs that end meanwhile do not hurry the retries."""
    room = await rooms(on_failure="continue")
    room.disk.full = True
    async with serving(room):
        for step in (10, 20, 30):
            room.at(step)
            room.desk.epoch_over(evaluation(step))
            await room.quiet(sleeps=1)
    assert room.kept == 1


async def test_the_breaker_opens_and_is_closed_again_by_a_checkpoint(rooms: Rooms) -> None:
    """Three failures open it; a success while it cools down lets training go on, and one after that closes it."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        room.at(1)
        room.desk.epoch_over(evaluation(1))
        for sleeps in (1, 2, 3):
            await room.quiet(sleeps=sleeps)
            room.wake()
        await room.quiet(sleeps=4)
        assert room.breaker.state == CIRCUIT_STATE_OPEN
        room.disk.full = False
        room.wake()
        await room.quiet(sleeps=5)
        assert (room.breaker.state, room.desk.failing) == (CIRCUIT_STATE_OPEN, "")
        assert room.words().count("go_on") == 1
        room.now_s = COOLDOWN_S
        room.wake()
        await room.quiet()
    assert room.breaker.state == CIRCUIT_STATE_CLOSED
    assert (len(room.slept_s), len(await room.steps())) == (5, 2)


async def test_an_operators_checkpoint_that_fails_counts_and_one_that_succeeds_mends(rooms: Rooms) -> None:
    """Whoever asked is told why; the run is held and goes on as with any other; the retry that slept does no more."""
    room = await rooms()
    room.disk.full = True
    async with serving(room):
        with pytest.raises(CheckpointWriteError, match="ENOSPC"):
            await room.desk.create("test")
        await room.quiet(sleeps=1)
        room.disk.full = False
        room.at(5)
        assert (await room.desk.create("test")).global_step == 5
        assert (room.desk.failing, [word for word in room.words() if word != "failing"]) == ("", ["hold", "go_on"])
        room.at(6)
        room.desk.epoch_over(evaluation(6))  # while the retry still sleeps
        room.wake()
        await room.quiet()
    assert await room.steps() == [5, 6]


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (StateUnsupportedError("group/0/x", "an object"), "group/0/x: an object"),
        (OSError(errno.EIO, "made to fail"), "EIO"),
    ],
)
async def test_a_state_that_cannot_be_kept_is_a_failure_like_any(
    rooms: Rooms, refusal: TolariaError | OSError, reason: str
) -> None:
    """The task lives on, and the event names the stage."""
    room = await rooms()
    room.refusal = refusal
    async with serving(room):
        room.desk.epoch_over(evaluation(3))
        await room.quiet(sleeps=1)
        room.refusal = None
        room.wake()
        await room.quiet()
    assert (room.desk.failing, await room.steps()) == ("", [0])
    (event,) = room.emitter.recent
    assert dict(event.attributes) == {"step": "3", "stage": "keep", "reason": reason}


async def test_without_a_lane_the_task_ends_and_nothing_has_failed(rooms: Rooms) -> None:
    """The run is over: no failure of storage."""
    room = await rooms()
    room.refusal = LaneStoppedError("it has been told to stop")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(room.desk.serve)
        room.desk.epoch_over(evaluation(3))
    with pytest.raises(LaneStoppedError):
        await room.desk.create("test")
    assert (room.log, room.value("failures_total"), list(room.emitter.recent)) == ([], 0, [])
