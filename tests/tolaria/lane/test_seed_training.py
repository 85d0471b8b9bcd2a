from __future__ import annotations

import pytest
import torch

from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_TRAINING,
)
from leyline.v1.seeds_pb2 import SeedState
from support.lane_driver import new_module, proceed, seed
from tolaria.errors import RebuildFailedError
from tolaria.lane.messages import SeedsChanged
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule
from tolaria.values.optimization import RebuildOutcome


def slot_module(interval: int = 0) -> TrainModule:
    """A module with a slot; `interval` is the minimum number of steps between rebuilds."""
    return new_module(
        "SlotJob", sections={"optimizer": {"rebuild_min_interval_steps": interval}, "seeds": {"cull_steps": 3}}
    )


def reconcile(module: TrainModule, desired: tuple[SeedState, ...]) -> SeedsChanged:
    """Reconciles at a step boundary."""
    changed = module.seeds.reconcile(desired, module.global_step)
    module.refresh()
    return changed


def groups(module: TrainModule) -> dict[str, float]:
    """Param groups and their learning rates."""
    return {group["name"]: group["lr"] for group in module.optimizer.param_groups}


def train(module: TrainModule, steps: int) -> None:
    """Takes that many steps, with the alphas following."""
    for _ in range(steps):
        step = train_step(module, proceed)
        if step is None:
            module.cursor.begin_epoch(1)
            continue
        assert not step.skipped
        if module.seeds.advance(module.global_step) is not None:
            module.refresh()


def test_a_seed_passes_through_the_optimizer() -> None:
    """Germinated: no group. Training: a group at a tenth of the host's rate. Fossilized: frozen, no group."""
    module = slot_module()
    x = module.job.x  # type: ignore[attr-defined]
    before = module.model(x)
    reconcile(module, seed(SEED_STAGE_GERMINATED, steps=2))
    assert list(groups(module)) == ["host"]
    assert torch.equal(module.model(x), before)
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    assert torch.equal(module.model(x), before)
    rates = groups(module)
    assert list(rates) == ["host", "seed:a"]
    assert rates["seed:a"] == rates["host"] * 0.1 * 0.1  # its own warm-up begins at a tenth
    train(module, 4)
    reconcile(module, seed(SEED_STAGE_BLENDING, begin=module.global_step, steps=2))
    train(module, 3)
    reconcile(module, seed(SEED_STAGE_PROBATIONARY, begin=module.global_step - 3, steps=2))
    assert [s.stage for s in module.seeds.topology.states(module.global_step)] == [SEED_STAGE_PROBATIONARY]
    here = module.model(x)
    changed = reconcile(module, seed(SEED_STAGE_FOSSILIZED, begin=module.global_step - 3, steps=2))
    assert changed.rebuild is not None
    assert list(groups(module)) == ["host"]
    assert torch.equal(module.model(x), here)
    train(module, 2)


def test_the_hosts_momentum_survives_every_rebuild() -> None:
    """Grafting and removing a seed leaves the host's optimizer state unchanged bit for bit."""
    module = slot_module()
    train(module, 4)

    def momentum() -> list[torch.Tensor]:
        host = module.optimizer.param_groups[0]["params"]
        return [module.optimizer.state[p]["momentum_buffer"].clone() for p in host]

    before = momentum()
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    assert all(torch.equal(a, b) for a, b in zip(before, momentum(), strict=True))
    reconcile(module, ())
    assert all(torch.equal(a, b) for a, b in zip(before, momentum(), strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_an_isolated_seed_does_not_affect_the_host(clip_norm: float) -> None:
    """With and without a training seed the host's parameters are the same bit for bit, clipped or not."""

    def host_parameters(*, seeded: bool) -> list[torch.Tensor]:
        module = slot_module()
        module.clip_norm = clip_norm
        if seeded:
            reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
        train(module, 6)
        return [p.detach() for n, p in module.model.named_parameters() if ".seeds." not in n]

    with_seed, without = host_parameters(seeded=True), host_parameters(seeded=False)
    assert all(torch.equal(a, b) for a, b in zip(with_seed, without, strict=True))


def test_a_postponed_rebuild_is_made_later() -> None:
    """A rebuild within the minimum interval is postponed, unless a seed leaves, and made when the interval is over."""
    module = slot_module(interval=5)
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    reconcile(module, ())  # a seed leaves: never postponed
    assert list(groups(module)) == ["host"]
    skipped = reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    assert skipped.rebuild is not None
    assert skipped.rebuild.outcome is RebuildOutcome.SKIPPED
    train(module, 4)
    assert list(groups(module)) == ["host"]
    train(module, 3)
    assert list(groups(module)) == ["host", "seed:a"]


def test_what_is_postponed_is_part_of_the_state() -> None:
    """The JSON keys are those of checkpoints; loading it into another module postpones the same rebuild there."""
    module = slot_module(interval=5)
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    reconcile(module, ())
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    state = module.seeds.state_dict()
    assert state == {"rebuild_due": True, "urgent": False, "retry_at_step": 0, "attempted_at_step": 0}
    other = slot_module(interval=5)
    other.seeds.load_state_dict(state)
    assert other.seeds.state_dict() == state
    with pytest.raises(KeyError, match="urgent"):
        other.seeds.load_state_dict({"rebuild_due": False})
    assert other.seeds.state_dict() == state


def test_a_culled_seed_fades_out_and_leaves() -> None:
    """Culled while blending it ramps down over cull_steps; then its parameters are gone everywhere."""
    module = slot_module()
    reconcile(module, seed(SEED_STAGE_BLENDING, steps=2))
    train(module, 3)
    reconcile(module, ())
    assert [s.seed_id for s in module.seeds.topology.states(module.global_step)] == ["a"]
    train(module, 4)
    assert module.seeds.topology.states(module.global_step) == []
    assert all(".seeds." not in name for name, _ in module.model.named_parameters())
    assert list(groups(module)) == ["host"]


def test_reported_states_have_gradient_norm_and_learning_rate() -> None:
    """Kasmina's conditions for the next stage use the gradient norm."""
    module = slot_module()
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    train(module, 3)
    (state,) = module.seeds.reported_states(module.global_step, None)
    assert state.gradient_norm > 0
    assert state.learning_rate > 0
    assert state.parameters


def test_refusals_are_reported_by_seed() -> None:
    """An unknown blueprint is refused with the reason; the other seeds are changed."""
    module = slot_module()
    odd = SeedState(seed_id="b", stage=SEED_STAGE_GERMINATED, blueprint_id="perpetuum_mobile", slot="middle")
    changed = reconcile(module, (odd, *seed(SEED_STAGE_TRAINING, steps=2)))
    assert [seed_id for seed_id, _ in changed.refusals] == ["b"]
    assert "perpetuum_mobile" in changed.refusals[0][1]
    assert list(groups(module)) == ["host", "seed:a"]


def test_gradients_of_an_isolated_seed_that_are_not_finite_are_dropped() -> None:
    """The step of an isolated seed with NaN weights is not skipped, and the host's parameters stay finite."""
    module = slot_module()
    reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    with torch.no_grad():
        for _, parameter in module.seeds.topology.training_parameters("a"):
            parameter.fill_(float("nan"))
    step = train_step(module, proceed)
    assert step is not None
    assert not step.skipped
    assert all(p.isfinite().all() for n, p in module.model.named_parameters() if ".seeds." not in n)


def test_a_failing_rebuild_is_not_tried_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the next attempt is 100 steps away; the previous optimizer stays in use."""
    module = slot_module()
    attempts = []

    def failing(*_args: object, **_kwargs: object) -> None:
        attempts.append(module.global_step)
        raise RebuildFailedError("build", "injected")

    monkeypatch.setattr("tolaria.lane.seed_training.regroup", failing)
    changed = reconcile(module, seed(SEED_STAGE_TRAINING, steps=2))
    assert "injected" in changed.rebuild_error
    train(module, 30)
    assert attempts == [0]
    assert list(groups(module)) == ["host"]
