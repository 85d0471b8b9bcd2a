"""`OptimizerManager`: rebuilds the optimizer when parameters come, go or change shape, or its class or options change.

Owns which optimizer is live. Everything is built aside and validated, then swapped in by plain assignments; whatever
fails before leaves the old one as it was, bit for bit. Knows nothing of learning-rate policies, commands or metrics: it
returns data. Belongs to the compute lane's thread, at a fence.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import RebuildFailedError, UnsuitableOptimizerError
from tolaria.optimization.carry import Build, carry, flaws, held_by
from tolaria.optimization.groups import GroupPlan, ParamGroup, name_groups, name_of
from tolaria.values.optimization import GroupRole, RebuildOutcome, RebuildResult


class OptimizerManager:
    """Holds the live optimizer and puts another one in its place on demand. Nobody else keeps a reference to it.

    `attempted_at_step` is what the storm guard counts from: part of the training state, as rebuilds depend on it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        min_interval_steps: int,
        build: Build | None = None,
    ) -> None:
        """Take over an optimizer; its groups get names where they have none.

        Args:
            optimizer: as the job made it.
            named_parameters: of the whole model; every parameter of the optimizer must be among them.
            min_interval_steps: storm guard: least number of steps between two attempts; 0 for none.
            build: makes an optimizer of this kind over given groups. None: its class, with its defaults as keywords.

        Raises:
            UnsuitableOptimizerError: when a group has no `lr`, two share a name, or a parameter has no name.
        """
        name_groups(optimizer)
        names = {tensor: name for name, tensor in named_parameters}
        for group in optimizer.param_groups:
            for place, tensor in enumerate(group["params"]):
                if tensor not in names:
                    raise UnsuitableOptimizerError(
                        f"{type(optimizer).__name__}: parameter {place} of group {group['name']!r} is not the model's"
                    )
        self._optimizer = optimizer
        self._held = held_by(optimizer, names)
        self._roles: dict[str, GroupRole] = {name_of(group): GroupRole.HOST for group in optimizer.param_groups}
        self._min_interval_steps = min_interval_steps
        self.attempted_at_step: int | None = None
        self._build = build

    @property
    def optimizer(self) -> Optimizer:
        """The live one; ask again after every fence."""
        return self._optimizer

    def plan(self) -> list[GroupPlan]:
        """The present groups, to be extended, shortened or changed and given to `rebuild`."""
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
        """Put an optimizer over exactly these groups in the live one's place.

        A group that exists keeps its options in full, under those of the plan. A parameter that was there before under
        the same name keeps its state, fitted where its shape changed; see `carry`. Step hooks stay registered.
        Synchronises with the device. The retired one shares state tensors with the new one and must not step.

        Args:
            groups: all of them, not only what changed.
            at_step: global step of the fence.
            urgent: pass the storm guard, as a restore must whose groups differ.
            change_to: makes an optimizer of another class or with other defaults; its groups come with parameters,
                name, `lr` and the plan's options, and take the rest from the new one.

        Raises:
            RebuildFailedError: with the stage at which it failed; the old optimizer is live and unchanged.
        """
        started_s = time.perf_counter()
        if not urgent and (retry_at_step := self._too_soon(at_step)) is not None:
            return RebuildResult(RebuildOutcome.SKIPPED, at_step, _since_ms(started_s), retry_at_step)
        self.attempted_at_step = at_step
        old, before = self._optimizer, self._held
        with _Stage("plan"):
            _check_plan(groups)
            wanted = [self._as_param_group(group, bare=change_to is not None) for group in groups]
        with _Stage("build"):
            build = change_to or self._build or _same_kind(old)
            new = build(wanted)
        with _Stage("carry"):
            after = held_by(new, {tensor: name for group in groups for name, tensor in group.parameters.items()})
            carried = carry(old, before, new, after, build)
        with _Stage("validate"):
            _check_built(new, groups)
            _refuse(flaws(carried, after))
        with _Stage("swap"):
            new.state.update(carried.state)
            # The same hook tables, so that handles which callers got for removing their hooks go on working.
            vars(new).update({key: value for key, value in vars(old).items() if key.endswith("_hooks")})
            roles = {group.name: group.role for group in groups}
        self._optimizer, self._held, self._roles = new, after, roles
        self._build = change_to or self._build
        return RebuildResult(
            RebuildOutcome.REBUILT,
            at_step,
            _since_ms(started_s),
            kept=tuple(carried.kept),
            transformed=tuple(carried.transformed),
            fresh=tuple(carried.fresh),
            restarted=tuple(carried.restarted),
            dropped=tuple(name for name in before if name not in after),
        )

    def _too_soon(self, at_step: int) -> int | None:
        """The step to try again at, if the last attempt was too recent. A rollback to before it clears the guard."""
        last = self.attempted_at_step
        if last is None or not 0 <= at_step - last < self._min_interval_steps:
            return None
        return last + self._min_interval_steps

    def _as_param_group(self, plan: GroupPlan, *, bare: bool) -> ParamGroup:
        present = next((group for group in self._optimizer.param_groups if name_of(group) == plan.name), {})
        options = {key: value for key, value in present.items() if key not in {"params", "param_names"}}
        if bare:
            options = {key: value for key, value in options.items() if key == "lr"}
        named = any("param_names" in group for group in self._optimizer.param_groups)
        parameters: list[Any] = list(plan.parameters.items()) if named else list(plan.parameters.values())
        return {**options, **plan.options, "name": plan.name, "params": parameters}


class _Stage:
    """Turns any failure inside into a `RebuildFailedError` of that stage: a foreign optimizer may raise anything."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, RebuildFailedError):
            raise RebuildFailedError(self._name, f"{type(error).__name__}: {error}") from error


def _check_plan(groups: Sequence[GroupPlan]) -> None:
    names = [group.name for group in groups]
    parameters = [name for group in groups for name in group.parameters]
    tensors = [tensor for group in groups for tensor in group.parameters.values()]
    problems = [f"group {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"group {group.name!r} without parameters" for group in groups if not group.parameters]
    problems += ["no group at all"] if not groups else []
    if len(set(parameters)) < len(parameters) or len(set(tensors)) < len(tensors):
        problems.append("a parameter in two places")
    _refuse(problems)


def _check_built(new: Optimizer, groups: Sequence[GroupPlan]) -> None:
    """The builder must have kept groups, names, order and rates; a fresh optimizer has no state."""
    if [group.get("name") for group in new.param_groups] != [group.name for group in groups]:
        raise ValueError("the new optimizer's groups are not those asked for")
    for built, plan in zip(new.param_groups, groups, strict=True):
        same = len(built["params"]) == len(plan.parameters) and all(
            one is other for one, other in zip(built["params"], plan.parameters.values(), strict=True)
        )
        if not same or "lr" not in built:
            raise ValueError(f"group {plan.name!r} of the new optimizer lacks its lr or some of its parameters")


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems[:8]))


def _same_kind(like: Optimizer) -> Build:
    """Its class, with those of its defaults as keywords that its constructor takes."""
    accepted = inspect.signature(type(like)).parameters
    keywords = {key: value for key, value in like.defaults.items() if key in accepted}

    def build(groups: list[ParamGroup]) -> Optimizer:
        return type(like)(groups, **keywords)

    return build


def _since_ms(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1e3
