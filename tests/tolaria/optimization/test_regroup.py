from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import Adam

from tolaria.errors import RebuildFailedError
from tolaria.optimization import (
    Constant,
    GroupPlan,
    LearningRateSettings,
    OptimizerManager,
    Schedule,
    UnifiedLRController,
    Warmup,
    regroup,
)
from tolaria.values.optimization import GroupRole, RebuildOutcome

torch.set_num_threads(1)


def parts(min_interval_steps: int = 0) -> tuple[OptimizerManager, UnifiedLRController]:
    """A manager of one host group and its controller, after the first step's rates were written."""
    weight = nn.Parameter(torch.ones(2))
    manager = OptimizerManager(Adam([weight], lr=0.1), [("weight", weight)], min_interval_steps=min_interval_steps)
    settings = LearningRateSettings(Schedule(Constant()), seed_warmup=Warmup(4, floor=0.5))
    controller = UnifiedLRController(manager, settings)
    controller.apply(0)
    return manager, controller


def seed(name: str = "seed:a", size: int = 2) -> GroupPlan:
    """A seed's group."""
    return GroupPlan(name, {f"{name}.weight": nn.Parameter(torch.ones(size))}, GroupRole.SEED)


def rates(manager: OptimizerManager) -> dict[str, float]:
    """What the live optimizer holds."""
    return {group["name"]: group["lr"] for group in manager.optimizer.param_groups}


def test_a_seed_comes_freezes_and_goes() -> None:
    """Its group and its rate come together, with a warm-up from that step; frozen it is 0; gone it is forgotten."""
    manager, controller = parts()
    regroup(manager, controller, [*manager.plan(), seed()], at_step=10)
    assert rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.005})
    assert controller.before_step(14) == []
    assert rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.01})
    host, grown = manager.plan()
    assert grown.role is GroupRole.SEED
    regroup(manager, controller, [host, replace(grown, role=GroupRole.FROZEN)], at_step=20)
    assert rates(manager) == {"host": 0.1, "seed:a": 0.0}
    regroup(manager, controller, [host], at_step=30)
    assert rates(manager) == {"host": 0.1}
    assert list(controller.groups) == ["host"]


@pytest.mark.parametrize("interval", [0, 100], ids=["failing", "skipped"])
def test_without_a_rebuild_no_rate_changes(interval: int) -> None:
    """Whether it failed or was skipped: groups, rates and the guard over them are as before, and a retry succeeds."""
    manager, controller = parts(interval)
    regroup(manager, controller, [*manager.plan(), seed()], at_step=0)
    before, old = controller.state_dict(), manager.optimizer
    host, grown = manager.plan()
    wanted = [host, replace(grown, role=GroupRole.FROZEN), seed("seed:b")]
    if interval:
        assert regroup(manager, controller, wanted, at_step=9).outcome is RebuildOutcome.SKIPPED
    else:
        with pytest.raises(RebuildFailedError):
            regroup(manager, controller, [*wanted, seed("seed:b")], at_step=9)
    assert manager.optimizer is old
    assert controller.state_dict() == before
    assert rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.005}, rel=1e-12)
    old.param_groups[0]["lr"] = 0.3
    assert [violation.group for violation in controller.verify()] == ["host"]
    assert regroup(manager, controller, wanted, at_step=100).fresh == ("seed:b.weight",)


def test_restored_groups_keep_their_warmup() -> None:
    """After the controller's state was restored, regrouping to the same groups does not begin warm-ups anew."""
    manager, controller = parts()
    regroup(manager, controller, [*manager.plan(), seed()], at_step=10)
    saved = controller.state_dict()
    with_seed = manager.plan()
    regroup(manager, controller, with_seed[:1], at_step=20)
    controller.load_state_dict(saved)
    regroup(manager, controller, with_seed, at_step=12, urgent=True)
    assert controller.groups["seed:a"].registered_at == 10
    assert rates(manager)["seed:a"] == pytest.approx(0.01 * 0.75)
