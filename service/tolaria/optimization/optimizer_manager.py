"""`OptimizerManager`: rebuilds the optimizer when its parameters, class or options change, without losing state."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import RebuildFailedError, UnsuitableOptimizerError
from tolaria.optimization.groups import GroupPlan, ParamGroup, name_groups, name_of
from tolaria.optimization.state_transfer import Build, held_by, state_problems, transfer_state
from tolaria.values.optimization import GroupRole, RebuildOutcome, RebuildResult


class OptimizerManager:
    """Holds the optimizer, and replaces it by a new one that is built and validated first.

    A rebuild that fails leaves the present optimizer unchanged, bit for bit. `attempted_at_step` is the step of the
    last attempt, from which the minimum interval counts; it is part of the training state.
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
        self._optimizer = optimizer
        self._held = held_by(optimizer, names)
        self._roles: dict[str, GroupRole] = {name_of(group): GroupRole.HOST for group in optimizer.param_groups}
        self._min_interval_steps = min_interval_steps
        self._build: Build | None = None
        self.attempted_at_step: int | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The present optimizer; a rebuild replaces it."""
        return self._optimizer

    def plan(self) -> list[GroupPlan]:
        """Returns the present groups, to be changed and passed to `rebuild`."""
        names = {held.tensor: name for name, held in self._held.items()}
        return [
            GroupPlan(
                name=name_of(group),
                parameters={names[tensor]: tensor for tensor in group["params"]},
                role=self._roles[name_of(group)],
            )
            for group in self._optimizer.param_groups
        ]

    def rebuild(
        self, groups: Sequence[GroupPlan], at_step: int, *, urgent: bool = False, change_to: Build | None = None
    ) -> RebuildResult:
        """Replaces the optimizer by one over exactly these groups.

        A known group keeps its options, overridden by those of the plan. A known parameter keeps its state, fitted to
        a changed shape; see `transfer_state`. Step hooks stay registered. Synchronises with the device. The old
        optimizer shares state tensors with the new one and must not step again.

        Args:
            groups: all groups, not only those that changed.
            at_step: global step of the step boundary.
            urgent: whether to ignore the minimum interval, as a restore does whose groups differ.
            change_to: makes an optimizer of another class or with other defaults. Its groups are passed parameters,
                name, `lr` and the plan's options, and take the other options from the new defaults.

        Raises:
            RebuildFailedError: a stage, which it names, failed; the present optimizer is unchanged.
        """
        started_s = time.perf_counter()
        if not urgent and (retry_at_step := self._retry_at(at_step)) is not None:
            return RebuildResult(RebuildOutcome.SKIPPED, at_step, _ms_since(started_s), retry_at_step)
        self.attempted_at_step = at_step
        old, before = self._optimizer, self._held
        with _stage("plan"):
            _check_plan(groups)
            wanted = [self._as_param_group(group, lr_only=change_to is not None) for group in groups]
        with _stage("build"):
            build = change_to or self._build or _same_kind(old)
            new = build(wanted)
        with _stage("carry"):
            after = held_by(new, {tensor: name for group in groups for name, tensor in group.parameters.items()})
            transferred = transfer_state(old, before, new, after, build)
        with _stage("validate"):
            _check_built(new, groups)
            _raise_problems(state_problems(transferred, after))
        with _stage("swap"):
            new.state.update(transferred.state)
            # The same hook tables, so that the handles for removing hooks stay valid.
            vars(new).update({key: value for key, value in vars(old).items() if key.endswith("_hooks")})
            roles = {group.name: group.role for group in groups}
        self._optimizer, self._held, self._roles = new, after, roles
        self._build = change_to or self._build
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

    def _as_param_group(self, plan: GroupPlan, *, lr_only: bool) -> ParamGroup:
        groups = self._optimizer.param_groups
        present = next((group for group in groups if name_of(group) == plan.name), {})
        keys = {"lr"} if lr_only else present.keys() - {"params", "param_names"}
        options = {key: value for key, value in present.items() if key in keys}
        named = any("param_names" in group for group in groups)
        parameters: list[Any] = list(plan.parameters.items()) if named else list(plan.parameters.values())
        return {**options, **plan.options, "name": plan.name, "params": parameters}


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


def _check_built(new: Optimizer, groups: Sequence[GroupPlan]) -> None:
    """Checks that the new optimizer has the groups, parameters, order and rates of the plan."""
    if [group.get("name") for group in new.param_groups] != [group.name for group in groups]:
        raise ValueError("the new optimizer does not have the planned groups")
    for built, plan in zip(new.param_groups, groups, strict=True):
        if "lr" not in built or list(map(id, built["params"])) != list(map(id, plan.parameters.values())):
            raise ValueError(f"group {plan.name!r} of the new optimizer lacks its lr or some of its parameters")


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems[:8]))


def _same_kind(like: Optimizer) -> Build:
    """Returns a builder of its class, with those of its defaults that the constructor takes as keywords."""
    accepted = inspect.signature(type(like)).parameters
    return partial(type(like), **{key: value for key, value in like.defaults.items() if key in accepted})


def _ms_since(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1e3
