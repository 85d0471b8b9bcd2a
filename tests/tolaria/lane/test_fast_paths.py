from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from support.lane_driver import new_module, proceed
from tolaria.config import FastPathSettings
from tolaria.errors import BrokenJobError
from tolaria.lane.fast_paths import FastPaths
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule
from tolaria.optimization import OptimizerManager


def cpu_paths(*, deterministic: bool = False, **settings: str) -> FastPaths:
    """The fast paths of a CPU."""
    return FastPaths(FastPathSettings(**settings), torch.device("cpu"), deterministic=deterministic)  # type: ignore[arg-type]


def managed(optimizer: type[torch.optim.Optimizer], **options: Any) -> OptimizerManager:
    """A manager of such an optimizer over a small model in two groups with options of their own."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.5},
        {"params": list(model[1].parameters()), "weight_decay": 0.0},
    ]
    return OptimizerManager(optimizer(groups, **options), model.named_parameters(), min_interval_steps=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_fused_kernel_is_used_if_there_is_one(kind: type[torch.optim.Optimizer]) -> None:
    """The optimizer of the same class has fused=True; the groups keep their own options and rates."""
    manager, paths = managed(kind, lr=0.03), cpu_paths()
    paths.fuse(manager.optimizer)
    assert paths.descriptions["fused"] == "fused"
    assert type(manager.optimizer) is kind
    assert [g["fused"] for g in manager.optimizer.param_groups] == [True, True]
    assert [(g["weight_decay"], g["lr"]) for g in manager.optimizer.param_groups] == [(0.5, 0.03), (0.0, 0.03)]
    for group in manager.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    manager.optimizer.step()


def test_an_optimizer_without_a_fused_kernel_is_kept() -> None:
    """A missing kernel is not a failure: the reason is given, and the optimizer stays."""
    manager, paths = managed(torch.optim.Rprop), cpu_paths()
    before = manager.optimizer
    paths.fuse(manager.optimizer)
    assert manager.optimizer is before
    assert paths.descriptions["fused"].startswith("off: ")
    assert paths.failed == []


@pytest.mark.parametrize(("settings", "deterministic"), [({"fused": "off"}, False), ({}, True)])
def test_fusing_can_be_turned_off(settings: dict[str, str], deterministic: bool) -> None:
    """By the setting, and in a deterministic run."""
    manager, paths = managed(torch.optim.Adam), cpu_paths(deterministic=deterministic, **settings)
    before = manager.optimizer
    paths.fuse(manager.optimizer)
    assert manager.optimizer is before
    assert "fused" not in paths.running


def test_a_cpu_does_not_use_fast_paths_of_accelerators() -> None:
    """On a CPU auto means off, each with its reason."""
    descriptions = cpu_paths(amp="auto").descriptions
    assert all(descriptions[name].startswith("off: ") for name in ("amp", "tf32", "pin_memory", "compile"))


def test_a_failed_compilation_is_undone() -> None:
    """Whatever the warm-up of a compiled model raises, the plain model is used and the reason is kept."""
    model, paths = nn.Linear(2, 1), cpu_paths(compile="on")

    def no_compiler() -> None:
        raise BrokenJobError("losses() raised") from RuntimeError("no C++ compiler\nand a long trace")

    paths.compile(model, no_compiler)
    assert paths.descriptions["compile"] == "off: no C++ compiler"
    assert paths.failed == ["compile"]
    assert model(torch.ones(1, 2)).shape == (1, 1)


def test_a_model_in_which_nothing_is_compiled_is_reported_as_not_compiled() -> None:
    """A warm-up in which torch compiles nothing turns the fast path off, with that as the reason."""
    paths = cpu_paths(compile="on")
    paths.compile(nn.Linear(2, 1), lambda: None)
    assert paths.descriptions["compile"] == "off: torch found nothing to compile in the model"


def module_with(**settings: str) -> TrainModule:
    """A module of the small job with these fast paths."""
    return new_module("SlotJob", sections={"fastpaths": settings})


def losses_of(module: TrainModule) -> list[float]:
    """The losses of an epoch."""
    found = []
    while (step := train_step(module, proceed)) is not None:
        found.append(step.loss)
    return found


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains_alike(amp: str) -> None:
    """Forward passes run in the wanted dtype; losses follow those of float32 closely."""
    module = module_with(amp=amp)
    if module.fast_paths.scaler is not None:  # torch's initial scale overflows here, and would skip a step
        module.fast_paths.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plain, mixed = losses_of(module_with()), losses_of(module)
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.05)


def test_an_overflow_of_the_loss_scale_skips_a_step() -> None:
    """With float16 a scale that is too large skips a step as `rescaled`, and is lowered."""
    module = module_with(amp="float16")
    assert module.fast_paths.scaler is not None
    module.fast_paths.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    first = train_step(module, proceed)
    assert first is not None
    assert first.skipped
    assert first.rescaled
    assert math.isfinite(first.loss)
    assert module.fast_paths.scaler.get_scale() == 2.0**126


def test_a_scale_of_one_does_not_excuse_gradients_that_are_not_finite() -> None:
    """NaN gradients skip steps as rescaled only until the scale has reached 1."""
    module = module_with(amp="float16")
    module.fast_paths.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for parameter in module.parameters:
        parameter.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
    steps = [train_step(module, proceed) for _ in range(3)]
    assert [step.rescaled for step in steps if step] == [True, False, False]
