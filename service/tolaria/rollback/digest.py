"""Digests of training state: xxh3_128 of each tensor, and one over all. Owns what is hashed, in which order.

A digest finds accidents (bit rot, aliasing, half writes), not forgeries: xxh3 is no cryptographic hash. It reads at
memory speed (about 18 GB/s a core) and releases the GIL while it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

import torch
import xxhash
from torch import Tensor

from tolaria.errors import StateUnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

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
        torch.uint8: "U8",
        torch.bool: "BOOL",
        torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
    }
)
"""The dtypes that state may have, and their names in safetensors files."""

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType({code: dtype for dtype, code in DTYPE_CODES.items()})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor looks like without its content; `dtype` is a code of `DTYPE_CODES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its content, packed."""
        count = 1
        for length in self.shape:
            count *= length
        return count * DTYPES[self.dtype].itemsize

    def hasher(self) -> xxhash.xxh3_128:
        """A digest that knows name, dtype and shape already, and waits for the bytes in C order."""
        return xxhash.xxh3_128(f"{self.name}\n{self.dtype}\n{self.shape}\n".encode())


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a whole state, in hex: of each tensor by name, of everything else, and one over both."""

    tensors: Mapping[str, str]
    values: str
    total: str


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The tensor's spec.

    Raises:
        StateUnsupportedError: for a layout or dtype that has no packed form.
    """
    if tensor.layout != torch.strided:
        raise StateUnsupportedError(name, f"a tensor of layout {tensor.layout} has no packed form")
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise StateUnsupportedError(name, f"dtype {tensor.dtype} is not among those that can be kept")
    return TensorSpec(name, code, tuple(tensor.shape))


def packed_bytes(tensor: Tensor) -> memoryview:
    """The content in C order, on the CPU; a view where that is what the tensor is, else a copy. Synchronises."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(cast("Buffer", flat.view(torch.uint8).numpy()))


def tensor_digest(name: str, tensor: Tensor) -> str:
    """xxh3_128 over name, dtype, shape and content. Synchronises with the tensor's device."""
    hasher = spec_of(name, tensor).hasher()
    hasher.update(packed_bytes(tensor))
    return hasher.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], values: bytes) -> Fingerprint:
    """Digests of a state given as tensors and the canonical JSON of the rest. Synchronises."""
    return combine({name: tensor_digest(name, tensor) for name, tensor in tensors.items()}, values)


def combine(tensor_digests: Mapping[str, str], values: bytes) -> Fingerprint:
    """One fingerprint from the tensors' digests, in the order of their names, and the canonical JSON of the rest."""
    rest = xxhash.xxh3_128_hexdigest(values)
    ordered = {name: tensor_digests[name] for name in sorted(tensor_digests)}
    lines = "".join(f"{digest} {name}\n" for name, digest in ordered.items())
    return Fingerprint(MappingProxyType(ordered), rest, xxhash.xxh3_128_hexdigest(f"{lines}{rest}\n".encode()))
