from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from tolaria.errors import RebuildFailedError
from tolaria.optimization import GroupPlan, OptimizerManager

torch.set_num_threads(1)


def matrix(*shape: int) -> nn.Parameter:
    """A new parameter."""
    return nn.Parameter(torch.ones(shape))


def lbfgs_scene(parameters: dict[str, nn.Parameter]) -> tuple[OptimizerManager, Callable[[], object]]:
    """An LBFGS that minimises the sum of fourth powers, and one step of it."""
    manager = OptimizerManager(
        LBFGS(parameters.values(), lr=0.1, max_iter=4, history_size=3), parameters.items(), min_interval_steps=0
    )

    def closure() -> Tensor:
        manager.optimizer.zero_grad()
        loss = torch.stack(
            [(parameter - 0.5).pow(4).sum() for parameter in manager.optimizer.param_groups[0]["params"]]
        ).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return manager, lambda: manager.optimizer.step(closure)  # type: ignore[arg-type] # torch says float, and takes tensors


def test_lbfgs_goes_on_over_the_same_layout() -> None:
    """It has one state, at its first parameter; over the same parameters that is carried and updates are bit-equal."""
    ones, twos = ({"a": matrix(3), "b": matrix(2, 2)} for _ in range(2))
    (rebuilt, step), (_, step_untouched) = lbfgs_scene(ones), lbfgs_scene(twos)
    step()
    step_untouched()
    assert rebuilt.rebuild(rebuilt.plan(), at_step=1).kept == ("a", "b")
    step()
    step_untouched()
    assert all(torch.equal(ones[name], twos[name]) for name in ones)


def test_lbfgs_starts_over_when_parameters_come() -> None:
    """Its curvature belongs to the old space: the result says which parameters start over, and training goes on."""
    parameters = {"a": matrix(3)}
    manager, step = lbfgs_scene(parameters)
    step()
    new = matrix(2)
    result = manager.rebuild([GroupPlan("host", {"new": new, "a": parameters["a"]})], at_step=1)
    assert (result.restarted, result.fresh) == (("a",), ("new",))
    step()
    assert not torch.equal(new, torch.ones(2))


def test_lbfgs_refuses_a_second_group() -> None:
    """The class cannot have one; the old optimizer stays."""
    parameters = {"a": matrix(3)}
    manager, _ = lbfgs_scene(parameters)
    old = manager.optimizer
    with pytest.raises(RebuildFailedError, match="parameter groups") as caught:
        manager.rebuild([*manager.plan(), GroupPlan("seed:a", {"new": matrix(2)})], at_step=1)
    assert (caught.value.stage, manager.optimizer) == ("build", old)
