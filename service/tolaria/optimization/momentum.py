"""How one parameter's optimizer state follows it when its shape, dtype, layout or device changes.

Pure on tensors: returns the very tensor where nothing has to change and a new one otherwise; never writes into its
arguments. Knows nothing of optimizers' classes beyond the names of their state entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN_MOMENTUM_SHARE = 0.1
"""What the grown part of plain momentum takes of the mean. Adaptive moments, divided by each other, take it whole."""

_PLAIN_MOMENTUM = frozenset({"momentum_buffer"})  # SGD, RMSprop, Muon: it moves the parameter undivided
_WEIGHT_AVERAGES = frozenset({"ax"})  # ASGD: an average of the parameter itself, so its grown part is the parameter's
_REDUCED_DIMENSION = {"row_var": -1, "col_var": -2}  # Adafactor: means along one dimension, which is kept at size 1
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})  # of no shape, whatever the parameter's is


@dataclass(frozen=True, slots=True)
class Form:
    """What a parameter was when its state was made."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> Form:
        """The form that a parameter has now."""
        return cls(parameter.shape, parameter.dtype, parameter.device)


def fits(old: Form, parameter: Tensor) -> bool:
    """Whether state can follow at all: it cannot where the number of dimensions changed, or one of them is empty."""
    return len(old.shape) == parameter.dim() and (old.shape == parameter.shape or old.shape.numel() > 0)


def fitted_state(state: Mapping[str, Any], old: Form, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter that had the form `old` and is `parameter` now. Does not synchronise with a device.

    Entries that are no tensors, and tensors of no shape, are carried as they are.

    Raises:
        ValueError: when an entry's shape has nothing to do with the parameter's, or it holds no numbers with a mean.
    """
    return {
        key: fitted(key, value, old, parameter) if _follows(key, value, old) else value for key, value in state.items()
    }


def fitted(key: str, value: Tensor, old: Form, parameter: Tensor) -> Tensor:
    """One entry of that state, as float or complex tensor.

    The part that both shapes share is copied. A dimension that shrinks is cut at its end. One that grows takes the mean
    along it, which keeps second moments from turning negative; for plain momentum a tenth of that mean; for averages of
    the weights the weights themselves.
    """
    shape = _target_shape(key, value, old, parameter)
    dtype = parameter.dtype if value.dtype == old.dtype else value.dtype
    whole = shape == parameter.shape
    if (value.shape, value.dtype, value.device) == (shape, dtype, parameter.device):
        if not whole or value.stride() == parameter.stride():
            return value
    elif not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"state {key!r} of dtype {value.dtype} cannot change its form")
    layout = torch.empty_like(parameter, dtype=dtype, requires_grad=False) if whole else None
    out = torch.empty(shape, dtype=dtype, device=parameter.device) if layout is None else layout
    kept = tuple(slice(0, min(before, after)) for before, after in zip(value.shape, shape, strict=True))
    if value.shape != shape:
        out.copy_(_stretched(key, value[kept], shape) if key not in _WEIGHT_AVERAGES else parameter.detach())
    out[kept].copy_(value[kept])
    return out


def shape_flaw(key: str, value: Any, parameter: Tensor) -> str | None:
    """What is wrong with the place or shape of a parameter's state entry; None when nothing is."""
    if not isinstance(value, Tensor) or key in _COUNTERS or value.dim() != parameter.dim():
        return None
    if value.device != parameter.device:
        return f"is on {value.device}, its parameter on {parameter.device}"
    if any(has not in {1, shall} for has, shall in zip(value.shape, parameter.shape, strict=True)):
        return f"has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
    if (
        value.dtype.is_complex != parameter.dtype.is_complex
        or value.dtype.is_floating_point != parameter.is_floating_point()
    ):
        return f"is of dtype {value.dtype}, its parameter of {parameter.dtype}"
    return None


def _follows(key: str, value: Any, old: Form) -> bool:
    return isinstance(value, Tensor) and key not in _COUNTERS and value.dim() == len(old.shape)


def _target_shape(key: str, value: Tensor, old: Form, parameter: Tensor) -> torch.Size:
    reduced = _REDUCED_DIMENSION[key] % value.dim() if key in _REDUCED_DIMENSION else None
    sizes: list[int] = []
    for dimension, (has, had, shall) in enumerate(zip(value.shape, old.shape, parameter.shape, strict=True)):
        if dimension == reduced or (has == 1 and had != 1):
            sizes.append(has)
        elif has == had:
            sizes.append(shall)
        else:
            raise ValueError(f"state {key!r} of shape {tuple(value.shape)} does not belong to {tuple(old.shape)}")
    return torch.Size(sizes)


def _stretched(key: str, kept: Tensor, shape: torch.Size) -> Tensor:
    """`kept` with the mean along each dimension appended until it has `shape`; for plain momentum all a tenth."""
    stretched = kept
    for dimension, size in enumerate(shape):
        missing = size - stretched.size(dimension)
        if missing > 0:
            mean = stretched.mean(dimension, keepdim=True)
            repeats = [missing if place == dimension else 1 for place in range(stretched.dim())]
            stretched = torch.cat([stretched, mean.repeat(repeats)], dimension)
    return stretched * PLAIN_MOMENTUM_SHARE if key in _PLAIN_MOMENTUM else stretched
