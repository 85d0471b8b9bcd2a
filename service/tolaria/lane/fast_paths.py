"""PyTorch's fast paths: fused optimizers, compilation, mixed precision, TF32, pinned memory.

Each is in use where the device supports it and the setting allows it, and otherwise off, with a reason.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, get_args

import torch
import torch._dynamo.callback  # torch has no public way to learn that it compiles
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.config import FastPathSettings
from tolaria.errors import BrokenJobError
from tolaria.optimization.groups import is_dense
from tolaria.shards import placed_like

FastPath = Literal["fused", "compile", "amp", "tf32", "pin_memory"]

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
        self._refused_frames = 0
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

    def fuse(self, optimizer: Optimizer) -> None:
        """Selects the fused or foreach kernel of the optimizer, if it has one, in the object itself.

        A kernel that the job selected stays. Before the first step.
        """
        if self._settings.fused == "off":
            return
        if self._deterministic:
            self.fallbacks["fused"] = "the run is deterministic"
            return
        if chosen := _chosen_kernel(optimizer):
            self.running["fused"] = chosen
            return
        option, why = self._kernel(optimizer)
        if why:
            self.fallbacks["fused"] = why
            if "fused" in optimizer.defaults:
                self.failed.append("fused")
            return
        for options in (optimizer.defaults, *optimizer.param_groups):
            options[option] = True
        self.running["fused"] = option

    def _kernel(self, optimizer: Optimizer) -> tuple[str, str]:
        """Returns the option of the kernel to select, or why there is none."""
        reasons: list[str] = []
        if "fused" in optimizer.defaults:
            problem = _fused_problem(optimizer)
            if problem is None:
                return "fused", ""
            reasons.append(f"fused: {problem}")
        if "foreach" in optimizer.defaults:
            if self._device.type != "cpu":
                return "foreach", ""
            reasons.append("foreach is slower on a CPU")
        return "", "; ".join(reasons) or f"{type(optimizer).__name__} has neither a fused nor a foreach kernel"

    def compile(self, model: nn.Module, warm_up: Callable[[], object], *, sharded: bool = False) -> None:
        """Compiles the model's forward and backward pass and calls `warm_up`; undone if that fails."""
        if self._settings.compile == "off":
            return
        if sharded:  # each rank would find out for itself whether its passes compile
            self.fallbacks["compile"] = "lane.parallel is fsdp"
            return
        if any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):
            self.fallbacks["compile"] = "the job compiles its model itself"
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
        self._refused_frames = _refused_frames()

    def new_compile_fallback(self) -> str:
        """Returns why torch runs parts of the model uncompiled, once after it has begun to; empty otherwise.

        It does so where a function has been compiled too often (its `recompile_limit`), or cannot be. Then `compile` is
        off in `descriptions`.
        """
        if "compile" not in self.running or _refused_frames() <= self._refused_frames:
            return ""
        del self.running["compile"]
        reasons = torch._dynamo.utils.counters["unimplemented"]  # noqa: SLF001 - torch has no public account of it
        limit = any("recompile limit" in reason for reason in reasons)
        why = "one function was compiled as often as torch allows" if limit else "torch could not compile them"
        self.fallbacks["compile"] = f"parts of the model run uncompiled: {why}"
        self.failed.append("compile")
        return self.fallbacks["compile"]

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


@contextlib.contextmanager
def spanning_compilation(span: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Enters `span()` whenever torch compiles in the calling thread, and leaves it when torch has done so.

    Compiling takes minutes without a step, and may happen at any: for a smaller batch, after a graft, in code of the
    job.
    """
    thread, entered = threading.get_ident(), contextlib.ExitStack()

    def begin(_: object) -> None:
        if threading.get_ident() == thread:
            entered.enter_context(span())

    def end(_: object) -> None:
        if threading.get_ident() == thread:
            entered.close()

    handler = torch._dynamo.callback.callback_handler  # noqa: SLF001 - see the import
    handler.register_start_callback(begin)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(begin)
        handler.remove_end_callback(end)
        entered.close()


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # noqa: SLF001 - torch has no public count


def _refused_frames() -> int:
    frames = torch._dynamo.utils.counters["frames"]  # noqa: SLF001 - as above
    return int(frames["total"] - frames["ok"])


def _chosen_kernel(optimizer: Optimizer) -> str:
    """Returns the kernel that the job selected: "fused", "foreach", "the job's choice", or "" if it left it open."""
    given = [group.get(option) for group in optimizer.param_groups for option in ("fused", "foreach")]
    if all(option is None for option in given):
        return ""
    groups = optimizer.param_groups
    used = (option for option in ("fused", "foreach") if all(group.get(option) for group in groups))
    return next(used, "the job's choice")


def _fused_problem(optimizer: Optimizer) -> str | None:
    """Returns why the optimizer cannot use its fused kernel; tries it on parameters of one element.

    On a CPU it walks the memory of parameters, gradients and moments in order, so they must have the same layout.
    """
    kernel = next((c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim.")), Optimizer)
    if kernel is Optimizer:
        return f"{type(optimizer).__name__} is no optimizer of torch's"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [
        (parameter, moment)
        for parameter in parameters
        for moment in optimizer.state.get(parameter, {}).values()
        if isinstance(moment, Tensor) and moment.shape == parameter.shape
    ]
    if not all(map(is_dense, parameters)) or any(p.stride() != m.stride() for p, m in moments):
        return "its parameters or moments are not laid out in memory without gaps and alike"
    accepted = inspect.signature(kernel).parameters
    arguments: dict[str, Any] = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        for kind in {(p.dtype, p.device): p for p in parameters}.values():
            scratch = placed_like(torch.zeros(1, 1, dtype=kind.dtype, device=kind.device), kind).requires_grad_()
            scratch.grad = torch.zeros_like(scratch)
            kernel([scratch], **{**arguments, "foreach": None, "fused": True}).step()
    except Exception as error:  # noqa: BLE001 - torch raises several kinds
        return str(error).strip().splitlines()[0][:200]
    return None
