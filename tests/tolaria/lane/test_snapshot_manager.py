from __future__ import annotations

import json
import time
import weakref
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue

from support.lane_driver import DrivenLane, driven, seed
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import RollbackSettings
from tolaria.errors import NoCheckpointError, RestoreAbandonedError, StateMismatchError
from tolaria.images import Lease, StateImage
from tolaria.jobs import TensorCursor
from tolaria.lane.messages import (
    BoundaryCommand,
    CaptureImage,
    ChangeOptimizer,
    ImageCaptured,
    ReconcileSeeds,
    Restore,
    Restored,
    SkipBatches,
    SnapshotsChanged,
    SnapshotsUnavailable,
)
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.values.optimization import Adjustment

HALVED = ChangeOptimizer(
    Adjustment(
        group=None, factor=0.5, value=None, expires_after_steps=6, origin="operator", request_id="r", reason="x"
    ),
    {},
    None,
)
# What happens between the snapshot of step 11, in the middle of the second epoch, and the rollback from step 25.
BETWEEN: dict[str, dict[int, BoundaryCommand]] = {
    "nothing": {},
    "graft": {14: ReconcileSeeds(seed(begin=14))},
    "rates": {13: HALVED},
    "graft and remove": {3: ReconcileSeeds(seed(begin=3)), 17: ReconcileSeeds(())},
}


def points(snapshots: SnapshotManager) -> list[int]:
    """The steps of the snapshots in the newest event; there must be one."""
    changed = [event for event in snapshots.take_events() if isinstance(event, SnapshotsChanged)]
    return [info.position.global_step for info in changed[-1].points]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("between", list(BETWEEN))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_after_a_rollback_repeats_the_run(optimizer: str, between: str, accumulate: int) -> None:
    """Losses and final digest equal those of a run without a rollback, whatever was grafted or changed before it."""
    commands = BETWEEN[between]
    straight = driven(optimizer=optimizer, accumulate=accumulate)
    straight.train_to(40, commands)
    run = driven(optimizer=optimizer, accumulate=accumulate)
    run.train_to(11, commands)
    run.snapshot()
    run.train_to(25, commands)
    restored = run.restore(11)
    assert restored.state_digest == restored.expected_digest
    assert (restored.position.global_step, run.module.global_step) == (11, 11)
    assert restored.progress == run.module.progress
    assert run.losses.keys() == set(range(1, 26))
    run.train_to(40, commands)
    assert run.losses == straight.losses
    assert run.digest == straight.digest


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("between", list(BETWEEN))
def test_a_new_lane_continues_from_an_image_bit_by_bit(optimizer: str, between: str) -> None:
    """A module that is built again, as after SIGKILL, repeats the rest of the run."""
    commands = BETWEEN[between]
    straight = driven(optimizer=optimizer)
    straight.train_to(18, commands)
    image = copied(straight.capture())
    straight.train_to(40, commands)
    torch.rand(7)  # the new process has other generator states
    fresh = driven(optimizer=optimizer)
    restored = fresh.restore(18, image)
    assert restored.state_digest == restored.expected_digest == image.seal().total
    fresh.train_to(40, commands)
    assert fresh.losses == {step: loss for step, loss in straight.losses.items() if step > 18}
    assert fresh.digest == straight.digest


def copied(lease: Lease) -> StateImage:
    """The leased image as it would be read from disk, in memory of its own."""
    with lease as image:
        buffers = {name: memoryview(bytearray(buffer)) for name, buffer in image.buffers.items()}
        return StateImage(image.position, image.specs, buffers, image.values)


def test_the_parts_of_the_state_have_the_names_of_checkpoints() -> None:
    """Names and keys are part of the on-disk format."""
    run = driven("SlotJob")
    run.train_to(3)
    with run.capture() as image:
        values = json.loads(image.values)
    assert list(values["parts"]) == [
        *("cursor", "epoch", "growth", "learning_rates", "left_out", "losses", "requires_grad"),
    ]
    assert values["parts"]["requires_grad"] == {"frozen": [], "trained": []}
    assert set(values["parts"]["epoch"]) == {
        *("number", "over", "batches", "steps", "void_steps", "samples", "loss_sum"),
    }
    assert set(values["parts"]["growth"]) == {"rebuild_due", "urgent", "retry_at_step", "attempted_at_step"}
    assert values["parts"]["left_out"] == {"batches": []}
    assert values["position"] == {"global_step": 3, "epoch": 1}
    half = driven("SlotJob", sections={"fastpaths": {"amp": "float16"}})
    with half.capture() as image:
        assert "scaler" in json.loads(image.values)["parts"]


def test_a_snapshot_is_immutable() -> None:
    """Further training, also after having restored it, does not change it."""
    run = driven(optimizer="Adam")
    run.train_to(5)
    with run.capture() as image:
        sealed = image.seal().total
        run.train_to(9)
        run.restore(5)
        run.train_to(12)
        assert image.verify().total == sealed


@pytest.mark.parametrize("refused", [True, False])
def test_a_failed_restore_leaves_everything_as_it_was(refused: bool) -> None:
    """Refused before the copy, or an image that does not fit: the live state is bit-equal, grafted seeds included."""
    other = driven(optimizer="SGD")
    other.train_to(4)
    foreign = copied(other.capture())
    run = driven(optimizer="Adam")
    run.train_to(6)
    image = copied(run.capture())
    run.train_to(12, {8: ReconcileSeeds(seed(begin=8))})
    before = run.digest
    if refused:
        with pytest.raises(RestoreAbandonedError, match="about to copy"):
            run.snapshots.restore_image(image, lambda: True)
    else:
        with pytest.raises(StateMismatchError):
            run.restore(4, foreign)
    assert run.digest == before
    run.train_to(20)
    straight = driven(optimizer="Adam")
    straight.train_to(20, {8: ReconcileSeeds(seed(begin=8))})
    assert run.losses == straight.losses


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError])
def test_a_part_that_cannot_load_a_state_is_named(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Whatever the job's cursor raises: the restore fails, and the live state is unchanged."""
    run = driven()
    run.train_to(3)
    image = copied(run.capture())
    run.train_to(5)
    before = run.digest
    refusals = iter([error("odd")])
    load = TensorCursor.load_state_dict

    def refuse_once(cursor: TensorCursor, state: dict[str, JsonValue]) -> None:
        load(cursor, state)
        for refusal in refusals:
            raise refusal

    monkeypatch.setattr(TensorCursor, "load_state_dict", refuse_once)
    with pytest.raises(StateMismatchError) as failed:
        run.restore(3, image)
    assert error.__name__ in failed.value.problems[0]
    assert failed.value.problems[0].startswith("parts/")
    assert run.digest == before


def test_a_part_that_cannot_load_its_own_state_ends_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live state is undefined then: the error is not one that leaves the state unchanged."""
    run = driven()
    run.train_to(3)
    image = copied(run.capture())

    def refuse(_cursor: TensorCursor, _state: dict[str, JsonValue]) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(TensorCursor, "load_state_dict", refuse)
    with pytest.raises(RuntimeError, match="does not load its own previous state"):
        run.restore(3, image)


def test_later_snapshots_are_dropped_by_a_rollback() -> None:
    """After a rollback only the snapshots up to it can be restored."""
    run = driven()
    for step in (2, 4, 6):
        run.train_to(step)
        run.snapshot()
    run.restore(4)
    assert points(run.snapshots) == [2, 4]
    for step in (6, 3, 1):  # never another one: an older state may not be sound
        with pytest.raises(NoCheckpointError, match=f"step {step}"):
            run.restore(step)


def test_another_branch_leaves_no_snapshot() -> None:
    """The snapshots in memory are no ancestors of the restored state: none of them may be restored any more."""
    run = driven()
    run.train_to(2)
    image = copied(run.capture())
    for step in (3, 4):
        run.train_to(step)
        run.snapshot()
    done = run.execute(Restore(2, time.monotonic() + 60, run.images.put(image), other_branch=True))
    assert isinstance(done.result, Restored)
    assert points(run.snapshots) == []
    run.snapshot()
    assert points(run.snapshots) == [2]


def test_a_capture_without_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on: the point is missing, which is reported once, and so is the first one after that."""
    run = driven(sections={"rollback": RollbackSettings(every_steps=1)})
    allocate = torch.empty

    def refuse(*size: object, **options: object) -> object:
        if size and isinstance(size[0], int) and options.get("dtype") is torch.uint8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return allocate(*size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("tolaria.state.encoding.torch.empty", refuse)
    run.train_to(1)
    for _ in range(3):
        run.snapshots.step_done(0.1)
    refused = run.execute(CaptureImage())
    assert refused.failure is not None
    assert "can't allocate memory" in str(refused.failure.error())
    monkeypatch.undo()
    run.train_to(2)
    run.snapshots.step_done(0.1)
    events = run.snapshots.take_events()
    reasons = [event.reason for event in events if isinstance(event, SnapshotsUnavailable)]
    assert [bool(reason) for reason in reasons] == [True, False]
    assert "can't allocate memory" in reasons[0]
    (changed,) = [event for event in events if isinstance(event, SnapshotsChanged)]
    assert [info.position.global_step for info in changed.points] == [2]


def test_a_state_that_outgrows_the_memory_leaves_nothing_stale() -> None:
    """It is reported once; when the state fits again, snapshots are taken again."""
    run = driven(sections={"rollback": RollbackSettings(every_steps=1, memory_mb=1)})
    run.train_to(1)
    run.snapshots.step_done(0.1)
    assert points(run.snapshots) == [1]
    buffer = "ballast"
    run.module.model.register_buffer(buffer, torch.zeros(2**19))
    for _ in range(3):
        run.snapshots.step_done(0.1)
    declined = run.snapshots.take_events()
    (reason,) = [event.reason for event in declined if isinstance(event, SnapshotsUnavailable)]
    assert "more than rollback.memory_mb" in reason
    assert [event.points for event in declined if isinstance(event, SnapshotsChanged)] == [()]
    delattr(run.module.model, buffer)
    run.snapshots.step_done(0.1)
    assert points(run.snapshots) == [1]


def test_a_static_buffer_is_stored_once_and_is_in_every_checkpoint(tmp_path: Path) -> None:
    """Five snapshots fit where one would; a checkpoint of any of them is a file like that of a copied state."""
    run = driven(sections={"rollback": RollbackSettings(every_steps=1, memory_mb=1)})
    run.module.model.register_buffer("table", torch.randn(200_000))
    storage = open_storage(tmp_path, run_id="r", retention=Retention(last=9, best="lowest"))
    with storage.journal:
        for step in range(1, 8):
            run.train_to(step)
            with run.capture() as image:
                assert image.seal() == run.snapshots.state.copy().seal()
                storage.checkpoints.write(image)
        assert len(points(run.snapshots)) == 5
        digest = run.digest
        loaded = storage.checkpoints.load_newest()
        run.train_to(9)
        restored = run.restore(7, loaded.image)
    assert restored.state_digest == restored.expected_digest == digest


def test_skipped_batches_stay_skipped_through_a_rollback() -> None:
    """They belong to the run and not to its state: they are passed over also in a state in which they were not."""
    run = driven()
    run.train_to(3)
    image = copied(run.capture())
    run.train_to(5)
    assert run.execute(SkipBatches(((1, 5),))).failure is None
    run.restore(3, image)
    assert (run.module.skipped.added, run.module.skipped.batches) == ({(1, 5)}, set())
    read = run.module.progress.batches
    run.train_to(7)
    assert (read, run.module.progress.batches) == (3, 8)  # one more than steps


def test_snapshots_are_taken_at_the_wanted_interval() -> None:
    """The first one is taken before the first step, then one every `every_steps`."""
    run = driven(sections={"rollback": {"every_steps": 3}})
    run.snapshots.epoch_begins()
    run.snapshots.epoch_begins()
    for step in range(1, 8):
        run.train_to(step)
        run.snapshots.step_done(0.001)
    assert points(run.snapshots) == [0, 3, 6]


def test_changes_of_the_ring_are_events() -> None:
    """The counters are reported at first, after each use that changed them, and not otherwise."""
    run = driven()
    snapshots = run.snapshots
    (first,) = snapshots.take_events()
    assert isinstance(first, SnapshotsChanged)
    assert (first.points, first.statistics.bytes_max) == ((), 256 * 2**20)
    assert snapshots.take_events() == []
    snapshots.epoch_begins()
    (taken,) = snapshots.take_events()
    assert isinstance(taken, SnapshotsChanged)
    assert (len(taken.points), taken.statistics.snapshots) == (1, 1)
    snapshots.epoch_begins()
    assert snapshots.take_events() == []
    run.train_to(2)
    run.restore(0)
    (hit,) = snapshots.take_events()
    assert isinstance(hit, SnapshotsChanged)
    assert hit.statistics.hits == 1
    with pytest.raises(NoCheckpointError):
        run.restore(-1)
    (miss,) = snapshots.take_events()
    assert isinstance(miss, SnapshotsChanged)
    assert miss.statistics.misses == 1


def test_a_state_too_large_for_the_ring_is_reported_once_and_can_still_be_captured() -> None:
    """Checkpoints do not need the ring."""
    run = driven()
    run.module.model.register_buffer("ballast", torch.zeros(2**18 + 1))
    snapshots = SnapshotManager(run.module, RollbackSettings(memory_mb=1))
    snapshots.epoch_begins()
    events = snapshots.take_events()
    (unavailable,) = (event for event in events if isinstance(event, SnapshotsUnavailable))
    assert "rollback.memory_mb" in unavailable.reason
    snapshots.step_done(0.001)
    assert not any(isinstance(event, SnapshotsUnavailable) for event in snapshots.take_events())
    with snapshots.capture_image() as image:
        assert image.position.global_step == 0


def test_images_beyond_the_spare_ones_are_refused() -> None:
    """Two images outside the ring can be leased at a time; a released one makes room."""
    run = driven()
    run.module.model.register_buffer("ballast", torch.zeros(2**18 + 1))
    snapshots = SnapshotManager(run.module, RollbackSettings(memory_mb=1))
    leases = [snapshots.capture_image() for _ in range(2)]
    with pytest.raises(NoCheckpointError, match="still being written"):
        snapshots.capture_image()
    leases[0].release()
    snapshots.capture_image().release()


def test_a_restore_past_its_deadline_is_not_begun() -> None:
    """A command that has waited too long for its step boundary looks for no snapshot."""
    run = driven()
    run.train_to(3)
    done = run.execute(Restore(10**6, time.monotonic()))
    assert done.failure is not None
    assert isinstance(done.failure.error(), RestoreAbandonedError)
    events = run.snapshots.take_events()
    assert all(isinstance(event, SnapshotsChanged) and not event.statistics.misses for event in events)


def test_driven_lanes_are_equal() -> None:
    """The tests above compare runs of lanes that are built alike."""
    one: DrivenLane = driven()
    assert one.digest == driven().digest


def test_a_capture_beside_the_ring_evicts_nothing_and_frees_its_memory() -> None:
    """The full ring keeps its snapshot, and the image is gone with its lease."""
    run = driven(sections={"rollback": RollbackSettings(every_steps=1, snapshots_max=1)})
    run.train_to(1)
    run.snapshots.step_done(0.1)
    run.train_to(2)
    result = run.execute(CaptureImage(beside=True)).result
    assert isinstance(result, ImageCaptured)
    lease = run.images.take(result.image_id)
    assert lease.image.position.global_step == 2
    assert lease.image.seal().total == run.digest
    assert points(run.snapshots) == [1]
    memory = weakref.ref(next(iter(lease.image.buffers.values())))
    lease.release()
    del lease
    assert memory() is None
    assert run.restore(1).position.global_step == 1
