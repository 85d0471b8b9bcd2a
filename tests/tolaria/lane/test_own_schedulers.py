"""Jobs that step a scheduler of learning rates themselves, and whose runs go on while seeds come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_TRAINING, SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.lane_driver import DrivenLane, RunningLane, running
from support.user_jobs import Line
from tolaria.config import Settings, TrainingSettings
from tolaria.jobs import Batch, BatchCursor, Evaluation
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.messages import EpochDone, ReconcileSeeds, RunEpoch, SeedsChanged, StepDone

HERE = __name__
SEED, HOST_GROUPS = "seed:a", ["host/0", "host/1"]

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:The epoch parameter")


SCHEDULERS: Mapping[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda n: min(1.0, n / 9), lambda _: 0.5]),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=1000),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[4],
    ),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[1e-4, 1e-3]),
}
"""How each is made; all have a value for each of the two param groups, explicitly or by themselves."""


class SelfScheduled(Line):
    """Two param groups, and a scheduler that is made with the optimizer or, if `late`, when it is first stepped."""

    kind: ClassVar[str] = "LambdaLR"
    where: ClassVar[str] = "losses"
    late: ClassVar[bool] = False
    scheduler: LRScheduler | None = None

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        first, *rest = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, "lr": 0.02}]
        self.optimizer = SGD(groups, lr=0.01, momentum=0.9)
        if not self.late:
            self.scheduler = SCHEDULERS[self.kind](self.optimizer)
        self.optimizer.register_step_post_hook(lambda *_: self._step("a hook"))
        return self.optimizer

    def _step(self, method: str) -> None:
        if method != self.where:
            return
        assert [group["name"] for group in self.optimizer.param_groups] == HOST_GROUPS
        if self.scheduler is None:
            self.scheduler = SCHEDULERS[self.kind](self.optimizer)
        elif isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        else:
            self.scheduler.step()

    def training_data(self) -> BatchCursor:
        cursor: BatchCursor = super().training_data()  # type: ignore[no-untyped-call]
        read = cursor.next_batch

        def next_batch() -> Batch | None:
            self._step("the data")
            return read()

        cursor.next_batch = next_batch  # type: ignore[method-assign]
        return cursor

    def train_mode(self, model: nn.Module) -> None:
        model.train()
        self._step("train_mode")

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        self._step("losses")
        losses: Mapping[str, Tensor] = super().losses(model, batch)  # type: ignore[no-untyped-call]
        return losses

    def validation_batches(self) -> Iterator[Batch]:
        for batch in super().validation_batches():  # type: ignore[no-untyped-call]
            self._step("validation_batches")
            yield batch

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        self._step("evaluate")
        found: Evaluation = super().evaluate(model, batch)  # type: ignore[no-untyped-call]
        return found


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Sets the job's attributes to the test's parameters of the same names."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for name in parameters.keys() & {"kind", "where", "late"}:
        monkeypatch.setattr(SelfScheduled, name, parameters[name])


def lane() -> BuiltLane:
    """A lane of the job."""
    return build(Settings(training=TrainingSettings(job=f"{HERE}:SelfScheduled", device="cpu", threads=1, epochs=5)))


def wish(*stages: SeedLifecycleStage.ValueType) -> ReconcileSeeds:
    """The wish for a seed in that stage, or for none."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=16, duration_steps=8)
    return ReconcileSeeds(
        tuple(SeedState(seed_id="a", stage=s, blueprint_id="residual_mlp", slot="s", alpha=alpha) for s in stages)
    )


def groups_of(built: BuiltLane) -> list[str]:
    """The names of the optimizer's groups."""
    return [group["name"] for group in built.module.optimizer.param_groups]


def epoch(run: RunningLane, number: int, desired: ReconcileSeeds | None = None) -> None:
    """Trains and evaluates an epoch with these seeds."""
    if desired is not None:
        changed = run.done(run.send(desired)).result
        assert isinstance(changed, SeedsChanged)
        assert (changed.refusals, changed.rebuild_error) == ((), "")
    run.send(RunEpoch(number))
    run.wait_for(EpochDone, number=number)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_run_reaches_its_end_while_a_seed_comes_and_goes(kind: str, late: bool) -> None:
    """Tolaria sets all rates, the seed's too; the scheduler sees only the groups that it was made for.

    One that the job has when it is built is adopted: rates follow it, and none is written by other code. One that is
    made in the first call of losses() survives the end of the first look, which restores the groups.
    """
    built = lane()
    assert [note for note in built.ready.notes if ("lr_scheduler(optimizer)" if late else "adopted") in note] != []
    assert ("stepped by its code" in built.ready.schedule) is not late
    rates = set(built.ready.learning_rates.values())
    with running(built) as run:
        epoch(run, 1)
        epoch(run, 2, wish(SEED_STAGE_TRAINING))
        assert groups_of(built) == [*HOST_GROUPS, SEED]
        epoch(run, 3, wish(SEED_STAGE_BLENDING))
        epoch(run, 4, wish())
        epoch(run, 5)
        assert groups_of(built) == HOST_GROUPS
        steps = run.all_of(StepDone)
        assert len(steps) == 5 * built.module.steps_per_epoch
        assert {v.group for step in steps for v in step.violations} <= set(HOST_GROUPS)
        assert {v.expected for step in steps for v in step.violations} <= rates
        assert any(step.violations for step in steps) is late
        own = cast("SelfScheduled", built.module.job).scheduler
        assert own is not None
        if not late:
            assert [group["lr"] for group in built.module.optimizer.param_groups] == own.get_last_lr()


@pytest.mark.parametrize("where", ["losses", "train_mode", "validation_batches", "evaluate", "a hook", "the data"])
def test_it_does_wherever_the_scheduler_is_stepped(where: str) -> None:
    """In each method of the job that is called while it trains, in its data, or in a hook after steps."""
    with running(built := lane()) as run:
        epoch(run, 1, wish(SEED_STAGE_TRAINING))
        epoch(run, 2)
        assert groups_of(built) == [*HOST_GROUPS, SEED]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_it_goes_on_after_rollbacks_and_a_resume(kind: str, late: bool) -> None:
    """Across the graft, and to before the scheduler was made, when its options were not in the groups yet."""
    driven = DrivenLane(lane())
    driven.snapshot()
    assert ("initial_lr" in driven.module.optimizer.param_groups[0]) is not late
    driven.train_to(8, {2: wish(SEED_STAGE_TRAINING)})
    with driven.capture() as image:
        driven.restore(0)
        assert SEED not in {group["name"] for group in driven.module.optimizer.param_groups}
        driven.train_to(4)
        driven.restore(8, image)
        driven.train_to(12)
        later = DrivenLane(lane())
        later.restore(8, image)
        later.train_to(12)
    assert later.module.optimizer.param_groups[-1]["name"] == SEED
    parameters = zip(driven.module.parameters, later.module.parameters, strict=True)
    # One that is not found writes its momentum past Tolaria, from the start.
    assert all(torch.equal(a, b) for a, b in parameters) is not (late and kind == "OneCycleLR")


def test_an_error_in_losses_leaves_the_seeds_group_in_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also then the optimizer is complete for what follows."""
    driven = DrivenLane(lane())
    driven.train_to(2, {1: wish(SEED_STAGE_TRAINING)})
    job = cast("SelfScheduled", driven.module.job)
    monkeypatch.setattr(SelfScheduled, "kind", "unknown")
    job.scheduler = None
    with pytest.raises(KeyError):
        driven.train_to(3)
    assert [group["name"] for group in driven.module.optimizer.param_groups] == [*HOST_GROUPS, SEED]
    monkeypatch.setattr(SelfScheduled, "kind", "StepLR")
    driven.train_to(4)
