from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Muon, Optimizer, RMSprop

from tolaria.errors import HyperparameterError, UnknownGroupError
from tolaria.optimization.hyperparameters import HyperparameterChange, change_hyperparameters

torch.set_num_threads(1)


def over(kind: type[Optimizer], **options: Any) -> Optimizer:
    """An optimizer of that class with two named groups, after one step."""
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [p], "name": name} for p, name in zip(parameters, ("host", "seed:a"), strict=True)]
    optimizer = kind(groups, **options)
    step(optimizer)
    return optimizer


def step(optimizer: Optimizer) -> None:
    """One step whose gradients are all ones."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_values_are_set_in_the_given_group() -> None:
    """The result has each value before and after; other groups keep theirs."""
    optimizer = over(Adam, lr=0.1, weight_decay=0.01)
    changed = change_hyperparameters(optimizer, {"weight_decay": 0.1, "beta2": 0.99}, group="host")
    assert changed == [
        HyperparameterChange("host", "weight_decay", 0.01, 0.1),
        HyperparameterChange("host", "beta2", 0.999, 0.99),
    ]
    host, seed = optimizer.param_groups
    assert (host["weight_decay"], host["betas"]) == (0.1, (0.9, 0.99))
    assert (seed["weight_decay"], seed["betas"]) == (0.01, (0.9, 0.999))


def test_a_change_of_all_groups_includes_later_ones() -> None:
    """A group added later takes the new value as its default."""
    optimizer = over(SGD, lr=0.1, momentum=0.9)
    change_hyperparameters(optimizer, {"momentum": 0.5})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "name": "seed:b"})
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("kind", "options"), [(SGD, {}), (RMSprop, {}), (Muon, {"momentum": 0.0, "nesterov": False})])
def test_momentum_can_be_enabled_during_training(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """An optimizer that has stepped without momentum continues with it."""
    optimizer = over(kind, lr=0.1, **options)
    change_hyperparameters(optimizer, {"momentum": 0.9})
    step(optimizer)
    parameter = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[parameter]["momentum_buffer"].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.1, "learning-rate controller"),
        ("gamma", 0.1, "unknown; there are weight_decay, momentum, beta1, beta2"),
        ("beta1", 0.9, "SGD has none"),
        ("momentum", 1.0, "below 1"),
        ("momentum", -0.1, "at least 0"),
        ("momentum", 0.0, "Nesterov"),
        ("momentum", math.inf, "at least 0 and below 1, is inf"),
        ("weight_decay", math.nan, "from 0 to 10, is nan"),
        ("weight_decay", -1.0, "from 0 to 10, is -1"),
        ("weight_decay", math.nextafter(10.0, 11.0), "from 0 to 10"),
        ("weight_decay", 3e38, r"from 0 to 10, is 3e\+38"),
    ],
)
def test_an_invalid_change_is_refused_and_nothing_changes(name: str, value: float, message: str) -> None:
    """Valid changes in the same call are not made either."""
    optimizer = over(SGD, lr=0.1, momentum=0.9, nesterov=True)
    with pytest.raises(HyperparameterError, match=message) as caught:
        change_hyperparameters(optimizer, {"weight_decay": 0.5, name: value})
    assert caught.value.name == name
    assert [(group["weight_decay"], group["momentum"]) for group in optimizer.param_groups] == [(0, 0.9), (0, 0.9)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", 0.0),
        ("weight_decay", 10.0),
        ("beta1", 0.0),
        ("beta1", math.nextafter(1.0, 0.0)),
        ("beta2", 0.0),
        ("beta2", math.nextafter(1.0, 0.0)),
    ],
)
def test_the_bounds_are_inclusive(name: str, value: float) -> None:
    """The least and greatest valid values are set; the other beta does not change."""
    optimizer = over(Adam, lr=0.1)
    change_hyperparameters(optimizer, {name: value})
    host = optimizer.param_groups[0]
    found = {"weight_decay": host["weight_decay"], "beta1": host["betas"][0], "beta2": host["betas"][1]}
    assert found == {"weight_decay": 0, "beta1": 0.9, "beta2": 0.999, name: value}


@pytest.mark.parametrize(("name", "value"), [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", math.nan)])
def test_betas_stay_in_bounds(name: str, value: float) -> None:
    """The error names the beta."""
    optimizer = over(Adam, lr=0.1)
    with pytest.raises(HyperparameterError, match=f"{name}: must be at least 0 and below 1"):
        change_hyperparameters(optimizer, {name: value})
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_the_greatest_decay_does_not_enlarge_weights() -> None:
    """At a common rate a step at the bound shrinks weights."""
    optimizer = over(SGD, lr=0.05)
    change_hyperparameters(optimizer, {"weight_decay": 10.0})
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().abs().max()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameter.abs().max() <= before


def test_an_optimizer_without_the_option_is_refused() -> None:
    """Adagrad has no momentum."""
    with pytest.raises(HyperparameterError, match="Adagrad has none"):
        change_hyperparameters(over(Adagrad, lr=0.1), {"momentum": 0.9})


def test_betas_that_are_tensors_cannot_change() -> None:
    """They are captured with the step."""
    optimizer = over(Adam, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.999)))
    with pytest.raises(HyperparameterError, match="is a tensor"):
        change_hyperparameters(optimizer, {"beta1": 0.8})


def test_an_unknown_group_is_refused() -> None:
    """The error lists the known groups."""
    with pytest.raises(UnknownGroupError, match="there are: host, seed:a"):
        change_hyperparameters(over(SGD, lr=0.1), {"momentum": 0.9}, group="seed:z")
