from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from tolaria.rollback.orders import RestoreOrder
from tolaria.training.fences import ChangeOptimizer, FenceCommand, Keep, LeaveOut, Reconcile, Restore
from tolaria.training.recovery.keeper import Kept, PointsLost

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.driving import Driven, driven, order, seed
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import RollbackSettings
from tolaria.errors import NoCheckpointError, RestoreAbandonedError, StateMismatchError
from tolaria.images.image import StateImage
from tolaria.jobs import TensorCursor
from tolaria.values.optimization import Adjustment

HALVED = ChangeOptimizer(
    Adjustment(
        group=None, factor=0.5, value=None, expires_after_steps=6, origin="operator", request_id="r", reason="x"
    ),
    {},
    None,
)
# What happens between the snapshot of step 11, in the midst of the second epoch, and the way back from step 25.
BETWEEN: dict[str, dict[int, FenceCommand]] = {
    "nothing": {},
    "graft": {14: Reconcile(seed(begin=14))},
    "rates": {13: HALVED},
    "graft and go": {3: Reconcile(seed(begin=3)), 17: Reconcile(())},
}


def kept(run: Driven) -> StateImage:
    """An image of the state now."""
    result = run.do(Keep()).result
    assert isinstance(result, Kept)
    return result.lease.image


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("between", list(BETWEEN))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_on_from_a_rollback_repeats_the_run(optimizer: str, between: str, accumulate: int) -> None:
    """Losses and final digest are those of the run that never left, whatever was grafted or changed meanwhile."""
    commands = BETWEEN[between]
    straight = driven(optimizer=optimizer, accumulate=accumulate)
    straight.to(40, commands)
    run = driven(optimizer=optimizer, accumulate=accumulate)
    run.to(11, commands)
    run.keeper._ring.capture(run.keeper._state)
    run.to(25, commands)
    restored = run.go_back(11)
    assert restored.state_digest == restored.expected_digest
    assert (restored.position.global_step, run.rig.global_step) == (11, 11)
    assert run.losses.keys() == set(range(1, 26))
    run.to(40, commands)
    assert run.losses == straight.losses
    assert run.digest == straight.digest


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("between", list(BETWEEN))
def test_a_new_process_goes_on_from_a_checkpoint_bit_by_bit(optimizer: str, between: str, tmp_path: Path) -> None:
    """A rig built anew, as after SIGKILL, repeats what the one that never died does."""
    commands = BETWEEN[between]
    straight = driven(optimizer=optimizer)
    straight.to(18, commands)
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        storage.checkpoints.write(kept(straight))
        image = storage.checkpoints.load_newest(lambda: False).image
    straight.to(40, commands)
    torch.rand(7)  # the new process has other RNGs
    fresh = driven(optimizer=optimizer)
    restored = fresh.go_back(18, image)
    assert restored.state_digest == restored.expected_digest == image.seal().total
    fresh.to(40, commands)
    assert fresh.losses == {step: loss for step, loss in straight.losses.items() if step > 18}
    assert fresh.digest == straight.digest


def test_a_snapshot_stays_what_it_was() -> None:
    """Training on, also after having gone back to it, does not change it."""
    run = driven(optimizer="Adam")
    run.to(5)
    image = kept(run)
    sealed = image.seal().total
    run.to(9)
    run.go_back(5)
    run.to(12)
    assert image.verify().total == sealed


@pytest.mark.parametrize("refuses", [True, False])
def test_a_restore_that_fails_leaves_everything_as_it_was(refuses: bool) -> None:
    """Past the deadline, or of an image that does not fit: the live state is bit-equal, grafted seeds included."""
    other = driven(optimizer="SGD")
    other.to(4)
    foreign = kept(other)
    run = driven(optimizer="Adam")
    run.to(6)
    image = kept(run)
    run.to(12, {8: Reconcile(seed(begin=8))})
    before = run.digest
    if refuses:
        late = RestoreOrder("r", ROLLBACK_TIER_FAST, 6, 0.0, lambda: False, lambda: True)
        report = run.do(Restore(late, image))
        assert isinstance(report.error, RestoreAbandonedError)
    else:
        report = run.do(Restore(order(4), foreign))
        assert isinstance(report.error, StateMismatchError)
    assert run.digest == before
    run.to(20)
    straight = driven(optimizer="Adam")
    straight.to(20, {8: Reconcile(seed(begin=8))})
    assert run.losses == straight.losses


def test_a_restore_that_waited_too_long_is_not_begun() -> None:
    """Its deadline has passed in the queue: nothing is looked for, let alone read."""
    run = driven()
    run.to(3)
    late = RestoreOrder("r", ROLLBACK_TIER_FAST, 10**6, 0.0, lambda: True, lambda: False)
    assert isinstance(run.do(Restore(late, None)).error, RestoreAbandonedError)


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError])
def test_a_cursor_that_refuses_a_state_is_named(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """The job's own code, whatever it raises: the rollback fails, the live state is as it was."""
    run = driven()
    run.to(3)
    image = kept(run)
    run.to(5)
    before = run.digest
    refusals = iter([error("odd")])
    load = TensorCursor.load_state_dict

    def refuse_once(cursor: TensorCursor, state: dict[str, JsonValue]) -> None:
        load(cursor, state)
        for refusal in refusals:
            raise refusal

    monkeypatch.setattr(TensorCursor, "load_state_dict", refuse_once)
    failed = run.do(Restore(order(3), image)).error
    assert isinstance(failed, StateMismatchError)
    assert error.__name__ in failed.problems[0]
    assert failed.problems[0].startswith("parts/")
    assert run.digest == before


def test_a_cursor_that_refuses_its_own_state_is_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is live is not known any more: nobody may train on from it."""
    run = driven()
    run.to(3)
    image = kept(run)

    def refuse(_cursor: TensorCursor, _state: dict[str, JsonValue]) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(TensorCursor, "load_state_dict", refuse)
    with pytest.raises(RuntimeError, match="refuses the state that it had itself"):
        run.do(Restore(order(3), image))


def test_later_snapshots_are_a_past_that_never_was() -> None:
    """After a rollback only what lies before it can be gone back to."""
    run = driven()
    for step in (2, 4, 6):
        run.to(step)
        run.keeper._ring.capture(run.keeper._state)
    run.go_back(4)
    assert [info.position.global_step for info in run.keeper.points()] == [2, 4]
    assert run.go_back(6).position.global_step == 4
    with pytest.raises(NoCheckpointError, match="step 1"):
        run.go_back(1)


def test_batches_that_are_left_out_stay_so_through_a_rollback() -> None:
    """They are passed over, and going back to before they were found does not bring them back."""
    run = driven()
    run.to(3)
    image = kept(run)
    run.to(5)
    assert run.do(LeaveOut(frozenset({(1, 5)}))).error is None
    run.go_back(3, image)
    assert run.rig.left_out.batches == {(1, 5)}
    seen = run.rig.epoch.batches
    run.to(7)
    assert (seen, run.rig.epoch.batches) == (3, 8)  # one more than updates


def test_snapshots_come_as_often_as_was_asked_for() -> None:
    """With a fixed interval, and from the first step on."""
    run = driven(rollback=RollbackSettings(every_steps=3))
    assert run.keeper.epoch_begins() is None
    assert run.keeper.epoch_begins() is None
    for step in range(1, 8):
        run.to(step)
        assert run.keeper.step_done(0.001) is None
    assert [info.position.global_step for info in run.keeper.points()] == [0, 3, 6]


def test_a_state_that_memory_has_no_room_for_is_told_once_and_can_still_be_kept() -> None:
    """Without fast snapshots checkpoints go on."""
    run = driven()
    big = run.rig.model
    big.register_buffer("ballast", torch.zeros(2**18 + 1))
    run.keeper = type(run.keeper)(run.rig, RollbackSettings(memory_mb=1))
    lost = run.keeper.epoch_begins()
    assert isinstance(lost, PointsLost)
    assert "rollback.memory_mb" in lost.reason
    assert run.keeper.step_done(0.001) is None
    assert kept(run).position.global_step == 0
    assert run.keeper.points() == ()
