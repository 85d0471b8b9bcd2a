"""The first look at a job: one whole update, one evaluation, a capture and a restore before training begins.

It finds at the start what would otherwise end the run hours later, and is undone without a trace: at its end the state
has the digest that it had before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Final, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from tolaria.errors import (
    BrokenJobError,
    EmptyDatasetError,
    JobError,
    RollbackError,
    StateMismatchError,
    StateUnsupportedError,
    first_line,
)
from tolaria.images import StateImage
from tolaria.jobs import BatchCursor, LoaderCursor, StatefulJob, TrainingJob
from tolaria.lane.device import on_device
from tolaria.lane.evaluation import METHOD, batches_of, evaluated, sets_of
from tolaria.lane.job_effects import LossesObserved, check_tensors, checked_twice, own_steps_refused, tensors_of
from tolaria.lane.job_output import call, checked_batch
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.share import Share
from tolaria.seeds.slots import observed
from tolaria.state.restore import stage_restore
from tolaria.state.training_state import TrainingState
from tolaria.values.evaluation import Evaluation

T = TypeVar("T")

_Buffers: TypeAlias = list[tuple[nn.Module, dict[str, Tensor | None]]]
"""The buffers of each module by name, the objects themselves."""

_PHASES: Final = {
    "forward": "losses()",
    "backward": "the backward pass of losses()",
    "merge": "merging the gradients of losses()",
    "optimizer": "the optimizer's step()",
}


def first_look(module: TrainModule, state: TrainingState) -> tuple[str, ...]:
    """Trains on the first batch, evaluates one, captures and restores; then everything is as before.

    Costs one step, one copy of the model and one of the whole state, both released at the end. Records in the model's
    slots what they receive.

    Returns:
        Sentences about what works, but probably not as it is meant.

    Raises:
        JobError: names the method or the field that fails, or would fail later.
    """
    built = tensors_of(module.model)
    with _undone(module, state):
        with observed(module.model):
            notes = _update(module)
        check_tensors(module.model, built, "losses")
        _evaluate(module)
        check_tensors(module.model, built, "evaluate")
        _survive(module, state)
    return notes


def materialise(job: TrainingJob, model: nn.Module, cursor: BatchCursor, device: torch.device) -> None:
    """Gives lazy parameters and buffers their shapes, by one forward pass, since optimizers need them.

    Raises BrokenJobError, which names a tensor, if one has no shape even then.
    """
    if not lazy_names(model):
        return
    place = call("training_data", cursor.state_dict)
    call("training_data", lambda: cursor.begin_epoch(1))
    batch = call("training_data", cursor.next_batch)
    if batch is None:
        raise EmptyDatasetError("its training data holds no batch")
    model.eval()  # no dropout, and no statistics of this batch
    with torch.no_grad():
        batch = on_device(checked_batch(batch, "training_data: next_batch()"), device)
        call("losses", lambda: job.losses(model, batch))
    call("training_data", lambda: cursor.load_state_dict(place))
    if names := lazy_names(model):
        raise BrokenJobError(f"{names[0]!r} of its model is lazy, and a forward pass gives it no shape")


@contextmanager
def _undone(module: TrainModule, state: TrainingState) -> Iterator[None]:
    """Restores the whole state at the end, also after an error, and proves it by its digest."""
    before, optimizer = _captured(state), module.optimizer
    entries = {parameter: dict(held) for parameter, held in optimizer.state.items()}
    buffers = [(m, dict(m._buffers)) for m in module.model.modules()]  # noqa: SLF001 - with those that are None
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(entries)
        with suppress(
            RollbackError, BrokenJobError
        ):  # what cannot be saved cannot be put back either; the first error says it
            _undo(module, state, before, buffers)
        raise
    _undo(module, state, before, buffers)
    found, sealed = state.fingerprint(gathered=False), before.seal()
    if found.total != sealed.total:
        names = [name for name, digest in sealed.tensors.items() if found.tensors.get(name) != digest]
        raise BrokenJobError(f"{_where(names[0]) if names else 'its data or state'} is not restored to what it was")


def _undo(module: TrainModule, state: TrainingState, before: StateImage, buffers: _Buffers) -> None:
    module.train_mode()  # first, as the job's own may do more than its name says
    module.clear_gradients()
    module.merger.finish_epoch()
    for owner, tensors in buffers:
        for name, tensor in tensors.items():
            setattr(owner, name, tensor)
    _restore(state, before)
    module.refresh()
    module.forget_steps()
    module.seeds.controller.apply(module.global_step)


def _update(module: TrainModule) -> tuple[str, ...]:
    phase = "training_data: next_batch()"

    def mark(name: str) -> AbstractContextManager[None]:
        return _Phase(name)

    class _Phase:
        """Records which phase of the step has begun."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __enter__(self) -> None:
            nonlocal phase
            phase = _PHASES.get(self._name, phase)

        def __exit__(self, *_error: object) -> None:
            pass

    job, accumulate, module.accumulate = module.job, module.accumulate, 1
    module.job = cast("TrainingJob", LossesObserved(module, accumulate))
    try:
        module.begin_epoch()
        flags = module.flags.now()
        with own_steps_refused(module, lambda: "" if phase == _PHASES["optimizer"] else phase) as notes:
            step = train_step(module, lambda: True, mark)
        notes.update(_once_only(job, flags, module.flags.now()))
        if step is not None and step.skipped:
            phase = _PHASES["optimizer"]
            ill = "losses(): the loss of the first batch, or its gradient, is not finite"
            notes.update([] if step.rescaled else [ill])
            _step_without_gradient(module)
    except JobError:
        raise
    except (Exception, SystemExit) as error:
        if name := _sparse_name(module.model):
            raise BrokenJobError(
                f"parameter {name!r} gets a sparse gradient, which cannot be merged and clipped with the others; "
                "an Embedding has the option sparse=False"
            ) from error
        raise BrokenJobError(f"{phase} raised {type(error).__name__}: {first_line(error)}") from error
    finally:
        module.job, module.accumulate = job, accumulate
    if step is None:
        raise EmptyDatasetError("its training data holds no batch")
    return tuple(sorted(notes))


def _once_only(job: TrainingJob, before: Mapping[str, bool], after: Mapping[str, bool]) -> list[str]:
    """Returns a sentence about a parameter that the first pass has frozen or unfrozen: a job may do so only once."""
    changed = [name for name, on in after.items() if on != before[name]]
    if not changed or isinstance(job, StatefulJob):
        return []
    note = (
        f"losses(): its first pass freezes or unfreezes parameter {changed[0]!r}, which is undone before the run, as "
        "all that the first look does: what a job does only once belongs in build_model()"
    )
    return [note]


def _step_without_gradient(module: TrainModule) -> None:
    """Makes the optimizer's state, when the first batch gave no finite gradient."""
    for parameter in module.parameters:
        parameter.grad = torch.zeros_like(parameter)
    module.optimizer.step()


def _is_used_up(given: object) -> bool:
    """Whether a validation set is an iterator, which is empty once it has been read."""
    if isinstance(given, LoaderCursor):
        return False
    return call("validation_batches", lambda: iter(cast("Iterable[object]", given))) is given


def _evaluate(module: TrainModule) -> None:
    """Evaluates the first batch of each validation set."""
    job = module.job
    sets = call("validation_batches", lambda: sets_of(job))
    module.evaluates = bool(sets)
    for name, given in sets.items():
        if _is_used_up(given) and call("validation_batches", lambda: sets_of(job))[name] is given:
            raise BrokenJobError(
                f"{METHOD} returns the same iterator each time, which is empty from the second evaluation on: "
                "return a list, a DataLoader or a new generator"
            )
        where = f"its validation data {name!r}" if name else "its validation data"
        batches, share = call("validation_batches", lambda: batches_of(given, module.share))  # noqa: B023 - called here
        with closing(batches):
            batch = call("validation_batches", lambda: next(batches, None))  # noqa: B023 - called here
        if batch is None:
            raise EmptyDatasetError(f"{where} holds no batch; for a run without evaluation leave the method out")
        _evaluate_batch(module, batch, share)


def _evaluate_batch(module: TrainModule, given: object, share: Share) -> None:
    if not checked_batch(given, METHOD).samples:
        return

    def evaluate() -> Evaluation:
        module.model.eval()
        return evaluated(module, given, share)

    with torch.no_grad(), own_steps_refused(module, lambda: "evaluate()"), module.seeds.groups_as_built():
        found = call("evaluate", lambda: checked_twice(module, evaluate))
    if (found.correct or 0) > found.samples:
        raise BrokenJobError(
            f"evaluate(): Evaluation.correct is {found.correct}, more than Evaluation.samples, which is "
            f"{found.samples}: both must count the same things, such as images or tokens"
        )


def _survive(module: TrainModule, state: TrainingState) -> None:
    """Captures the state after the update, restores it, and proves by its digest that it is the same."""
    survey = _supported(state.survey)
    if module.loader is None:  # which would start its workers once more
        place = call("training_data: state_dict", module.cursor.state_dict)
        call("training_data: load_state_dict", lambda: module.cursor.load_state_dict(place))
    _supported(survey.json)
    tensors = TrainingState(module, {})
    after = _captured(tensors)
    _restore(tensors, after)
    found = tensors.fingerprint(gathered=False)
    if found.total != after.seal().total:
        differing = [name for name, digest in after.seal().tensors.items() if found.tensors.get(name) != digest]
        raise BrokenJobError(f"{_where(differing[0]) if differing else 'its optimizer'} is not restored exactly")


def _restore(state: TrainingState, image: StateImage) -> None:
    try:
        stage_restore(state, image, verify=True).commit()
    except StateMismatchError as error:
        raise BrokenJobError(f"its state cannot be restored: {'; '.join(map(_where, error.problems[:3]))}") from None


def _captured(state: TrainingState) -> StateImage:
    image = _supported(state.copy)
    image.seal()
    return image


def _supported(capture: Callable[[], T]) -> T:
    try:
        return capture()
    except StateUnsupportedError as error:
        name, detail = error.fields
        raise BrokenJobError(f"its state cannot be saved: {_where(str(name))}: {detail}") from None


def _where(name: str) -> str:
    """Returns a name of the state as its owner knows it."""
    kind, _, rest = name.partition("/")
    first, _, deeper = rest.partition("/")
    match kind:
        case "parts" if first == "cursor":
            return f"training_data: state_dict() field {deeper!r}" if deeper else "training_data: state_dict()"
        case "parts" if deeper:
            return f"{first}: field {deeper!r}"
        case "buffer" | "parameter":
            return f"{kind} {rest!r}"
        case "state":
            return f"the optimizer's state {deeper!r} of parameter {first!r}"
        case _:
            return name


def _sparse_name(model: nn.Module) -> str:
    """Returns the name of a parameter with a sparse gradient; empty if there is none."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            return name
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            return f"{name}.weight" if name else "weight"
    return ""


def lazy_names(model: nn.Module) -> list[str]:
    """Returns the names of parameters and buffers that have no shape yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if torch.nn.parameter.is_lazy(tensor)]
