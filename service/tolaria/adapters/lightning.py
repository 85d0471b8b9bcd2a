"""`LightningJob`: a job made of a `LightningModule` and its loaders, without a Trainer.

Honoured are `training_step`, `validation_step`, `configure_optimizers` with one optimizer, `configure_model`, `log` and
`log_dict`, the loaders, and `prepare_data` and `setup` of module and data module. Whatever else a Trainer would call is
refused by name if the module overrides it, since training would differ silently. Lightning itself is not imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from tolaria.adapters.loaders import LoaderBatches, PlacedCursor
from tolaria.errors import BrokenJobError
from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor
from tolaria.values.evaluation import RESERVED

_PACKAGES: Final = ("lightning.", "pytorch_lightning.")
_LOSSES: Final = ("val_loss", "valid_loss", "validation_loss", "val/loss", "loss")
"""Names under which a `validation_step` that returns no loss may log it."""

_HONOURED: Final = frozenset(
    {
        *("training_step", "validation_step", "forward", "configure_optimizers", "configure_model", "log", "log_dict"),
        *("prepare_data", "setup", "train_dataloader", "val_dataloader"),
    }
)
_IRRELEVANT: Final = ("test_", "predict_", "on_test_", "on_predict_", "to_", "load_", "example_", "teardown")
"""Beginnings of names that have no part in training."""

_INSTEAD: Final = {
    "optimizer_step": "Tolaria updates by itself",
    "optimizer_zero_grad": "Tolaria clears gradients by itself",
    "backward": "Tolaria backpropagates by itself: return the loss from training_step",
    "lr_scheduler_step": "set optimizer.policy",
    "configure_gradient_clipping": "set training.clip_norm",
    "clip_gradients": "set training.clip_norm",
    "configure_callbacks": "callbacks are not called",
    "on_save_checkpoint": "keep state in buffers of the module, which checkpoints have",
    "on_load_checkpoint": "keep state in buffers of the module, which checkpoints have",
    "transfer_batch_to_device": "make batches of tensors, tuples, lists and dicts, which Tolaria moves",
    "on_before_batch_transfer": "transform batches in training_step or in the data set",
    "on_after_batch_transfer": "transform batches in training_step or in the data set",
}
_OTHERWISE: Final = "it would not be called: move what it does into training_step, or write a job (tolaria new-job)"


class LightningJob:
    """Trains a `LightningModule`.

    Args:
        context: the argument of the job's factory.
        module: returns the module.
        data: a `LightningDataModule`, or a mapping with the loaders `train` and, optionally, `validation`. None: the
            module's own `train_dataloader` and `val_dataloader`.

    What `training_step` logs with `self.log` are metrics of the step; what `validation_step` logs are metrics of the
    evaluation, averaged by samples. Its loss is what `validation_step` returns, or what it logs as `val_loss`.

    Raises:
        BrokenJobError: names what the module has that is not honoured, and what to do instead.
    """

    def __init__(
        self, context: JobContext, *, module: Callable[[], Any], data: Any | Mapping[str, Iterable[Any]] | None = None
    ) -> None:
        self._context = context
        self._build = module
        self._data = data
        self._module: Any = None
        self._cursor: PlacedCursor | None = None
        self._validation_log: dict[str, float] | None = None

    def build_model(self) -> nn.Module:
        """Returns the module, after `prepare_data`, `setup("fit")` and `configure_model`."""
        module = self._build()
        _refuse_what_is_not_honoured(module)
        module.log, module.log_dict = self._log, self._log_dict
        module.__class__ = _placed(type(module), self)
        owners: tuple[Any, ...] = (self._data, module)
        for owner in owners:
            if hasattr(owner, "prepare_data") and hasattr(owner, "setup"):
                owner.prepare_data()
                owner.setup("fit")
        module.configure_model()
        self._module = module
        return module  # type: ignore[no-any-return] # a module of Lightning is one of torch

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the one optimizer of `configure_optimizers`."""
        return _one_optimizer(model.configure_optimizers())  # type: ignore[operator] # Lightning's

    @property
    def current_epoch(self) -> int:
        """The epoch as Lightning counts it, from 0."""
        return 0 if self._cursor is None else max(0, self._cursor.epoch - 1)

    def training_data(self) -> LoaderCursor:
        """Returns the batches of the training loader, each with its place in the epoch."""
        found = self._loader("train", "train_dataloader")
        if found is None:
            raise BrokenJobError("there is no train_dataloader: give the job data={'train': loader}")
        self._cursor = PlacedCursor(found, seed=self._context.seed)
        return self._cursor

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Returns the loss of `training_step`."""
        payload, place = batch.payload
        self._validation_log = None
        output = _call_step(model.training_step, payload, place)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise BrokenJobError(
                f"training_step returned {_kind(output)}: return a loss, or a dict with 'loss'; batches cannot be "
                "skipped by returning None"
            )
        return {HOST: loss}

    def validation_batches(self) -> Iterable[Batch]:
        """Returns the batches of the validation loader; none if there is no loader or no `validation_step`."""
        loader = self._loader("validation", "val_dataloader")
        if loader is None or not _overrides(self._module, "validation_step"):
            return []
        return LoaderBatches(loader, lambda given, place: (given, place))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Evaluates a batch by `validation_step`."""
        payload, place = batch.payload
        logged: dict[str, float] = {}
        self._validation_log = logged
        try:
            output = _call_step(model.validation_step, payload, place)
        finally:
            self._validation_log = None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            name = next((name for name in _LOSSES if name in logged), None)
            if name is None:
                raise BrokenJobError(
                    f"validation_step returned {_kind(output)} and logged {', '.join(logged) or 'nothing'}: return the "
                    f"loss, or log it as {_LOSSES[0]}"
                )
            loss = logged[name]
        metrics = {f"val_{name}" if name in RESERVED else name: value for name, value in logged.items()}
        return Evaluation(float(loss) * batch.samples, samples=batch.samples, metrics=metrics)

    def _log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Takes the place of `LightningModule.log`; how a Trainer would average and show a value is not used."""
        if not isinstance(value, Tensor | float | int):
            raise BrokenJobError(
                f"self.log({name!r}) of a {type(value).__name__}, which gathers over an epoch, is not honoured: "
                "log the value of the batch"
            )
        if self._validation_log is not None:
            self._validation_log[name] = float(value)
        else:  # every step has a loss of that name
            self._context.log(f"train_{name}" if name in RESERVED else name, value)

    def _log_dict(self, dictionary: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in dictionary.items():
            self._log(name, value)

    def _loader(self, split: str, method: str) -> Any:
        """Returns the loader of a split; None if there is none."""
        data = self._module if self._data is None else self._data
        if isinstance(data, Mapping):
            loader = data.get(split)
        else:
            loader = getattr(data, method)() if _overrides(data, method) else None
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if isinstance(loader, Mapping | list | tuple) or type(loader).__name__ == "CombinedLoader":
            raise BrokenJobError(f"{method} returns several loaders, which are not honoured: combine their data sets")
        return loader


def _placed(kind: type, job: LightningJob) -> type:
    """Returns the class of a module with `current_epoch` as it is, and without a `global_step`, which would be 0."""

    def global_step(_module: object) -> int:
        raise BrokenJobError("self.global_step is not honoured: count in a buffer of the module, or use current_epoch")

    known = {"current_epoch": property(lambda _module: job.current_epoch), "global_step": property(global_step)}
    return type(kind.__name__, (kind,), {**known, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _call_step(step: Any, payload: Any, place: int) -> Any:
    """Calls a step with the batch, and with its place if it takes one."""
    parameters = list(inspect.signature(step).parameters.values())
    several = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    if several or len(parameters) > 1:
        return step(payload, place)
    return step(payload)


def _refuse_what_is_not_honoured(module: Any) -> None:
    """Raises BrokenJobError with everything that a Trainer would call or do and this adapter does not."""
    bases = list(_library_classes(module))
    if not bases or not isinstance(module, nn.Module):
        raise BrokenJobError(f"module must return a LightningModule, got a {type(module).__name__}")
    problems = []
    if not module.automatic_optimization:
        problems.append("automatic_optimization is False (manual optimization): return the loss from training_step")
    if not _overrides(module, "training_step"):
        problems.append("it has no training_step")
    if not _overrides(module, "configure_optimizers"):
        problems.append("it has no configure_optimizers")
    hooks = {name for base in bases for name, value in vars(base).items() if inspect.isfunction(value)}
    concerned = [name for name in sorted(hooks - _HONOURED) if not name.startswith(("_", *_IRRELEVANT))]
    ignored = [name for name in concerned if _overrides(module, name)]
    problems += [f"{name} is not honoured: {_INSTEAD.get(name, _OTHERWISE)}" for name in ignored]
    if problems:
        raise BrokenJobError(f"{type(module).__name__} cannot be trained as it is: {'; '.join(problems)}")


def _library_classes(owner: object) -> Iterator[type]:
    """Yields the classes of Lightning that an object inherits from."""
    for base in type(owner).__mro__:
        if base.__module__.startswith(_PACKAGES):
            yield base


def _overrides(owner: object, name: str) -> bool:
    """Whether an object has its own method of a name, not the one of Lightning."""
    found = getattr(owner, name, None)
    if not callable(found):
        return False
    function = found.__func__ if isinstance(found, MethodType) else found
    return not str(getattr(function, "__module__", "")).startswith((*_PACKAGES, "torch.nn."))


def _one_optimizer(configured: Any) -> torch.optim.Optimizer:
    """Returns the optimizer that was configured. Raises BrokenJobError for several, or a scheduler."""
    schedulers: object = ()
    if isinstance(configured, Mapping):
        configured, schedulers = configured.get("optimizer"), configured.get("lr_scheduler", ())
    elif isinstance(configured, tuple) and len(configured) == 2 and all(isinstance(each, list) for each in configured):
        configured, schedulers = configured
    if isinstance(configured, list | tuple):
        if len(configured) != 1:
            raise BrokenJobError(
                f"configure_optimizers returns {len(configured)} optimizers, of which Tolaria honours one: give one "
                "optimizer several param groups"
            )
        return _one_optimizer(configured[0])
    if schedulers:
        raise BrokenJobError(
            "configure_optimizers returns an lr_scheduler, which is not honoured, since learning rates have one "
            "writer: return the optimizer alone, and set optimizer.policy, optimizer.warmup_steps and so on"
        )
    if not isinstance(configured, torch.optim.Optimizer):
        raise BrokenJobError(f"configure_optimizers returned {_kind(configured)}, not an optimizer")
    return configured


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
