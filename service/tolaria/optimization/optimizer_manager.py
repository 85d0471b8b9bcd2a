"""`OptimizerManager`: changes which parameters and groups the job's optimizer has, without losing its state."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import RebuildFailedError, UnsuitableOptimizerError
from tolaria.optimization.groups import GroupPlan, ParamGroup, is_dense, name_groups, name_of
from tolaria.optimization.state_transfer import Form, HeldParameter, TransferredState, state_problems, transfer_state
from tolaria.values.optimization import GroupRole, RebuildOutcome, RebuildResult

_NOT_OPTIONS: Final = frozenset({"params", "param_names"})


class OptimizerManager:
    """Holds the job's optimizer, which stays the same object: groups and state are rebuilt in it.

    So it keeps its class, its attributes and hooks, and whatever holds it or its `param_groups`, such as a scheduler of
    learning rates or a wrapper, holds the optimizer in use. A rebuild that fails leaves it as it was, bit for bit.
    `attempted_at_step` is the step of the last attempt, from which the minimum interval counts; it is part of the
    training state.
    """

    def __init__(
        self, optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]], *, min_interval_steps: int
    ) -> None:
        """Takes over an optimizer and names its groups.

        Args:
            optimizer: the optimizer that the job built.
            named_parameters: those of the whole model, including all parameters of the optimizer.
            min_interval_steps: least number of steps between two rebuilds; 0 for no limit.

        Raises:
            UnsuitableOptimizerError: a group has no `lr`, two share a name, or a parameter has no name.
        """
        name_groups(optimizer)
        names = {tensor: name for name, tensor in named_parameters}
        for group in optimizer.param_groups:
            for index, tensor in enumerate(group["params"]):
                if tensor not in names:
                    raise UnsuitableOptimizerError(
                        f"{type(optimizer).__name__}: parameter {index} of group {group['name']!r} is not the model's"
                    )
        self.optimizer: Final = optimizer
        self._held = {
            names[tensor]: HeldParameter(tensor, Form.of(tensor))
            for group in optimizer.param_groups
            for tensor in group["params"]
        }
        self._roles: dict[str, GroupRole] = {name_of(group): GroupRole.HOST for group in optimizer.param_groups}
        self._min_interval_steps = min_interval_steps
        self.attempted_at_step: int | None = None

    def plan(self) -> list[GroupPlan]:
        """Returns the present groups, to be changed and passed to `rebuild`."""
        names = {held.tensor: name for name, held in self._held.items()}
        return [
            GroupPlan(
                name=name_of(group),
                parameters={names[tensor]: tensor for tensor in group["params"]},
                role=self._roles[name_of(group)],
            )
            for group in self.optimizer.param_groups
        ]

    def rebuild(self, groups: Sequence[GroupPlan], at_step: int, *, urgent: bool = False) -> RebuildResult:
        """Gives the optimizer exactly these groups.

        A known group stays the same dict and keeps its options; its parameters are replaced in its list. A known
        parameter keeps its state, fitted to a changed shape; see `transfer_state`. New parameters have the state that
        an optimizer of the same class has before its first step. Synchronises with the device.

        Args:
            groups: all groups, not only those that changed.
            at_step: global step of the step boundary.
            urgent: whether to ignore the minimum interval, as a restore does whose groups differ.

        Raises:
            RebuildFailedError: a stage, which it names, failed; the optimizer is unchanged.
        """
        started_s = time.perf_counter()
        if not urgent and (retry_at_step := self._retry_at(at_step)) is not None:
            return RebuildResult(RebuildOutcome.SKIPPED, at_step, _ms_since(started_s), retry_at_step)
        self.attempted_at_step = at_step
        before = self._held
        with _stage("plan"):
            _check_plan(groups)
        after = {n: HeldParameter(t, Form.of(t)) for group in groups for n, t in group.parameters.items()}
        with _stage("carry"):
            transferred = transfer_state(self.optimizer.state, before, after)
        with _stage("validate"):
            _raise_problems(state_problems(transferred, after))
        with _undone_after_errors(self.optimizer):
            with _stage("build"):
                self._arrange(groups, without_state={*transferred.fresh, *transferred.restarted}, into=transferred)
            with _stage("swap"):
                _replace_state(self.optimizer, transferred, [held.tensor for held in before.values()])
        self._held, self._roles = after, {group.name: group.role for group in groups}
        return RebuildResult(
            RebuildOutcome.REBUILT,
            at_step,
            _ms_since(started_s),
            kept=tuple(transferred.kept),
            transformed=tuple(transferred.transformed),
            fresh=tuple(transferred.fresh),
            restarted=tuple(transferred.restarted),
            dropped=tuple(name for name in before if name not in after),
        )

    def _retry_at(self, at_step: int) -> int | None:
        """Returns the step at which to retry; None if a rebuild may run, as after a rollback to before the last."""
        last = self.attempted_at_step
        if last is None or not 0 <= at_step - last < self._min_interval_steps:
            return None
        return last + self._min_interval_steps

    def _arrange(self, groups: Sequence[GroupPlan], *, without_state: set[str], into: TransferredState) -> None:
        """Changes the groups, and adds the first state of the parameters that have none to `into`."""
        optimizer = self.optimizer
        named = any("param_names" in group for group in optimizer.param_groups)
        known = {name_of(group): group for group in optimizer.param_groups}
        optimizer.param_groups[:] = [known[plan.name] for plan in groups if plan.name in known]
        for plan in groups:
            if (group := known.get(plan.name)) is not None:
                group["params"][:] = plan.parameters.values()
                if named:
                    group["param_names"][:] = plan.parameters
        for plan in groups:
            if plan.name not in known:
                optimizer.add_param_group(_new_group(plan, named=named))
        arranged = {name_of(group): group for group in optimizer.param_groups}
        optimizer.param_groups[:] = [arranged[plan.name] for plan in groups]
        for plan in groups:
            group = arranged[plan.name]
            if plan.name not in known and "fused" in group and not all(map(is_dense, group["params"])):
                group["fused"] = False  # its kernels read and write memory in order
            if new := [tensor for name, tensor in plan.parameters.items() if name in without_state]:
                into.state.update(_first_state(optimizer, group, new))


def _new_group(plan: GroupPlan, *, named: bool) -> ParamGroup:
    parameters: list[Any] = list(plan.parameters.items()) if named else list(plan.parameters.values())
    return {"name": plan.name, "params": parameters}


def _first_state(optimizer: Optimizer, group: ParamGroup, new: list[Tensor]) -> Mapping[Tensor, dict[str, Any]]:
    """Returns the state that the optimizer's class makes for new parameters before its first step.

    Making an optimizer over them is also the only check that it accepts them. A class with arguments that are not among
    its defaults cannot be called here, and must make all state at the first step.
    """
    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    arguments = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    required = [name for name, parameter in accepted.items() if parameter.default is parameter.empty]
    required = [n for n in required if accepted[n].kind not in {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}]
    if len(set(required) - arguments.keys()) > 1:  # besides the parameters
        return {}
    options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
    return kind([{**options, "params": new}], **arguments).state


def _replace_state(optimizer: Optimizer, transferred: TransferredState, before: Iterable[Tensor]) -> None:
    for tensor in before:
        if tensor not in transferred.state and tensor in optimizer.state:
            del optimizer.state[tensor]
    for tensor, entries in transferred.state.items():
        optimizer.state[tensor] = entries


@contextmanager
def _undone_after_errors(optimizer: Optimizer) -> Iterator[None]:
    """Puts groups and state back, in the same objects, if an error occurs inside."""
    groups = [
        (group, dict(group), {k: list(group[k]) for k in _NOT_OPTIONS & group.keys()})
        for group in optimizer.param_groups
    ]
    state = dict(optimizer.state)
    try:
        yield
    except BaseException:
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, options, lists in groups:
            group.clear()
            group.update(options)
            for key, items in lists.items():
                group[key][:] = items
        optimizer.state.clear()
        optimizer.state.update(state)
        raise


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Converts any error inside, since the job's optimizer may raise any, into a `RebuildFailedError` of the stage."""
    try:
        yield
    except RebuildFailedError:
        raise
    except Exception as error:
        raise RebuildFailedError(name, f"{type(error).__name__}: {error}") from error


def _check_plan(groups: Sequence[GroupPlan]) -> None:
    names = [group.name for group in groups]
    parameters = [name for group in groups for name in group.parameters]
    tensors = [tensor for group in groups for tensor in group.parameters.values()]
    problems = [f"group {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"group {group.name!r} without parameters" for group in groups if not group.parameters]
    problems += ["no group at all"] if not groups else []
    if len(set(parameters)) < len(parameters) or len(set(tensors)) < len(tensors):
        problems.append("a parameter in two places")
    _raise_problems(problems)


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems[:8]))


def _ms_since(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1e3
