"""Gradients as one flat vector, and the layout of parameters in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tolaria.errors import GradientMismatchError, NoGradientsError


def grads_to_flat(grads: Iterable[Tensor]) -> tuple[Tensor, tuple[torch.Size, ...]]:
    """Concatenates gradients of any shapes, scalars included, all of one dtype and device.

    Returns:
        A new vector of shape (total elements,) in their dtype, on their device, and the shapes for `flat_to_grads`.
        Does not synchronise.

    Raises:
        NoGradientsError: there are no tensors, or none has an element.
        GradientMismatchError: one differs from the first in dtype or device.
    """
    tensors = [grad.detach() for grad in grads]
    if sum(tensor.numel() for tensor in tensors) == 0:
        raise NoGradientsError
    for index, tensor in enumerate(tensors):
        check_same_kind(index, tensor, tensors[0])
    return torch.cat([tensor.reshape(-1) for tensor in tensors]), tuple(tensor.shape for tensor in tensors)


def flat_to_grads(flat: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Splits a vector of shape (total elements,) into views of the given shapes; the inverse of `grads_to_flat`.

    Raises:
        NoGradientsError: there are no shapes, or `flat` is empty.
        GradientMismatchError: `flat` is not a vector, or the shapes need another number of elements; the index is
            that of the first shape that `flat` cannot fill, or the number of shapes when elements are left over.
    """
    if not shapes or flat.numel() == 0:
        raise NoGradientsError
    if flat.dim() != 1:
        raise GradientMismatchError(0, f"a flat gradient has one dimension, not {flat.dim()}")
    sizes = [torch.Size(shape).numel() for shape in shapes]
    ends = list(accumulate(sizes))
    if ends[-1] != flat.numel():
        index = next((index for index, end in enumerate(ends) if end > flat.numel()), len(sizes))
        raise GradientMismatchError(index, f"the shapes have {ends[-1]} elements, the flat vector has {flat.numel()}")
    pieces = torch.split(flat, sizes)
    return tuple(piece.view(torch.Size(shape)) for piece, shape in zip(pieces, shapes, strict=True))


def laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Returns the gradient in the dtype and with the strides of its parameter, as autograd does; a copy if it differs.

    Fused optimizers on a CPU walk raw memory, and corrupt parameters whose gradients have another layout.
    """
    if gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype:
        return gradient
    with torch.no_grad():
        return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(gradient)


def check_same_kind(index: int, tensor: Tensor, first: Tensor) -> None:
    """Raises GradientMismatchError unless the tensor is real and has the dtype and device of the first one."""
    if not tensor.is_floating_point():
        raise GradientMismatchError(index, f"dtype {tensor.dtype} is not a real floating-point type")
    if tensor.dtype != first.dtype:
        raise GradientMismatchError(index, f"dtype {tensor.dtype}, but gradient 0 has {first.dtype}")
    if tensor.device != first.device:
        raise GradientMismatchError(index, f"device {tensor.device}, but gradient 0 is on {first.device}")


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The names and shapes of the parameters in a flat gradient, in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> FlatLayout:
        """Returns the layout of named parameters, as from `Module.named_parameters()`."""
        pairs = tuple(named)
        return cls(tuple(name for name, _ in pairs), tuple(tensor.shape for _, tensor in pairs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def numel(self) -> int:
        """The length of the flat vector."""
        return sum(self.sizes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The module of each parameter: its name without the last part; a name without a dot is its own layer."""
        return tuple(name.rpartition(".")[0] or name for name in self.names)
