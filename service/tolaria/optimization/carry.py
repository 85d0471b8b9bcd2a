"""Carrying an optimizer's state over into another one, by parameter name, and proving that it arrived well.

Works on two optimizers side by side and writes into neither: it returns the state that the new one shall have. What
did not change is carried by reference, so a rebuild needs no second copy of the state. Knows nothing of when and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from tolaria.optimization.groups import ParamGroup
from tolaria.optimization.momentum import Form, fits, fitted_state, shape_flaw

Build = Callable[[list[ParamGroup]], Optimizer]
"""Makes an optimizer over these groups, whose options are kept."""

_LABELS = frozenset({"params", "param_names", "name", "lr", "initial_lr"})  # what state does not depend on


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A parameter that an optimizer holds: the tensor, its form when its state was made, its group's options."""

    tensor: Tensor
    form: Form
    group: ParamGroup


@dataclass(slots=True, eq=False)
class Carried:
    """State for a new optimizer, and the parameters' names by what became of theirs."""

    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)


def held_by(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Held]:
    """The optimizer's parameters by name, in its order.

    Raises:
        KeyError: when one has no name.
    """
    return {
        names[tensor]: Held(tensor, Form.of(tensor), group)
        for group in optimizer.param_groups
        for tensor in group["params"]
    }


def carry(
    old: Optimizer, before: Mapping[str, Held], new: Optimizer, after: Mapping[str, Held], build: Build
) -> Carried:
    """The state that `new` shall have.

    A parameter whose name is new starts clean. One that kept its name keeps its state, fitted to its present form.
    Where class or options changed, a trial step on a parameter of one element shows which entries the state must have;
    if the old state has not just these, or the number of dimensions changed, the parameter starts over.

    Raises:
        ValueError: when an entry cannot be fitted.
    """
    if isinstance(old, LBFGS) or isinstance(new, LBFGS):
        return _carry_lbfgs(old, before, new, after)
    carried = Carried()
    trials: dict[tuple[int, int], dict[str, Any]] = {}
    for name, now in after.items():
        if name not in before:
            carried.fresh.append(name)
            continue
        had = before[name]
        state: Mapping[str, Any] = old.state.get(had.tensor, {})
        needed = None
        if state and _state_may_differ(old, had, new, now):
            key = (id(now.group), now.tensor.dim())
            needed = trials[key] if key in trials else trials.setdefault(key, _trial(build, now))
        _carry_one(name, state, (had, now), needed, carried)
    return carried


def flaws(carried: Carried, after: Mapping[str, Held]) -> list[str]:
    """What is wrong with the state, one line for each flaw. Synchronises once with each device.

    Every number must be finite. Transformed entries must have their parameter's shape, or part of it, and its device.
    """
    found: list[str] = []
    for name in carried.transformed:
        parameter = after[name].tensor
        for key, value in carried.state[parameter].items():
            flaw = shape_flaw(key, value, parameter)
            if flaw is not None:
                found.append(f"{name}: {key} {flaw}")
    labels, tensors = [], []
    for name, held in after.items():
        for key, tensor in _tensors(carried.state.get(held.tensor, {})):
            labels.append(f"{name}: {key}")
            tensors.append(tensor)
    return found + [
        f"{label} is not finite" for label, fine in zip(labels, all_finite(tensors), strict=True) if not fine
    ]


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """For each tensor whether it holds finite numbers only.

    A sum tells at the speed of reading; where one is not finite, which may be overflow, all elements are looked at.
    """
    if not tensors:
        return []
    sums = [tensor.detach().sum() for tensor in tensors]
    return [
        bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
        for total, tensor in zip(_on_host(sums), tensors, strict=True)
    ]


def _carry_one(
    name: str, state: Mapping[str, Any], held: tuple[Held, Held], needed: Mapping[str, Any] | None, carried: Carried
) -> None:
    had, now = held
    if not fits(had.form, now.tensor) or (needed is not None and set(needed) != set(state)):
        carried.restarted.append(name)
        return
    unchanged = now.tensor is had.tensor and Form.of(now.tensor) == had.form
    follows = dict(state) if unchanged else fitted_state(state, had.form, now.tensor)
    if needed is not None:
        follows = {key: _placed_like(needed[key], value) for key, value in follows.items()}
    if follows:
        carried.state[now.tensor] = follows
    same = all(follows[key] is value for key, value in state.items())
    (carried.kept if same else carried.transformed).append(name)


def _carry_lbfgs(old: Optimizer, before: Mapping[str, Held], new: Optimizer, after: Mapping[str, Held]) -> Carried:
    """LBFGS keeps one state, of all parameters laid end to end, at its first one; only the same layout can use it."""
    carried = Carried(fresh=[name for name in after if name not in before])
    survivors = [name for name in after if name in before]
    same_layout = [(name, held.form) for name, held in before.items()] == [
        (name, Form.of(held.tensor)) for name, held in after.items()
    ]
    first, now_first = next(iter(before.values())), next(iter(after.values()))
    if type(old) is not type(new) or not same_layout or _options_differ(first.group, now_first.group):
        carried.restarted = survivors
        return carried
    carried.kept = survivors
    state: Mapping[str, Any] = old.state.get(first.tensor, {})
    if state:
        carried.state[now_first.tensor] = dict(state)
    return carried


def _state_may_differ(old: Optimizer, had: Held, new: Optimizer, now: Held) -> bool:
    moved = had.form.device != now.tensor.device
    return moved or type(old) is not type(new) or _options_differ(had.group, now.group)


def _options_differ(one: ParamGroup, other: ParamGroup) -> bool:
    keys = (one.keys() | other.keys()) - _LABELS
    return any(not _same(one.get(key), other.get(key)) for key in keys)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other  # comparing values would wait for the device
    return bool(one == other)


def _trial(build: Build, held: Held) -> dict[str, Any]:
    """The state after one step of such a group on one element whose gradient is 0."""
    scratch = torch.zeros([1] * held.tensor.dim(), dtype=held.tensor.dtype, device=held.tensor.device)
    scratch.requires_grad_()
    scratch.grad = torch.zeros_like(scratch)
    options = {key: value for key, value in held.group.items() if key not in {"params", "param_names"}}
    trial = build([{**options, "params": [scratch]}])
    trial.step()
    return dict(trial.state.get(scratch, {}))


def _placed_like(needed: Any, value: Any) -> Any:
    """Counters live on the host or on the device depending on options such as `capturable`."""
    if isinstance(needed, Tensor) and isinstance(value, Tensor) and needed.dim() == 0:
        return value.to(device=needed.device, dtype=needed.dtype)
    return value


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of numbers in a state, in lists too."""
    for key, value in state.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()):
                yield key, item


def _on_host(scalars: Iterable[Tensor]) -> list[Tensor]:
    """Scalars in their order, brought over with one transfer for each device and dtype."""
    listed = list(scalars)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, scalar in enumerate(listed):
        places.setdefault((scalar.device, scalar.dtype), []).append(place)
    for group in places.values():
        for place, scalar in zip(group, torch.stack([listed[place] for place in group]).cpu(), strict=True):
            listed[place] = scalar
    return listed
