from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from support.runs import FakePeers, new_run, running
from tolaria.config import FastPathSettings, Settings, TrainingSettings
from tolaria.errors import BrokenJobError
from tolaria.optimization import OptimizerManager
from tolaria.training.fastpaths import FastPaths, choose_fast_paths, compile_model, fuse
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import train_step

CPU = torch.device("cpu")


def managed(optimizer: type[torch.optim.Optimizer], **options: Any) -> OptimizerManager:
    """A manager of such an optimizer over a small model in two groups of their own options."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.5},
        {"params": list(model[1].parameters()), "weight_decay": 0.0},
    ]
    return OptimizerManager(optimizer(groups, **options), model.named_parameters(), min_interval_steps=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_fused_kernel_is_taken_where_there_is_one(kind: type[torch.optim.Optimizer]) -> None:
    """The optimizer of the same class goes on with fused=True; the groups keep their own options and rates."""
    manager, paths = managed(kind, lr=0.03), FastPaths(CPU)
    fuse(paths, FastPathSettings(), manager, deterministic=False)
    assert paths.told["fused"] == "fused"
    assert type(manager.optimizer) is kind
    assert [g["fused"] for g in manager.optimizer.param_groups] == [True, True]
    assert [(g["weight_decay"], g["lr"]) for g in manager.optimizer.param_groups] == [(0.5, 0.03), (0.0, 0.03)]
    for group in manager.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    manager.optimizer.step()


def test_an_optimizer_without_a_kernel_stays_as_it_is() -> None:
    """No kernel is no mistake: it is told why, and training goes on plainly."""
    manager, paths = managed(torch.optim.Rprop), FastPaths(CPU)
    before = manager.optimizer
    fuse(paths, FastPathSettings(), manager, deterministic=False)
    assert manager.optimizer is before
    assert paths.told["fused"].startswith("off: ")
    assert paths.failed == []


@pytest.mark.parametrize(("settings", "deterministic"), [({"fused": "off"}, False), ({}, True)])
def test_fusing_is_left_alone_when_told(settings: dict[str, str], deterministic: bool) -> None:
    """Switched off, or in a deterministic run, the job's own optimizer goes on."""
    manager, paths = managed(torch.optim.Adam), FastPaths(CPU)
    before = manager.optimizer
    fuse(paths, FastPathSettings(**settings), manager, deterministic=deterministic)  # type: ignore[arg-type]
    assert manager.optimizer is before
    assert "fused" not in paths.running


def test_a_cpu_has_no_paths_of_an_accelerator() -> None:
    """On a CPU auto means off, each with its reason."""
    told = choose_fast_paths(FastPathSettings(amp="auto"), CPU, deterministic=False).told
    assert all(told[name].startswith("off: ") for name in ("amp", "tf32", "pin_memory", "compile"))


def test_a_compiler_that_fails_is_undone() -> None:
    """Whatever the warm-up of a compiled model raises, the plain model goes on and the reason is kept."""
    model, paths = nn.Linear(2, 1), FastPaths(CPU)

    def no_compiler() -> None:
        raise BrokenJobError("losses() raised") from RuntimeError("no C++ compiler\nand a long trace")

    compile_model(paths, FastPathSettings(compile="on"), model, no_compiler, deterministic=False)
    assert paths.told["compile"] == "off: no C++ compiler"
    assert paths.failed == ["compile"]
    assert model(torch.ones(1, 2)).shape == (1, 1)


def rig(**paths: str) -> Rig:
    """A rig of the tiny job with these fast paths."""
    made = build_rig(
        Settings(
            training=TrainingSettings(job="support.jobs:SlotJob", device="cpu"),
            fastpaths=FastPathSettings(**paths),  # type: ignore[arg-type]
        )
    )
    made.cursor.begin_epoch(1)
    return made


def losses_of(made: Rig) -> list[float]:
    """The losses of an epoch."""
    found = []
    while (report := train_step(made, lambda: True)) is not None:
        found.append(report.loss)
    return found


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains_alike(amp: str) -> None:
    """Forward passes run in the wanted dtype; losses follow those of float32 closely."""
    made = rig(amp=amp)
    if made.paths.scaler is not None:  # torch's first guess overflows here, and a void step is another way
        made.paths.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plain, mixed = losses_of(rig()), losses_of(made)
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.05)


def test_an_overflow_of_the_loss_scale_is_no_mistake() -> None:
    """With float16 a scale that is too large voids a step, is lowered, and holds nobody up."""
    made = rig(amp="float16")
    assert made.paths.scaler is not None
    made.paths.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    first = train_step(made, lambda: True)
    assert first is not None
    assert first.void
    assert first.rescaled
    assert math.isfinite(first.loss)
    assert made.paths.scaler.get_scale() == 2.0**126


def test_an_optimizer_that_needs_closures_is_told_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """LBFGS evaluates the loss many times in a step, which merged gradients cannot serve."""
    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", lambda _self, m: torch.optim.LBFGS(m.parameters()))
    with pytest.raises(BrokenJobError, match="LBFGS evaluates the loss several times"):
        rig()


@pytest.mark.anyio
async def test_what_runs_is_shown() -> None:
    """GetStatus tells every fast path, and its metric is 0 or 1."""
    run = new_run(FakePeers(), epochs=1)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert run.loop.status().fast_paths["fused"] == "fused"
    assert run.loop.status().fast_paths["amp"] == "off: not wanted"
    assert run.metrics.registry.get_sample_value("tolaria.train.foreach_enabled") == 1
    assert run.metrics.registry.get_sample_value("tolaria.train.amp_enabled") == 0


def test_a_scale_that_has_come_down_to_one_hides_nothing() -> None:
    """NaN gradients under float16 void steps; once the scale is spent they count as the mistake that they are."""
    made = rig(amp="float16")
    made.paths.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for parameter in made.parameters:
        parameter.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
    reports = [train_step(made, lambda: True) for _ in range(3)]
    assert [r.rescaled for r in reports if r] == [True, False, False]


def test_a_model_that_is_not_compiled_is_not_called_compiled() -> None:
    """A warm-up in which torch compiles nothing turns the fast path off, with that as the reason."""
    paths = FastPaths(CPU)
    compile_model(paths, FastPathSettings(compile="on"), nn.Linear(2, 1), lambda: None, deterministic=False)
    assert paths.told["compile"] == "off: torch found nothing to compile in the model"
