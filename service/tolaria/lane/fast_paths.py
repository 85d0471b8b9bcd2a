"""PyTorch's fast paths: fused optimizers, compilation, mixed precision, TF32, pinned memory.

Each is in use where the device supports it and the setting allows it, and otherwise off, with a reason.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from tolaria.config import FastPathSettings
from tolaria.errors import BrokenJobError, RebuildFailedError
from tolaria.optimization import OptimizerManager

FastPath = Literal["fused", "compile", "amp", "tf32", "pin_memory"]

_BEFORE_THE_RUN: Final = -(10**9)  # a step so early that the minimum interval between rebuilds has passed
_AMP_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class FastPaths:
    """The fast paths of one run; `fuse` and `compile` are called once there is an optimizer and a model.

    Sets torch's process-wide switches for TF32.

    Attributes:
        scaler: of the loss, with float16 only.
        pins_memory: whether batches are copied to the device through pinned memory.
        running: a short description of each fast path in use.
        fallbacks: for each one that is off although the setting allows it, the reason.
        failed: those of `fallbacks` that were tried.
    """

    def __init__(self, settings: FastPathSettings, device: torch.device, *, deterministic: bool) -> None:
        self._settings = settings
        self._device = device
        self._deterministic = deterministic
        self._amp_dtype: torch.dtype | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.running: dict[FastPath, str] = {}
        self.fallbacks: dict[FastPath, str] = {}
        self.failed: list[FastPath] = []
        on_cuda = device.type == "cuda"
        if settings.amp != "off":
            self._choose_amp(settings.amp)
        if settings.tf32 != "off":
            if on_cuda and not deterministic:
                torch.backends.cudnn.allow_tf32 = True
                torch.set_float32_matmul_precision("high")
                self.running["tf32"] = "on"
            else:
                self.fallbacks["tf32"] = "the run is deterministic" if on_cuda else f"{device.type} has none"
        self.pins_memory = on_cuda and settings.pin_memory != "off"
        if self.pins_memory:
            self.running["pin_memory"] = "on"
        elif settings.pin_memory != "off":
            self.fallbacks["pin_memory"] = f"{device.type} shares the host's memory"

    @property
    def descriptions(self) -> dict[str, str]:
        """Every fast path, with what is in use, or `off` and the reason."""
        return {
            name: self.running.get(name) or f"off: {self.fallbacks.get(name, 'not wanted')}"
            for name in get_args(FastPath)
        }

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context of a forward pass."""
        if self._amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._amp_dtype)

    def update_scale(self, *, finite: bool, loss_finite: bool) -> bool:
        """Updates float16's loss scale after a step; returns whether the step was skipped only by its overflow.

        A scale of 1 cannot cause an overflow, and none can make the loss infinite: then it stays as it is. Synchronises
        after skipped steps.
        """
        if self.scaler is None:
            return False
        overflowed = not finite and loss_finite and self.scaler.get_scale() > 1.0
        if finite or overflowed:
            self.scaler.update()
        else:
            self.keep_scale()
        return overflowed

    def keep_scale(self) -> None:
        """Ends a step whose gradients have been unscaled, without a change of float16's loss scale. Synchronises."""
        if self.scaler is not None:
            self.scaler.update(self.scaler.get_scale())

    def fuse(self, manager: OptimizerManager) -> None:
        """Rebuilds the optimizer with its fused or foreach kernel, if its class has one. Before the first step."""
        optimizer = manager.optimizer
        if self._settings.fused == "off":
            return
        if self._deterministic:
            self.fallbacks["fused"] = "the run is deterministic"
            return
        options = [option for option in ("fused", "foreach") if option in optimizer.defaults]
        reasons = [] if options else [f"{type(optimizer).__name__} has neither a fused nor a foreach kernel"]
        for option in options:
            if option == "foreach" and self._device.type == "cpu":
                reasons.append("foreach is slower on a CPU")
                continue
            try:
                _rebuild_with(manager, option)
            except RebuildFailedError as error:
                reasons.append(f"{option}: {error.detail}")
            else:
                self.running["fused"] = option
                return
        self.fallbacks["fused"] = "; ".join(reasons)
        if "fused" in options:
            self.failed.append("fused")

    def compile(self, model: nn.Module, warm_up: Callable[[], None]) -> None:
        """Compiles the model's forward and backward pass and calls `warm_up`; undone if that fails."""
        if self._settings.compile == "off":
            return
        if self._deterministic or (self._settings.compile == "auto" and self._device.type != "cuda"):
            why = "the run is deterministic" if self._deterministic else "it does not pay off on a CPU"
            self.fallbacks["compile"] = why
            return
        model.compile(dynamic=None)
        graphs_before = _compiled_graphs()
        try:
            warm_up()
            why = "" if _compiled_graphs() > graphs_before else "torch found nothing to compile in the model"
        except BrokenJobError as error:  # the forward pass has succeeded without the compiler before
            why = str(error.__cause__ or error).strip().splitlines()[0][:200]
        if why:
            torch.compiler.reset()
            model._compiled_call_impl = None  # noqa: SLF001 - torch has no public way back from Module.compile
            self.fallbacks["compile"] = why
            self.failed.append("compile")
            return
        # A seed that is grafted later changes the graph: one that the compiler does not support runs uncompiled.
        torch._dynamo.config.suppress_errors = True  # noqa: SLF001 - the documented switch is there
        self.running["compile"] = "on"

    def _choose_amp(self, wanted: str) -> None:
        if wanted == "auto":
            if self._device.type != "cuda":
                self.fallbacks["amp"] = f"{self._device.type} is not faster with it"
                return
            wanted = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        self._amp_dtype = _AMP_DTYPES[wanted]
        if wanted == "float16":  # its gradients underflow; bfloat16 has float32's range
            self.scaler = torch.amp.GradScaler(self._device.type)
        self.running["amp"] = wanted


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # noqa: SLF001 - torch has no public count


def _rebuild_with(manager: OptimizerManager, option: str) -> None:
    before = manager.optimizer
    defaults: dict[str, Any] = {**before.defaults, "fused": None, "foreach": None, option: True}
    taken = inspect.signature(type(before)).parameters  # AdamW has a default that its constructor does not take
    known = {name: value for name, value in defaults.items() if name in before.defaults and name in taken}
    # A job may have given each group its own options: only the kernel changes.
    kept = {"params", "name", "lr", "fused", "foreach"}
    options = {group["name"]: {k: v for k, v in group.items() if k not in kept} for group in before.param_groups}
    plans = [replace(plan, options=options[plan.name]) for plan in manager.plan()]
    manager.rebuild(plans, _BEFORE_THE_RUN, urgent=True, change_to=lambda groups: type(before)(groups, **known))
