"""Several networks, weight decay by schedule, and names of param groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.lane_driver import DrivenLane, built, driven
from tolaria.config import OptimizerSettings
from tolaria.errors import BrokenJobError, HyperparameterError
from tolaria.lane.messages import ChangeOptimizer

JOBS = "support.practice_jobs"


def test_adversaries_are_param_groups_of_one_optimizer() -> None:
    """The generator is updated in every fifth step only, by its own loss; a rollback repeats all of it."""
    lane = driven(f"{JOBS}:Adversarial")
    lane.snapshot()
    model = dict(lane.module.model.named_parameters())
    changes = []
    for step in range(1, 12):
        before = {name: parameter.detach().clone() for name, parameter in model.items()}
        lane.train_to(step)
        changed = {name for name, parameter in model.items() if not torch.equal(before[name], parameter)}
        changes.append({name.split(".")[0] for name in changed})
    assert changes == [{"generator", "critic"} if step % 5 == 0 else {"critic"} for step in range(11)]
    end = lane.digest
    lane.restore(0)
    lane.train_to(11)
    assert lane.digest == end
    assert set(lane.module.seeds.controller.learning_rates()) == {"generator", "critic"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("list", r"build_optimizer\(\) must return one optimizer, got a list of 2: .*Several networks"),
        ("mapping", r"build_optimizer\(\) must return one optimizer, got a dict of 2"),
        ("none", r"build_optimizer\(\) must return a Optimizer, got a NoneType"),
    ],
)
def test_several_optimizers_are_refused(given: str, words: str) -> None:
    """With the method's name, and what to do instead."""
    with pytest.raises(BrokenJobError, match=words):
        built(f"{JOBS}:Adversarial", options={"optimizers": given})


def decays(lane: DrivenLane) -> list[float]:
    """The weight decay of each group."""
    return [group["weight_decay"] for group in lane.module.optimizer.param_groups]


@pytest.mark.parametrize(
    ("policy", "expected"), [("linear", [1.0, 1.25, 1.5, 1.75, 2.0]), ("cosine", [1.0, 1.146447, 1.5, 1.853553, 2.0])]
)
def test_weight_decay_follows_its_schedule(policy: str, expected: list[float]) -> None:
    """From the job's to the final factor of it at the end of the run of 8 steps; a rollback repeats it."""
    settings = OptimizerSettings.model_validate({"weight_decay_policy": policy, "weight_decay_final": 2.0})
    lane = DrivenLane(built(f"{JOBS}:Named", epochs=1, options={"name": "all"}, sections={"optimizer": settings}))
    assert decays(lane) == [0.1]
    lane.snapshot()
    found = {}
    for step in range(1, 10):  # the decay of the step that follows `step - 1` steps
        lane.train_to(step)
        found[step - 1] = decays(lane)[0]
    assert [found[step] for step in (0, 2, 4, 6, 8)] == pytest.approx([0.1 * factor for factor in expected], rel=1e-6)
    lane.restore(0)
    lane.train_to(3)
    assert decays(lane)[0] == found[2]
    refused = lane.execute(ChangeOptimizer(None, {"weight_decay": 0.3}, None)).failure
    assert refused is not None
    assert isinstance(refused.error(), HyperparameterError)
    assert "optimizer.weight_decay_policy" in str(refused)


def test_without_a_schedule_weight_decay_is_left_alone() -> None:
    """Also what the controller has set."""
    lane = driven(f"{JOBS}:Named", name="all")
    lane.execute(ChangeOptimizer(None, {"weight_decay": 0.3}, None))
    lane.train_to(3)
    assert decays(lane) == [0.3]


@pytest.mark.parametrize(
    ("name", "words"),
    [("seed:a", "begins as those of seeds do"), ("", "is not a text of 1 to 100"), (3, "is not a text of 1 to 100")],
)
def test_a_name_that_a_group_cannot_have_is_refused(name: Any, words: str) -> None:
    """It would be taken for a seed's, or could not be named in a command."""
    with pytest.raises(BrokenJobError, match=words):
        built(f"{JOBS}:Named", options={"name": name})
