from __future__ import annotations

import pytest
import torch

from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_TRAINING,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.jobs import SlotJob
from tolaria.config import OptimizerSettings, RollbackSettings, SeedsSettings, Settings, TrainingSettings
from tolaria.errors import RebuildFailedError
from tolaria.training.fences import Reconcile, carry_out
from tolaria.training.growth import SeedsReport
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import train_step
from tolaria.values.optimization import RebuildOutcome


def rig(interval: int = 0) -> Rig:
    """A rig around the job with a slot; `interval` is the storm guard's."""
    made = build_rig(
        Settings(
            training=TrainingSettings(job="support.jobs:SlotJob", device="cpu"),
            optimizer=OptimizerSettings(rebuild_min_interval_steps=interval),
            seeds=SeedsSettings(cull_steps=3),
        )
    )
    assert isinstance(made.job, SlotJob)
    made.cursor.begin_epoch(1)
    return made


def wish(stage: SeedLifecycleStage.ValueType, begin: int = 0, steps: int = 2) -> tuple[SeedState, ...]:
    """Kasmina desires one residual MLP in this stage."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=begin, duration_steps=steps)
    return (SeedState(seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="middle", alpha=alpha),)


def fence(made: Rig, desired: tuple[SeedState, ...]) -> SeedsReport:
    """Reconcile as the lane does."""
    report = carry_out(made, SnapshotKeeper(made, RollbackSettings()), 1, Reconcile(desired))
    assert report.error is None
    assert isinstance(report.result, SeedsReport)
    return report.result


def groups(made: Rig) -> dict[str, float]:
    """Param groups and their learning rates."""
    return {group["name"]: group["lr"] for group in made.optimizer.param_groups}


def train(made: Rig, steps: int) -> None:
    """So many updates, with the alphas following."""
    for _ in range(steps):
        report = train_step(made, lambda: True)
        if report is None:
            made.cursor.begin_epoch(1)
            continue
        assert not report.void
        if made.growth.advance(made.global_step) is not None:
            made.grew()


def test_a_seeds_life_reaches_the_optimizer_and_ends_in_the_host() -> None:
    """Germinated: no group. Training: a group at a tenth of the host's rate. Fossilized: frozen, no group."""
    made = rig()
    x = made.job.x  # type: ignore[attr-defined]
    before = made.model(x)
    fence(made, wish(SEED_STAGE_GERMINATED))
    assert list(groups(made)) == ["host"]
    assert torch.equal(made.model(x), before)
    fence(made, wish(SEED_STAGE_TRAINING))
    assert torch.equal(made.model(x), before)
    rates = groups(made)
    assert list(rates) == ["host", "seed:a"]
    assert rates["seed:a"] == rates["host"] * 0.1 * 0.1  # its own warm-up begins at a tenth
    train(made, 4)
    fence(made, wish(SEED_STAGE_BLENDING, begin=made.global_step))
    train(made, 3)
    fence(made, wish(SEED_STAGE_PROBATIONARY, begin=made.global_step - 3))
    assert [s.stage for s in made.growth.topology.states(made.global_step)] == [SEED_STAGE_PROBATIONARY]
    here = made.model(x)
    report = fence(made, wish(SEED_STAGE_FOSSILIZED, begin=made.global_step - 3))
    assert report.rebuild is not None
    assert list(groups(made)) == ["host"]
    assert torch.equal(made.model(x), here)
    train(made, 2)


def test_the_hosts_momentum_survives_every_rebuild() -> None:
    """Grafting and losing a seed leaves the host's optimizer state bit for bit."""
    made = rig()
    train(made, 4)

    def momentum() -> list[torch.Tensor]:
        host = made.optimizer.param_groups[0]["params"]
        return [made.optimizer.state[p]["momentum_buffer"].clone() for p in host]

    before = momentum()
    fence(made, wish(SEED_STAGE_TRAINING))
    assert all(torch.equal(a, b) for a, b in zip(before, momentum(), strict=True))
    fence(made, ())
    assert all(torch.equal(a, b) for a, b in zip(before, momentum(), strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_seed_in_training_never_moves_the_host(clip_norm: float) -> None:
    """With and without a training seed the host's parameters go the same way, bit by bit, clipped or not."""

    def hosts(*, seeded: bool) -> list[torch.Tensor]:
        made = rig()
        made.clip_norm = clip_norm
        if seeded:
            fence(made, wish(SEED_STAGE_TRAINING))
        train(made, 6)
        return [p.detach() for n, p in made.model.named_parameters() if ".seeds." not in n]

    assert all(torch.equal(a, b) for a, b in zip(hosts(seeded=True), hosts(seeded=False), strict=True))


def test_a_rebuild_that_comes_too_soon_is_made_up_for() -> None:
    """The storm guard puts a seed's group off; it comes as soon as the guard lets it."""
    made = rig(interval=5)
    fence(made, wish(SEED_STAGE_TRAINING))
    fence(made, ())  # something leaves: urgent, never put off
    assert list(groups(made)) == ["host"]
    skipped = fence(made, wish(SEED_STAGE_TRAINING))
    assert skipped.rebuild is not None
    assert skipped.rebuild.outcome is RebuildOutcome.SKIPPED
    train(made, 4)
    assert list(groups(made)) == ["host"]
    train(made, 3)
    assert list(groups(made)) == ["host", "seed:a"]


def test_a_culled_seed_fades_and_leaves_by_itself() -> None:
    """Culled in the middle of blending it ramps down over cull_steps, then its parameters are gone everywhere."""
    made = rig()
    fence(made, wish(SEED_STAGE_BLENDING, begin=0, steps=2))
    train(made, 3)
    fence(made, ())
    assert [s.seed_id for s in made.growth.topology.states(made.global_step)] == ["a"]
    train(made, 4)
    assert made.growth.topology.states(made.global_step) == []
    assert all(".seeds." not in name for name, _ in made.model.named_parameters())
    assert list(groups(made)) == ["host"]


def test_what_is_told_of_a_seed_holds_its_gradient_and_rate() -> None:
    """Kasmina's gates judge by the gradient norm, so a training seed's is in its state."""
    made = rig()
    fence(made, wish(SEED_STAGE_TRAINING))
    train(made, 3)
    (state,) = made.growth.told_states(made.global_step, None)
    assert state.gradient_norm > 0
    assert state.learning_rate > 0
    assert state.parameters


def test_refusals_are_told_one_by_one() -> None:
    """An unknown blueprint is refused with its reason, and the rest applies."""
    made = rig()
    odd = SeedState(seed_id="b", stage=SEED_STAGE_GERMINATED, blueprint_id="perpetuum_mobile", slot="middle")
    report = fence(made, (odd, *wish(SEED_STAGE_TRAINING)))
    assert [seed_id for seed_id, _ in report.refusals] == ["b"]
    assert "perpetuum_mobile" in report.refusals[0][1]
    assert list(groups(made)) == ["host", "seed:a"]


def test_a_seed_whose_gradients_are_not_finite_harms_nobody() -> None:
    """An isolated seed with NaN weights: the step is not void, and the host goes its way."""
    made = rig()
    fence(made, wish(SEED_STAGE_TRAINING))
    with torch.no_grad():
        for _, parameter in made.growth.topology.training_parameters("a"):
            parameter.fill_(float("nan"))
    report = train_step(made, lambda: True)
    assert report is not None
    assert not report.void
    assert all(p.isfinite().all() for n, p in made.model.named_parameters() if ".seeds." not in n)


def test_a_rebuild_that_keeps_failing_is_not_tried_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the next try is a hundred steps away; the old optimizer trains on meanwhile."""
    made = rig()
    attempts = []

    def failing(*_args: object, **_kwargs: object) -> None:
        attempts.append(made.global_step)
        raise RebuildFailedError("build", "injected")

    monkeypatch.setattr("tolaria.training.growth.regroup", failing)
    report = fence(made, wish(SEED_STAGE_TRAINING))
    assert "injected" in report.rebuild_error
    train(made, 30)
    assert attempts == [0]
    assert list(groups(made)) == ["host"]
