"""What images and exports know of tensors: the codes of dtypes in the safetensors format, and repeated elements."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

DTYPE_CODES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint64: "U64",
        torch.uint32: "U32",
        torch.uint16: "U16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
        torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
    }
)
"""Supported dtypes and their codes in `TensorSpec`."""

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType({code: dtype for dtype, code in DTYPE_CODES.items()})


def whole(tensor: Tensor) -> Tensor:
    """Returns a view of an expanded tensor without its repeated elements; other tensors unchanged."""
    if tensor.layout != torch.strided:
        return tensor
    for dimension, (stride, length) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and length > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
