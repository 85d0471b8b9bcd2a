"""Transfers an optimizer's state to changed parameters, by name, fitted where their form changed.

The arguments are not modified. State that did not change is passed by reference, so that a rebuild needs no second
copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from tolaria.shards import local_parts, on_all_parts

PLAIN_MOMENTUM_SHARE: Final = 0.1
"""Factor of the mean with which plain momentum is extended. Adaptive moments take the whole mean."""

_PLAIN_MOMENTUM = frozenset({"momentum_buffer"})  # SGD, RMSprop, Muon: it moves the parameter undivided
_WEIGHT_AVERAGES = frozenset({"ax"})  # ASGD: an average of the parameter, so it is extended with the parameter itself
_REDUCED_DIMENSION = {"row_var": -1, "col_var": -2}  # Adafactor: means along one dimension, which is kept at size 1
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})  # scalars, whatever the parameter's shape is


@dataclass(frozen=True, slots=True)
class Form:
    """The shape, dtype and device of a parameter."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> Form:
        """Returns the present form of a parameter."""
        return cls(parameter.shape, parameter.dtype, parameter.device)


@dataclass(frozen=True, slots=True, eq=False)
class HeldParameter:
    """A parameter of an optimizer: the tensor, and its form when its state was made."""

    tensor: Tensor
    form: Form


@dataclass(slots=True, eq=False)
class TransferredState:
    """The new state by parameter, and the names of the parameters by the way their state was transferred."""

    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)


def transfer_state(
    state: Mapping[Tensor, Mapping[str, Any]], before: Mapping[str, HeldParameter], after: Mapping[str, HeldParameter]
) -> TransferredState:
    """Returns the state for the parameters `after` from that of the parameters `before`.

    A parameter with a new name has no state. One with a known name keeps its state, fitted to its present form; if the
    number of dimensions changed, it restarts without state.

    Raises:
        ValueError: an entry cannot be fitted.
    """
    transferred = TransferredState()
    for name, now in after.items():
        if name not in before:
            transferred.fresh.append(name)
            continue
        had = before[name]
        entries = state.get(had.tensor, {})
        if not can_fit(had.form, now.tensor):
            transferred.restarted.append(name)
            continue
        unchanged = now.tensor is had.tensor and Form.of(now.tensor) == had.form
        fitted = dict(entries) if unchanged else fit_state(entries, had.form, now.tensor)
        if fitted:
            transferred.state[now.tensor] = fitted
        same = all(fitted[key] is value for key, value in entries.items())
        (transferred.kept if same else transferred.transformed).append(name)
    return transferred


def state_problems(transferred: TransferredState, after: Mapping[str, HeldParameter]) -> list[str]:
    """Returns one line for each problem of the state. Synchronises once with each device.

    Every number must be finite. Transformed entries must have their parameter's shape, or 1 in some dimensions, and
    its device.
    """
    found: list[str] = []
    for name in transferred.transformed:
        parameter = after[name].tensor
        for key, value in transferred.state[parameter].items():
            if problem := _entry_problem(key, value, parameter):
                found.append(f"{name}: {key} {problem}")
    tensors = [
        (f"{name}: {key}", tensor)
        for name, held in after.items()
        for key, tensor in _tensors(transferred.state.get(held.tensor, {}))
    ]
    finite = _all_finite([tensor for _, tensor in tensors])
    return found + [f"{label} is not finite" for (label, _), ok in zip(tensors, finite, strict=True) if not ok]


def can_fit(old: Form, parameter: Tensor) -> bool:
    """Whether state can be fitted: not if the number of dimensions changed, or an empty parameter changed its shape."""
    return len(old.shape) == parameter.dim() and (old.shape == parameter.shape or old.shape.numel() > 0)


def fit_state(state: Mapping[str, Any], old: Form, parameter: Tensor) -> dict[str, Any]:
    """Returns the state of a parameter that had the form `old`, fitted to its present form. Does not synchronise.

    Counters, scalars and entries that are not tensors are passed unchanged.

    Raises:
        ValueError: an entry's shape is unrelated to the parameter's, or its dtype has no mean.
    """
    return {
        key: fit_entry(key, value, old, parameter)
        if isinstance(value, Tensor) and key not in _COUNTERS and value.dim() == len(old.shape)
        else value
        for key, value in state.items()
    }


def fit_entry(key: str, value: Tensor, old: Form, parameter: Tensor) -> Tensor:
    """Returns one entry, fitted to the present form of the parameter; the same tensor if nothing changes.

    The part that both shapes share is copied. A dimension that shrinks is cut at its end. One that grows takes the
    mean along it, which keeps second moments from becoming negative; for plain momentum a tenth of that mean; for
    averages of the weights the weights themselves.
    """
    shape = _target_shape(key, value, old, parameter)
    dtype = parameter.dtype if value.dtype == old.dtype else value.dtype
    whole = shape == parameter.shape
    if (value.shape, value.dtype, value.device) == (shape, dtype, parameter.device):
        if not whole or value.stride() == parameter.stride():
            return value
    elif not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"state {key!r} of dtype {value.dtype} cannot change its form")
    if whole:
        out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    else:
        out = torch.empty(shape, dtype=dtype, device=parameter.device)
    kept = tuple(slice(0, min(before, after)) for before, after in zip(value.shape, shape, strict=True))
    if value.shape != shape:
        out.copy_(_extended(key, value[kept], shape) if key not in _WEIGHT_AVERAGES else parameter.detach())
    out[kept].copy_(value[kept])
    return out


def _target_shape(key: str, value: Tensor, old: Form, parameter: Tensor) -> torch.Size:
    reduced = _REDUCED_DIMENSION[key] % value.dim() if key in _REDUCED_DIMENSION else None
    sizes: list[int] = []
    for dimension, (has, had, wanted) in enumerate(zip(value.shape, old.shape, parameter.shape, strict=True)):
        if dimension == reduced or (has == 1 and had != 1):
            sizes.append(has)
        elif has == had:
            sizes.append(wanted)
        else:
            raise ValueError(f"state {key!r} of shape {tuple(value.shape)} does not belong to {tuple(old.shape)}")
    return torch.Size(sizes)


def _extended(key: str, kept: Tensor, shape: torch.Size) -> Tensor:
    """Returns `kept` with the mean along each dimension appended up to `shape`, scaled for plain momentum."""
    extended = kept
    for dimension, size in enumerate(shape):
        missing = size - extended.size(dimension)
        if missing > 0:
            mean = extended.mean(dimension, keepdim=True)
            repeats = [missing if each == dimension else 1 for each in range(extended.dim())]
            extended = torch.cat([extended, mean.repeat(repeats)], dimension)
    return extended * PLAIN_MOMENTUM_SHARE if key in _PLAIN_MOMENTUM else extended


def _entry_problem(key: str, value: Any, parameter: Tensor) -> str | None:
    """Returns what is wrong with the device, shape or dtype of an entry."""
    if not isinstance(value, Tensor) or key in _COUNTERS or value.dim() != parameter.dim():
        return None
    if value.device != parameter.device:
        return f"is on {value.device}, its parameter on {parameter.device}"
    if any(has not in {1, wanted} for has, wanted in zip(value.shape, parameter.shape, strict=True)):
        return f"has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
    kinds = [(tensor.dtype.is_complex, tensor.is_floating_point()) for tensor in (value, parameter)]
    return None if kinds[0] == kinds[1] else f"is of dtype {value.dtype}, its parameter of {parameter.dtype}"


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields the floating-point and complex tensors of a state, also those in lists."""
    for key, value in state.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()):
                yield key, item


def _all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Returns for each tensor whether all its numbers are finite, on all ranks alike. Synchronises with each device.

    A sum is as fast as reading; only where it is not finite, which may be an overflow, all elements are checked.
    """
    finite, parts = [False] * len(tensors), local_parts(tensors)
    for device in {part.device for part in parts}:
        indices = [index for index, part in enumerate(parts) if part.device == device]
        sums = torch.stack([parts[index].detach().sum().isfinite() for index in indices]).tolist()
        for index, sum_is_finite in zip(indices, sums, strict=True):
            finite[index] = sum_is_finite or bool(parts[index].isfinite().all())
    return on_all_parts(finite, tensors)
