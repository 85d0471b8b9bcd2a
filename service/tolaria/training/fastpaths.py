"""The fast paths of PyTorch: fused optimizers, compilation, mixed precision, TF32, pinned memory.

Each is on where the device has it, each is a setting, and each falls back to the plain path with a reason instead of an
error. Must not know who is told of that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from tolaria.config import FastPathSettings
from tolaria.errors import BrokenJobError, RebuildFailedError
from tolaria.optimization import OptimizerManager

FastPath = Literal["fused", "compile", "amp", "tf32", "pin_memory"]

_BEFORE_THE_RUN = -(10**9)  # a step that no storm guard counts from
_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class FastPaths:
    """What runs. `running` maps each fast path to what it is, in words; `fallbacks` to why not; `failed` were tried."""

    device: torch.device
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    running: dict[FastPath, str] = field(default_factory=dict)
    fallbacks: dict[FastPath, str] = field(default_factory=dict)
    failed: list[FastPath] = field(default_factory=list)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context for a forward pass."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @property
    def pins(self) -> bool:
        """Whether batches go to the device by way of pinned memory."""
        return "pin_memory" in self.running

    def lowered_scale(self, *, finite: bool, loss_finite: bool) -> bool:
        """Let the loss scale of float16 follow a step; whether a void step was only its overflow.

        A scale that has come down to 1 and still overflows is a mistake like any other. Synchronises on void steps.
        """
        if self.scaler is None:
            return False
        overflowed = not finite and loss_finite and self.scaler.get_scale() > 1.0
        self.scaler.update()
        return overflowed

    @property
    def told(self) -> dict[str, str]:
        """Every fast path and what runs, for people: `on` in words, or `off` and why."""
        names: tuple[FastPath, ...] = ("fused", "compile", "amp", "tf32", "pin_memory")
        return {name: self.running.get(name) or f"off: {self.fallbacks.get(name, 'not wanted')}" for name in names}

    def turn_on(self, name: FastPath, words: str) -> None:
        """It runs."""
        self.running[name] = words

    def turn_off(self, name: FastPath, why: str, *, failed: bool = False) -> None:
        """It does not run, though it may; `failed`: it was tried."""
        self.running.pop(name, None)
        self.fallbacks[name] = why
        if failed:
            self.failed.append(name)


def choose_fast_paths(settings: FastPathSettings, device: torch.device, *, deterministic: bool) -> FastPaths:
    """Settle what the device allows: mixed precision, TF32 and pinned memory. Sets torch's process-wide switches."""
    paths = FastPaths(device)
    on_cuda = device.type == "cuda"
    _settle_amp(paths, settings.amp, on_cuda=on_cuda)
    if settings.tf32 != "off":
        if on_cuda and not deterministic:
            torch.backends.cudnn.allow_tf32 = True
            torch.set_float32_matmul_precision("high")
            paths.turn_on("tf32", "on")
        else:
            paths.turn_off("tf32", "the run is deterministic" if on_cuda else f"{device.type} has none")
    if settings.pin_memory != "off":
        if on_cuda:
            paths.turn_on("pin_memory", "on")
        else:
            paths.turn_off("pin_memory", f"{device.type} shares the host's memory")
    return paths


def fuse(paths: FastPaths, settings: FastPathSettings, manager: OptimizerManager, *, deterministic: bool) -> None:
    """Let the optimizer take its fused or foreach kernel, where its class has one. Before the first update."""
    optimizer = manager.optimizer
    if settings.fused == "off":
        return
    if deterministic:
        paths.turn_off("fused", "the run is deterministic")
        return
    options = [option for option in ("fused", "foreach") if option in optimizer.defaults]
    reasons = [] if options else [f"{type(optimizer).__name__} has neither a fused nor a foreach kernel"]
    for option in options:
        if option == "foreach" and paths.device.type == "cpu":
            reasons.append("foreach is slower on a CPU")
            continue
        try:
            _rebuild_with(manager, option)
        except RebuildFailedError as error:
            reasons.append(f"{option}: {error.detail}")
        else:
            paths.turn_on("fused", option)
            return
    paths.turn_off("fused", "; ".join(reasons), failed="fused" in options)


def compile_model(
    paths: FastPaths, settings: FastPathSettings, model: nn.Module, warm_up: Callable[[], None], *, deterministic: bool
) -> None:
    """Compile the model's forward pass, and with it its backward, and run `warm_up` once; undone if that fails."""
    wanted = settings.compile == "on" or (settings.compile == "auto" and paths.device.type == "cuda")
    if settings.compile == "off":
        return
    if not wanted or deterministic:
        paths.turn_off("compile", "the run is deterministic" if deterministic else "it does not pay on a CPU")
        return
    model.compile(dynamic=None)
    graphs_before = _compiled_graphs()
    try:
        warm_up()
        why = "" if _compiled_graphs() > graphs_before else "torch found nothing to compile in the model"
    except BrokenJobError as error:  # the forward pass has been through once without: it is the compiler's doing
        why = str(error.__cause__ or error).strip().splitlines()[0][:200]
    if why:
        torch.compiler.reset()
        model._compiled_call_impl = None  # noqa: SLF001 - torch has no public way back from Module.compile
        paths.turn_off("compile", why, failed=True)
        return
    # A seed that is grafted later makes other graphs: one that the compiler cannot take then runs as it is.
    torch._dynamo.config.suppress_errors = True  # noqa: SLF001 - the documented switch lives there
    paths.turn_on("compile", "on")


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # noqa: SLF001 - torch has no public count


def _settle_amp(paths: FastPaths, wanted: str, *, on_cuda: bool) -> None:
    if wanted == "off":
        return
    if wanted == "auto":
        if not on_cuda:
            paths.turn_off("amp", f"{paths.device.type} is not faster with it")
            return
        wanted = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    paths.amp_dtype = _AMP_DTYPES[wanted]
    if wanted == "float16":  # its gradients underflow; bfloat16 has float32's range
        paths.scaler = torch.amp.GradScaler(paths.device.type)
    paths.turn_on("amp", wanted)


def _rebuild_with(manager: OptimizerManager, option: str) -> None:
    before = manager.optimizer
    defaults: dict[str, Any] = {**before.defaults, "fused": None, "foreach": None, option: True}
    taken = inspect.signature(type(before)).parameters  # AdamW keeps a default that it does not take
    known = {name: value for name, value in defaults.items() if name in before.defaults and name in taken}
    # A job may have given its groups options of their own: only the kernel changes.
    kept = {"params", "name", "lr", "fused", "foreach"}
    options = {group["name"]: {k: v for k, v in group.items() if k not in kept} for group in before.param_groups}
    plans = [replace(plan, options=options[plan.name]) for plan in manager.plan()]
    manager.rebuild(plans, _BEFORE_THE_RUN, urgent=True, change_to=lambda groups: type(before)(groups, **known))
