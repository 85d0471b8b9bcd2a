from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from leyline.v1.admin_service_pb2 import RUN_STATE_HALTED
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, ROLLBACK_TIER_UNSPECIFIED, RollbackTier
from support.disks import FailingDisk
from support.lanes import FakeLane, small_image, started_client
from support.rollbacks import FakeBoard, FakeJournal
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Damage, Retention
from tolaria.config import HealthSettings, RollbackSettings
from tolaria.emergency import Trigger
from tolaria.errors import (
    AdjustmentRefusedError,
    LaneError,
    NoCheckpointError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    StateMismatchError,
    WrongStateError,
)
from tolaria.images import SnapshotInfo
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.messages import (
    BatchesSkipped,
    ChangeOptimizer,
    CommandDone,
    Event,
    Held,
    Hold,
    LaneEnded,
    OptimizerChanged,
    Release,
    Restore,
    Restored,
    SkipBatches,
    StepDone,
)
from tolaria.rollback.coordinator import RollbackCoordinator
from tolaria.rollback.protocol import Ending, Rollback
from tolaria.run.adjustments import RunAdjustments, saved_adjustments
from tolaria.run.checkpointing import Checkpointing
from tolaria.run.health import Health
from tolaria.run.observers import RunObserver
from tolaria.run.recovery import Recovery
from tolaria.run.restore_points import RestorePoints
from tolaria.run.restorer import LaneRestorer
from tolaria.run.run_state import Lifecycle
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus
from tolaria.run.verdicts import RateCut, Retreat
from tolaria.telemetry.tracing import Tracer
from tolaria.values.lineage import Lineage
from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.training import EpochProgress, Position

pytestmark = pytest.mark.anyio


class FakeLifecycle(Lifecycle):
    """A run that has ended if the test says so."""

    has_ended = False

    def __init__(self) -> None:
        self.changes = 0

    @property
    def ended(self) -> bool:
        """As the test says."""
        return self.has_ended

    def changed(self) -> None:
        """Counts changes that a status shows."""
        self.changes += 1


class FakeHealth(Health):
    """Has the batches that the test says were spoiled."""

    spoiled: tuple[tuple[int, int], ...] = ()
    all_left_out: tuple[tuple[int, int], ...] = ()

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """Those of all retreats that have ended."""
        return self.all_left_out

    def end_retreat(self) -> tuple[tuple[int, int], ...]:
        """Returns them once."""
        spoiled, self.spoiled = self.spoiled, ()
        self.all_left_out += spoiled
        return spoiled


class Recorder(RunObserver):
    """Notes, in `log`, what happens around a rollback, and whether the lane is held then."""

    def __init__(self) -> None:
        self.log: list[tuple[str, bool]] = []
        self.durations: list[tuple[str, float, int | None]] = []
        self.damaged: list[Damage] = []
        self.held: Callable[[], bool] = lambda: False

    @property
    def words(self) -> list[str]:
        """What happened."""
        return [word for word, _ in self.log]

    def note(self, word: str) -> None:
        """Notes one event."""
        self.log.append((word, self.held()))

    def on_rollback_started(self, rollback: Rollback) -> None:
        self.note("started")

    def on_rollback_ended(self, rollback: Rollback) -> None:
        self.note("ended")

    def on_rollback_duration(self, tier: int, outcome: str, duration_s: float) -> None:
        self.durations.append((outcome, duration_s, None))

    def on_rollback_recovered(self, rollback: Rollback, duration_s: float, step: int) -> None:
        self.durations.append(("recovered", duration_s, step))

    def on_checkpoint_damaged(self, rollback_id: str, damage: Damage) -> None:
        self.damaged.append(damage)


class FakeCheckpointing(Checkpointing):
    """Notes which checkpoints are superseded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.branches: list[int] = []

    async def keep(self) -> tuple[CheckpointRow, bool]:
        """Keeps nothing."""
        raise WrongStateError("nothing is kept")

    def spare(self, checkpoint_id: str) -> None:
        """Does nothing: nothing is removed."""

    async def follow(self, lineage: Lineage, detail: str) -> int:
        """Notes the reason; one checkpoint is superseded."""
        self._recorder.note(detail)
        return 1

    def rewound(self, global_step: int, lineage: Lineage) -> None:
        """Does nothing: no image is in flight."""

    async def save_branch(self, global_step: int) -> None:
        """Notes the step."""
        self.branches.append(global_step)

    def on_proven(self, checkpoint_ids: object) -> None:
        """Does nothing."""


class FakeSafety(Safety):
    """Notes what is raised."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def trigger(self, trigger: Trigger, detail: str) -> None:
        """Notes it."""
        assert trigger is Trigger.ROLLBACK_DEADLINE_MISSED
        self._recorder.note(f"missed: {detail}")

    def halt(self, reason: str) -> None:
        """Notes the kind of the reason."""
        self._recorder.note(reason.partition(":")[0].removeprefix("rollback_"))


def restored(command: Restore, *, state_digest: str = "d") -> Restored:
    """The lane's answer to a restore of the target."""
    return Restored(
        position=Position(command.target_step, 1),
        state_digest=state_digest,
        expected_digest="d",
        restore_ms=1.5,
        progress=EpochProgress(),
        seeds=(),
        learning_rates={},
        adjustments=(),
    )


class RecoveryParts:
    """Recovery with a scripted lane that has snapshots of steps 3, 6 and 9. Made on the event loop."""

    def __init__(self, storage: Storage, *, budget_s: float = 30.0, resumed: CheckpointRow | None = None) -> None:
        self.lane = FakeLane(
            {
                Restore: restored,
                SkipBatches: lambda command: BatchesSkipped(len(command.batches)),
                ChangeOptimizer: self._adjusted,
            }
        )
        self.client = started_client(self.lane, self._apply)
        self.status = RunStatus("run", "digits", "", 1, 0.0)
        self.status.snapshots = tuple(SnapshotInfo(Position(step, 1), 8, "d") for step in (3, 6, 9))
        self.status.global_step = 11
        self.lifecycle, self.health = FakeLifecycle(), FakeHealth(RollbackSettings(), HealthSettings())
        self.recorder = Recorder()
        self.recorder.held = lambda: self.client.held_for("rollback")
        self.points = RestorePoints(resumed=resumed)
        self.points.snapshots_changed(self.status.snapshots)
        self.prove(10)
        self.checkpointing = FakeCheckpointing(self.recorder)
        self.restorer = LaneRestorer(
            self.client,
            self.status,
            storage.checkpoints,
            self.recorder,
            points=self.points,
            checkpointing=self.checkpointing,
        )
        self.journal = FakeJournal()
        coordinator = RollbackCoordinator(
            {},
            self.restorer,
            run_id="run",
            settings=RollbackSettings(fast_budget_s=budget_s, full_budget_s=budget_s),
            board=FakeBoard(),
            journal=self.journal,
        )
        self.recovery = Recovery(
            coordinator,
            self.restorer,
            lifecycle=self.lifecycle,
            health=self.health,
            observers=self.recorder,
            safety=FakeSafety(self.recorder),
            adjustments=RunAdjustments(self.client, AsyncJournal(storage.journal, "run"), self.status),
            tracer=Tracer(),
        )

    def prove(self, sound_losses: int) -> None:
        """Reports losses that prove the points before them."""
        for _ in range(sound_losses):
            self.points.step_done(above=False, suspect=False)

    def _adjusted(self, command: ChangeOptimizer) -> OptimizerChanged:
        assert command.adjustment is not None
        return OptimizerChanged({}, {}, (), (ActiveAdjustment(command.adjustment, self.status.global_step),))

    def _apply(self, event: Event) -> None:
        if isinstance(event, CommandDone) and isinstance(event.result, OptimizerChanged):
            self.status.adjusted(event.result)
        if isinstance(event, CommandDone) and isinstance(event.result, Restored):
            self.recovery.rewound(event.result)


@pytest.fixture
def disk() -> FailingDisk:
    """The disk of the checkpoints."""
    return FailingDisk()


@pytest.fixture
def storage(tmp_path: Path, disk: FailingDisk) -> Iterator[Storage]:
    """Storage with checkpoints of steps 2 and 5."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=10, best="highest"), files=disk)
    for step in (2, 5):
        storage.checkpoints.write(small_image(step))
    yield storage
    storage.journal.close()


@asynccontextmanager
async def serving(parts: RecoveryParts) -> AsyncIterator[None]:
    """Runs the task that carries rollbacks out while the block runs."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.recovery.serve)
        yield
        tasks.cancel_scope.cancel()


async def prove_checkpoints(storage: Storage) -> None:
    """Marks every checkpoint as proven."""
    rows = await anyio.to_thread.run_sync(storage.checkpoints.restore_points)
    await AsyncJournal(storage.journal, "run").prove([row.checkpoint_id for row in rows])


def fast(target_step: int | None = None) -> Rollback:
    """A rollback to a snapshot."""
    return Rollback(ROLLBACK_TIER_FAST, target_step, "odd", "operator")


def step_done(global_step: int, *, skipped: bool = False) -> StepDone:
    """A step that is done now."""
    now_s = time.monotonic()
    return StepDone(global_step, 1, 1.0, 1.0, 8, 0.01, 0.0, now_s, skipped=skipped)


# -- finding and restoring a state -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "at_or_before", "step", "chosen"),
    [
        (ROLLBACK_TIER_FAST, None, 9, "the newest proven one: the snapshot"),
        (ROLLBACK_TIER_FAST, 8, 6, "the nearest at or before step 8: the snapshot"),
        (ROLLBACK_TIER_FULL, None, 5, "none is proven, the newest not suspect: checkpoint 000000000005"),
        (ROLLBACK_TIER_FULL, 4, 2, "the nearest at or before step 4: checkpoint 000000000002"),
        (ROLLBACK_TIER_UNSPECIFIED, 5, 5, "the nearest at or before step 5: checkpoint 000000000005"),
    ],
)
async def test_the_chosen_restore_point(
    storage: Storage, tier: RollbackTier.ValueType, at_or_before: int | None, step: int, chosen: str
) -> None:
    """The fast tier has the snapshots in memory, the full tier the checkpoints; the rollback says which it takes."""
    parts, rollback = RecoveryParts(storage), Rollback(tier, at_or_before, "odd", "operator")
    await parts.restorer.choose(rollback)
    assert (rollback.chosen_step, rollback.chosen.rpartition("-")[0] or rollback.chosen) == (step, chosen)


@pytest.mark.parametrize(
    ("rollback", "words"),
    [
        (Rollback(ROLLBACK_TIER_FAST, 2, "", "operator"), "no restore point of the fast tier at or before step 2"),
        (
            Rollback(ROLLBACK_TIER_FULL, None, "", "health", before_step=4),
            "no proven restore point of the full tier be",
        ),
        (Rollback(ROLLBACK_TIER_UNSPECIFIED, None, "", "operator", checkpoint_id="x"), "there is no checkpoint x"),
    ],
)
async def test_without_a_restore_point_the_reason_is_raised(storage: Storage, rollback: Rollback, words: str) -> None:
    """The error says what was looked for."""
    with pytest.raises(NoCheckpointError, match=words):
        await RecoveryParts(storage).restorer.choose(rollback)


async def test_a_snapshot_is_restored_by_the_lane(storage: Storage) -> None:
    """The command has the deadline and no image; the rollback gets what the lane answers."""
    parts, rollback = RecoveryParts(storage), fast(6)
    await parts.restorer.choose(rollback)
    rollback.deadline_s = 123.0
    await parts.restorer.restore(rollback)
    assert parts.lane.sent_of(Restore) == [Restore(6, 123.0)]
    assert (rollback.restored_step, rollback.proven, rollback.restore_ms) == (6, True, 1.5)


async def test_a_checkpoint_is_loaded_for_the_lane(storage: Storage, tmp_path: Path) -> None:
    """A damaged one is observed and the next older one is passed on; its image does not stay in the pool."""
    parts = RecoveryParts(storage)
    positions = []

    def take(command: Restore) -> Restored:
        with parts.lane.images.take(command.image_id) as image:
            positions.append(image.position)
        return restored(command)

    parts.lane.answers[Restore] = take
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "state.json").unlink()
    rollback = Rollback(ROLLBACK_TIER_FULL, 5, "odd", "operator")
    await parts.restorer.choose(rollback)
    rollback.deadline_s = time.monotonic() + 180
    await parts.restorer.restore(rollback)
    assert positions == [Position(2, 1)]
    assert [damage.checkpoint_id for damage in parts.recorder.damaged] == [newest.name]
    assert len(parts.lane.images) == 0


async def test_the_lanes_error_is_raised_as_the_same_error(storage: Storage) -> None:
    """An unexpected result is a LaneError."""
    parts = RecoveryParts(storage)
    parts.lane.answers[Restore] = StateMismatchError(["parameter/w: missing"])
    with pytest.raises(StateMismatchError, match="parameter/w"):
        await parts.restorer.restore(fast(6))
    parts.lane.answers[Restore] = BatchesSkipped(0)
    with pytest.raises(LaneError, match="BatchesSkipped"):
        await parts.restorer.restore(fast(6))


@pytest.mark.parametrize("copying", [True, False])
async def test_a_submitted_restore_is_forbidden_unless_the_lane_copies(storage: Storage, copying: bool) -> None:
    """The lane decides; a cancelled wait does not make a difference."""
    parts, rollback = RecoveryParts(storage), fast(6)
    del parts.lane.answers[Restore]
    parts.lane.copying = copying
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(parts.restorer.restore, rollback)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert parts.restorer.forbid(rollback) is not copying
    assert bool(parts.lane.forbidden) is not copying


async def test_a_slow_disk_is_given_up_at_the_deadline(storage: Storage, disk: FailingDisk) -> None:
    """Nothing is submitted to the lane, neither then nor when the disk answers."""
    parts = RecoveryParts(storage, budget_s=0.2)
    disk.gate.clear()
    async with serving(parts):
        with anyio.fail_after(180), pytest.raises(RestoreAbandonedError):
            await parts.recovery.roll_back(Rollback(ROLLBACK_TIER_FULL, None, "odd", "operator"))
        assert disk.reading.is_set()
        disk.gate.set()
        await anyio.wait_all_tasks_blocked()
    assert parts.lane.sent_of(Restore) == []
    assert len(parts.lane.images) == 0


# -- one rollback of a run -------------------------------------------------------------------------------------------


async def test_the_lane_is_held_until_everything_is_done(storage: Storage) -> None:
    """Restored, spoiled batches skipped, the rate cut, later checkpoints superseded; only then is it released."""
    parts = RecoveryParts(storage)
    parts.health.spoiled = ((1, 4), (1, 3))
    async with serving(parts):
        with capture_logs() as logs:
            parts.recovery.retreat(Retreat("loss exploded", 9, (), RateCut(0.5, 3)))
            assert parts.recovery.running
            await anyio.wait_all_tasks_blocked()
    kinds = [type(command) for command in parts.lane.sent]
    assert kinds == [Hold, Restore, ChangeOptimizer, SkipBatches, Release]
    assert parts.recorder.log == [("started", True), ("rolled back to step 6", True), ("ended", True)]
    assert parts.checkpointing.branches == [6]
    (change,) = parts.lane.sent_of(ChangeOptimizer)
    assert change.adjustment is not None
    assert (change.adjustment.factor, change.adjustment.expires_after_steps) == (0.5, 3)
    assert (change.adjustment.origin, change.adjustment.group) == ("rollback", None)
    (line,) = [line for line in logs if line["event"] == "batches_left_out"]
    assert (line["epochs_and_places"], line["count"], line["count_in_all"]) == ([(1, 3), (1, 4)], 2, 2)
    assert (parts.recovery.running, parts.status.rollbacks, parts.status.rollbacks) == (False, 1, 1)
    assert [(row.tier, row.global_step, row.restored_step) for row in parts.journal.rollbacks] == [("fast", 11, 6)]
    assert parts.lifecycle.changes == 1


async def test_a_cut_is_durable_before_training_goes_on(storage: Storage) -> None:
    """A process that is killed by the next step resumes at the reduced rate, even before another checkpoint."""
    parts = RecoveryParts(storage)
    del parts.lane.answers[SkipBatches]
    parts.health.spoiled = ((1, 4),)
    async with serving(parts):
        parts.recovery.retreat(Retreat("loss exploded", 9, (), RateCut(0.25, 30)))
        with anyio.fail_after(180):
            while not parts.lane.sent_of(SkipBatches):
                await anyio.sleep(0.001)
        assert parts.client.held_for("rollback")
        found = await anyio.to_thread.run_sync(saved_adjustments, storage.journal, "run")
        parts.lane.answer(BatchesSkipped(1))
    (kept,) = found
    assert (kept.adjustment.origin, kept.adjustment.factor, kept.adjustment.expires_after_steps) == (
        "rollback",
        0.25,
        30,
    )
    assert kept.at_step == parts.status.global_step


async def test_without_a_snapshot_a_retreat_takes_a_checkpoint(storage: Storage) -> None:
    """A verdict that asks for the fast tier is satisfied by the full one."""
    parts = RecoveryParts(storage)
    parts.status.snapshots = ()
    await prove_checkpoints(storage)
    async with serving(parts):
        parts.recovery.retreat(Retreat("odd", 5, (), RateCut(0.5, 3)))
        with anyio.fail_after(180):
            while not parts.journal.rollbacks:
                await anyio.sleep(0.001)
    assert [(row.tier, row.restored_step) for row in parts.journal.rollbacks] == [("full", 2)]


async def test_a_retreat_takes_the_newest_proven_point_of_both_tiers(storage: Storage) -> None:
    """A checkpoint that is proven and newer than the proven snapshots before the evidence is taken."""
    parts = RecoveryParts(storage)
    await prove_checkpoints(storage)
    async with serving(parts):
        parts.recovery.retreat(Retreat("odd", 6, (), RateCut(0.5, 3)))
        with anyio.fail_after(180):
            while not parts.journal.rollbacks:
                await anyio.sleep(0.001)
    (row,) = parts.journal.rollbacks
    assert (row.tier, row.restored_step, row.origin, row.attempt) == ("full", 5, "health", 2)
    assert row.chosen.startswith("the newest proven one: checkpoint")


async def test_a_retreat_without_a_restore_point_halts(storage: Storage) -> None:
    """The state is ill and cannot be undone: it is neither trained nor saved."""
    parts = RecoveryParts(storage)
    async with serving(parts):
        parts.recovery.retreat(Retreat("loss exploded", 9, (), RateCut(0.5, 3), older_than=3))
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(180):
            while parts.recovery.running:
                await anyio.sleep(0.001)
    assert parts.recorder.log == [("started", True), ("failed", True), ("ended", True)]
    assert parts.recovery.ill == "loss exploded"


async def test_without_a_restore_point_the_answer_names_the_oldest(storage: Storage) -> None:
    """So that the operator can choose one."""
    parts = RecoveryParts(storage)
    message = "no restore point of the fast tier at or before step 1; the oldest of all is of step"
    async with serving(parts):
        with pytest.raises(NoCheckpointError, match=message):
            await parts.recovery.roll_back(Rollback(ROLLBACK_TIER_FAST, 1, "odd", "operator"))


async def test_a_trend_without_a_restore_point_does_not_halt(storage: Storage) -> None:
    """The job's losses may be like that: training goes on, and is saved."""
    parts = RecoveryParts(storage)
    async with serving(parts):
        parts.recovery.retreat(Retreat("rises slowly", 9, (), RateCut(0.5, 3), older_than=3, trend=True))
        with anyio.fail_after(180):
            while parts.recovery.running:
                await anyio.sleep(0.001)
    assert parts.recorder.log == [("started", True), ("ended", True)]
    assert not parts.recovery.unsound


async def test_a_rollback_to_another_branch(storage: Storage) -> None:
    """The lane drops its snapshots, which are no ancestors; the lineage is that of the checkpoint."""
    parts = RecoveryParts(storage)

    def take(command: Restore) -> Restored:
        with parts.lane.images.take(command.image_id) as image:
            return restored(replace(command, target_step=image.position.global_step))

    parts.lane.answers[Restore] = take
    parts.points.rewound(3, None)
    (_, left) = await anyio.to_thread.run_sync(storage.checkpoints.restore_points)
    await anyio.to_thread.run_sync(storage.checkpoints.follow, parts.points.lineage, "back to 3")
    async with serving(parts):
        done = await parts.recovery.roll_back(
            Rollback(ROLLBACK_TIER_UNSPECIFIED, None, "undo", "operator", checkpoint_id=left.checkpoint_id)
        )
    (command,) = parts.lane.sent_of(Restore)
    assert command.other_branch
    assert (done.restored_step, done.attempt, done.superseded) == (5, 3, 1)
    assert parts.points.lineage == Lineage(3, ((1, 5),))


async def test_a_second_rollback_and_one_after_the_end_are_rejected(storage: Storage) -> None:
    """Verdicts are satisfied by the one that is running, and ignored after the end."""
    parts = RecoveryParts(storage)
    verdict = Retreat("odd", 3, (), RateCut(0.5, 3))
    parts.recovery.begin(fast())
    with pytest.raises(WrongStateError, match="another rollback is running"):
        parts.recovery.begin(fast())
    parts.recovery.retreat(verdict)
    async with serving(parts):
        await anyio.wait_all_tasks_blocked()
    parts.lifecycle.has_ended = True
    with pytest.raises(WrongStateError, match="the run has ended"):
        parts.recovery.begin(fast())
    parts.recovery.retreat(verdict)
    assert parts.recorder.words.count("started") == 1


async def test_a_rollback_goes_on_when_its_caller_is_cancelled(storage: Storage) -> None:
    """The task of `serve` carries it out."""
    parts = RecoveryParts(storage)
    async with serving(parts):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await parts.recovery.roll_back(fast(6))
        with anyio.fail_after(180):
            while parts.recovery.running:
                await anyio.sleep(0.001)
        assert parts.status.rollbacks == 1


async def test_a_failed_rollback_leaves_everything_as_it_was(storage: Storage) -> None:
    """The caller gets the error; nothing is skipped, cut or superseded, and the lane goes on."""
    parts = RecoveryParts(storage)
    parts.lane.answers[Restore] = StateMismatchError(["parameter/w: missing"])
    parts.health.spoiled = ((1, 3),)
    async with serving(parts):
        with pytest.raises(StateMismatchError):
            await parts.recovery.roll_back(fast())
        assert [type(command) for command in parts.lane.sent] == [Hold, Restore, Release]
        assert (parts.recorder.words, parts.status.rollbacks) == (["started", "ended"], 0)
        parts.lane.answers[Restore] = restored
        await parts.recovery.roll_back(fast())
        assert parts.lane.sent_of(SkipBatches) == [SkipBatches(((1, 3),))]  # the next restore leaves them out


async def test_only_judged_losses_prove_restore_points(storage: Storage) -> None:
    """Neither skipped steps nor those whose samples all belong to seeds do."""
    parts = RecoveryParts(storage)
    parts.status.snapshots = (SnapshotInfo(Position(11, 1), 8, "d"),)
    parts.points.snapshots_changed(parts.status.snapshots)
    before = parts.points.newest_proven_step
    for at in range(12, 80):
        parts.recovery.on_judged(step_done(at))
        parts.recovery.on_judged(replace(step_done(at, skipped=True), judged=1.0))
    assert parts.points.newest_proven_step == before
    for at in range(80, 140):
        parts.recovery.on_judged(replace(step_done(at), judged=1.0))
    assert parts.points.newest_proven_step == 11


async def test_a_resume_mentions_the_checkpoint_it_begins_from(storage: Storage) -> None:
    """A run whose halt outlived its process; once, and only while no step has followed the checkpoint."""
    (row, *_) = await anyio.to_thread.run_sync(storage.checkpoints.restore_points)
    for step, mentioned in ((row.global_step, True), (row.global_step + 1000, False)):
        parts = RecoveryParts(storage, resumed=row)
        parts.status.state, parts.status.global_step = RUN_STATE_HALTED, step
        assert (row.checkpoint_id in await parts.recovery.leave_ill_state("on")) is mentioned
        assert await parts.recovery.leave_ill_state("on") == "on"


async def test_a_failed_proof_is_raised_while_the_lane_is_held(storage: Storage) -> None:
    """Later checkpoints are superseded all the same; the state is unproven, and not saved, until a restore succeeds."""
    parts = RecoveryParts(storage)
    parts.lane.answers[Restore] = lambda command: restored(command, state_digest="of something else")
    async with serving(parts):
        with pytest.raises(RestoreUnprovenError, match="the live state was overwritten"):
            await parts.recovery.roll_back(fast(6))
        assert parts.checkpointing.branches == []
        assert parts.recorder.log == [
            ("started", True),
            ("unproven", True),
            ("rolled back to step 6", True),
            ("ended", True),
        ]
        assert (parts.recovery.unproven, parts.status.rollbacks) == (True, 0)
        parts.lane.answers[Restore] = StateMismatchError(["parameter/w: missing"])
        with pytest.raises(StateMismatchError):
            await parts.recovery.roll_back(fast(3))
        assert parts.recovery.unproven
        parts.lane.answers[Restore] = restored
        await parts.recovery.roll_back(fast(3))
        assert not parts.recovery.unproven


async def test_an_operators_missed_deadline_halts_nothing(storage: Storage) -> None:
    """The named tier is not replaced by the other one, and training goes on."""
    parts = RecoveryParts(storage, budget_s=0.1)
    del parts.lane.answers[Restore]
    async with serving(parts):
        with pytest.raises(RestoreAbandonedError):
            await parts.recovery.roll_back(fast())
    assert parts.recorder.log == [("started", True), ("ended", True)]
    assert parts.recovery.ill == ""


async def test_a_missed_deadline_tries_the_other_tier_once_then_halts_an_ill_run(storage: Storage) -> None:
    """Both tries are recorded, each by its own id; no step is trained in between."""
    parts = RecoveryParts(storage, budget_s=0.1)
    await prove_checkpoints(storage)
    del parts.lane.answers[Restore]
    async with serving(parts):
        parts.recovery.retreat(Retreat("odd", 9, (), RateCut(0.5, 3)))
        with anyio.fail_after(180):
            while parts.recovery.running:
                await anyio.sleep(0.001)
    assert parts.recorder.log == [
        ("started", True),
        ("ended", True),
        ("started", True),
        ("missed: odd", True),
        ("ended", True),
    ]
    assert [(row.tier, row.outcome) for row in parts.journal.rollbacks] == [
        ("fast", "deadline_exceeded"),
        ("full", "deadline_exceeded"),
    ]
    assert len({row.rollback_id for row in parts.journal.rollbacks}) == 2


@pytest.mark.parametrize("tier", [ROLLBACK_TIER_UNSPECIFIED, ROLLBACK_TIER_FAST])
async def test_the_second_try_counts(storage: Storage, tier: RollbackTier.ValueType) -> None:
    """A snapshot overwritten while the lane was on its way is replaced by another, also if a request names the tier."""
    parts = RecoveryParts(storage)
    answers = [NoCheckpointError("the snapshot of step 9 has been overwritten")]

    def first_gone(command: Restore) -> Restored | NoCheckpointError:
        if not answers:
            return restored(command)
        parts.status.snapshots = parts.status.snapshots[:-1]
        return answers.pop()

    parts.lane.answers[Restore] = first_gone
    async with serving(parts):
        done = await parts.recovery.roll_back(Rollback(tier, None, "odd", "operator"))
    assert (done.restored_step, done.tier, done.ending) == (6, ROLLBACK_TIER_FAST, Ending.RESTORED)
    assert [row.outcome for row in parts.journal.rollbacks] == ["failed", "restored"]


async def test_waiting_for_the_step_boundary_is_not_part_of_the_budget(storage: Storage) -> None:
    """The lane is in a long step: the rollback waits longer than its budget, and succeeds; both times are reported."""
    parts = RecoveryParts(storage, budget_s=10.0)
    parts.lane.holds = False
    async with serving(parts), anyio.create_task_group() as tasks:
        rollback = fast(6)
        rollback.began_s -= 20.0  # twice the budget ago
        tasks.start_soon(parts.recovery.roll_back, rollback)
        await anyio.wait_all_tasks_blocked()
        assert parts.recovery.running
        (hold,) = parts.lane.sent_of(Hold)
        parts.lane.emit(Held(11, hold.number))
    assert rollback.ending is Ending.RESTORED
    assert rollback.waited_ms >= 20_000 > rollback.restored_ms
    assert rollback.boundary_s is not None
    assert rollback.deadline_s == rollback.boundary_s + 10.0
    assert parts.journal.rollbacks[0].waited_ms == rollback.waited_ms


async def test_a_lane_that_ends_before_its_boundary_ends_the_rollback(storage: Storage) -> None:
    """It does not wait for a step boundary that never comes."""
    parts = RecoveryParts(storage)
    parts.lane.holds = False
    async with serving(parts):
        parts.recovery.begin(fast(6))
        await anyio.wait_all_tasks_blocked()
        parts.lane.emit(LaneEnded(11, None))
        with anyio.fail_after(180):
            while parts.recovery.running:
                await anyio.sleep(0.001)
    assert [row.outcome for row in parts.journal.rollbacks] == ["failed"]


@pytest.mark.parametrize("answer", [AdjustmentRefusedError("factor", "too small"), None])
async def test_what_fails_after_the_restore_does_not_undo_it(
    storage: Storage, answer: AdjustmentRefusedError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, or a lane that does not answer, is logged, and training goes on."""
    monkeypatch.setattr("tolaria.run.recovery.FOLLOW_UP_S", 0.05)
    parts = RecoveryParts(storage)
    parts.lane.answers[ChangeOptimizer] = answer or (lambda _command: None)
    with capture_logs() as logs:
        async with serving(parts):
            parts.recovery.retreat(Retreat("odd", 9, (), RateCut(0.5, 3)))
            with anyio.fail_after(180):
                while parts.recovery.running:
                    await anyio.sleep(0.001)
    (line,) = [line for line in logs if line["event"] == "after_rollback_failed"]
    assert line["command"] == "ChangeOptimizer"
    assert parts.status.rollbacks == 1


# -- how long it took ------------------------------------------------------------------------------------------------


async def test_a_rollback_takes_until_the_first_step_after_it(storage: Storage) -> None:
    """Skipped steps do not count, and it is observed once."""
    parts = RecoveryParts(storage)
    async with serving(parts):
        rollback = await parts.recovery.roll_back(fast(6))
    parts.recovery.on_step(step_done(6, skipped=True))
    assert parts.recorder.durations == []
    step = step_done(7)
    parts.recovery.on_step(step)
    parts.recovery.on_step(step_done(8))
    assert parts.recorder.durations == [("recovered", step.finished_at_s - rollback.began_s, 7)]


async def test_a_rollback_that_no_step_follows_took_until_its_restore(storage: Storage) -> None:
    """Because the next one begins before the first step, or because the run stays paused."""
    parts = RecoveryParts(storage)
    seen: list[int] = []

    def begin_another(_rollback: Rollback) -> None:
        seen.append(len(parts.recorder.durations))
        parts.recovery.begin(fast(3))
        seen.append(len(parts.recorder.durations))

    async with serving(parts):
        first = fast(6)
        parts.recovery.begin(first, begin_another)
        await anyio.wait_all_tasks_blocked()
        assert seen == [0, 1]
        assert parts.recorder.durations == [("restored", first.latency_ms / 1000, None)]
        parts.recovery.on_step(step_done(4))
        parts.client.hold("run")
        paused = await parts.recovery.roll_back(fast(3))
        assert parts.recorder.durations[-1] == ("restored", paused.latency_ms / 1000, None)
        parts.client.release("run")
        parts.recovery.on_step(step_done(4))
    assert len(parts.recorder.durations) == 3


async def test_a_rollback_cancelled_with_its_task_releases_the_lane(storage: Storage) -> None:
    """At the end of the service the rollback is recorded as aborted, and its waiting caller gets an error."""
    parts = RecoveryParts(storage)
    del parts.lane.answers[Restore]
    raised: list[str] = []

    async def roll_back() -> None:
        with pytest.raises(WrongStateError) as caught:
            await parts.recovery.roll_back(fast(6))
        raised.append(str(caught.value))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(roll_back)
        async with serving(parts):
            await anyio.wait_all_tasks_blocked()
    assert raised == ["the rollback was aborted"]
    assert [row.outcome for row in parts.journal.rollbacks] == [Ending.ABORTED.value]
    assert type(parts.lane.sent[-1]) is Release
