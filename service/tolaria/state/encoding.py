"""Conversions between live objects and images: tensors, nested Python values, random number generators.

Nested values become JSON. Keys that start with `$` mark what JSON lacks: tuples, tensors and non-finite floats.
"""

from __future__ import annotations

import array
import math
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from tolaria.errors import StateUnsupportedError
from tolaria.images import TensorSpec
from tolaria.tensors import DTYPE_CODES, DTYPES

if TYPE_CHECKING:
    from typing_extensions import Buffer

PutTensor: TypeAlias = Callable[[str, Tensor], JsonValue]
"""Stores a tensor under a name and returns its JSON reference."""

TakeTensor: TypeAlias = Callable[[Mapping[str, JsonValue]], Tensor]
"""Returns the tensor of a JSON reference."""

TENSOR_KEY: Final = "$tensor"
_TUPLE_KEY: Final = "$tuple"
_FLOAT_KEY: Final = "$float"

_TORCH: Final = "rng/torch"
_NUMPY: Final = "rng/numpy"
_PYTHON: Final = "rng/python"


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Returns the tensor's spec. Raises StateUnsupportedError if its layout or dtype has no packed form."""
    if tensor.layout != torch.strided:
        raise StateUnsupportedError(name, f"a tensor of layout {tensor.layout} has no packed form")
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise StateUnsupportedError(name, f"dtype {tensor.dtype} is not supported")
    return TensorSpec(name, code, tuple(tensor.shape))


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Returns the specs of tensors by name, in the mapping's order."""
    return tuple(spec_of(name, tensor) for name, tensor in tensors.items())


def packed_bytes(tensor: Tensor) -> memoryview:
    """Returns the content in C order on the host: a view of a contiguous CPU tensor, else a copy. Synchronises."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(cast("Buffer", flat.view(torch.uint8).numpy()))


def tensor_view(spec: TensorSpec, buffer: memoryview) -> Tensor:
    """Returns a CPU tensor with this spec that shares the buffer's memory and keeps it alive."""
    dtype = DTYPES[spec.dtype]
    if not buffer.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(spec.shape)


def encode(value: object, name: str, put: PutTensor) -> JsonValue:
    """Converts `value` to JSON values; `name` is its path in the state, for tensor names and error messages.

    A numpy scalar becomes the Python number of its value.

    Raises:
        StateUnsupportedError: for all but None, bool, int, float, str, numpy scalar, tensor, and lists, tuples and
            dicts of these.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    match plain:
        case None | bool() | int() | str():
            return plain
        case float():
            return plain if math.isfinite(plain) else {_FLOAT_KEY: repr(plain)}
        case Tensor():
            return put(name, plain)
        case tuple():
            return {_TUPLE_KEY: encode(list(plain), name, put)}
        case list():
            return [encode(inner, f"{name}/{index}", put) for index, inner in enumerate(plain)]
        case dict():
            return {_checked_key(key, name): encode(inner, f"{name}/{key}", put) for key, inner in plain.items()}
        case _:
            raise StateUnsupportedError(name, f"a {type(value).__name__} cannot be kept as JSON or as a tensor")


def decode(value: JsonValue, take: TakeTensor) -> object:
    """Reverses `encode`; `take` resolves references to tensors."""
    match value:
        case {"$tensor": str()}:
            return take(cast("dict[str, JsonValue]", value))
        case {"$tuple": list() as items}:
            return tuple(decode(item, take) for item in items)
        case {"$float": str() as text}:
            return float(text)
        case list():
            return [decode(item, take) for item in value]
        case dict():
            return {key: decode(inner, take) for key, inner in value.items()}
        case _:
            return value


class KeptValues:
    """Nested values, kept with copies of their tensors.

    Raises StateUnsupportedError as `encode` does.
    """

    def __init__(self, values: object, name: str) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._encoded = encode(values, name, self._keep)

    def values(self) -> Any:
        """Returns the values, with new copies of the tensors."""
        return decode(self._encoded, lambda reference: self._tensors[cast("str", reference[TENSOR_KEY])].clone())

    def _keep(self, name: str, tensor: Tensor) -> JsonValue:
        self._tensors[name] = tensor.detach().clone()
        return {TENSOR_KEY: name}


def encode_plain(value: object, name: str) -> JsonValue:
    """`encode` for values without tensors."""
    return encode(value, name, _refuse_tensor)


def decode_plain(value: JsonValue) -> object:
    """`decode` for values without tensors."""
    return decode(value, lambda reference: _refuse_tensor(str(reference[TENSOR_KEY])))


def capture_rngs() -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """Captures the global generators of torch (CPU and all CUDA devices), numpy and Python. Synchronises with CUDA.

    Generators that a job creates belong to the job's cursor.

    Returns:
        Each generator's words as a uint8 CPU tensor by name, and the generators' other values.

    Raises:
        StateUnsupportedError: numpy's global generator is not its default one.
    """
    legacy = cast("dict[str, JsonValue]", np.random.get_state(legacy=False))  # noqa: NPY002 - the global generator
    if legacy["bit_generator"] != "MT19937":
        raise StateUnsupportedError(_NUMPY, f"numpy's global generator is {legacy['bit_generator']}, not MT19937")
    inner = cast("dict[str, JsonValue]", legacy["state"])
    version, words, gauss = random.getstate()
    tensors = {
        _TORCH: torch.get_rng_state(),
        _NUMPY: torch.from_numpy(cast("np.ndarray[tuple[int], np.dtype[np.uint32]]", inner["key"]).view(np.uint8)),
        _PYTHON: torch.frombuffer(array.array("I", words), dtype=torch.uint8),
    }
    for index in range(_cuda_devices()):
        tensors[f"rng/cuda/{index}"] = torch.cuda.get_rng_state(index)
    numpy_rest: JsonValue = {"pos": inner["pos"], "has_gauss": legacy["has_gauss"], "gauss": legacy["gauss"]}
    return tensors, {"numpy": numpy_rest, "python": [version, gauss]}


def restore_rngs(tensors: Mapping[str, Tensor], values: Mapping[str, JsonValue]) -> None:
    """Restores what `capture_rngs` returned. Skips CUDA devices that this machine lacks."""
    torch.set_rng_state(tensors[_TORCH].clone())
    rest = cast("dict[str, Any]", values["numpy"])
    key = np.frombuffer(tensors[_NUMPY].numpy().tobytes(), dtype=np.uint32)
    np.random.set_state(("MT19937", key, rest["pos"], rest["has_gauss"], rest["gauss"]))  # noqa: NPY002 - as above
    version, gauss = cast("list[JsonValue]", values["python"])
    words = array.array("I", tensors[_PYTHON].numpy().tobytes())
    random.setstate((version, tuple(words), gauss))
    for index in range(_cuda_devices()):
        if (state := tensors.get(f"rng/cuda/{index}")) is not None:
            torch.cuda.set_rng_state(state.clone(), index)


def _checked_key(key: object, name: str) -> str:
    if not isinstance(key, str) or key.startswith("$"):
        raise StateUnsupportedError(name, f"keys must be strings that do not start with $, got {key!r}")
    return key


def _refuse_tensor(name: str, _: Tensor | None = None) -> NoReturn:
    raise StateUnsupportedError(name, "a tensor is not allowed here; JSON values only")


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
