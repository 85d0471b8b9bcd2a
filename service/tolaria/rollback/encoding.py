"""Nested Python values as JSON values and back, tensors taken out by name. Owns the form, which checkpoints keep.

Knows nothing of models and optimizers. `$`-keys mark what JSON lacks: tuples, tensors, floats that are not finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias, cast

from pydantic import JsonValue
from torch import Tensor

from tolaria.errors import StateUnsupportedError

PutTensor: TypeAlias = Callable[[str, Tensor], JsonValue]
"""Stores a tensor under a name and returns what stands for it."""

TakeTensor: TypeAlias = Callable[[Mapping[str, JsonValue]], Tensor]
"""Finds the tensor that such a stand-in stands for."""

TENSOR_KEY = "$tensor"
_TUPLE_KEY = "$tuple"
_FLOAT_KEY = "$float"


def encode(value: object, name: str, put: PutTensor) -> JsonValue:
    """`value` as JSON values; `name` is where it stands, for tensors' names and for errors.

    Raises:
        StateUnsupportedError: for all but None, bool, int, float, str, tensor, and lists, tuples and dicts of these.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_FLOAT_KEY: repr(value)}
        case Tensor():
            return put(name, value)
        case tuple():
            return {_TUPLE_KEY: _encode_all(value, name, put)}
        case list():
            return _encode_all(value, name, put)
        case dict():
            return {_checked_key(key, name): encode(inner, f"{name}/{key}", put) for key, inner in value.items()}
        case _:
            raise StateUnsupportedError(name, f"a {type(value).__name__} cannot be kept as JSON or as a tensor")


def decode(value: JsonValue, take: TakeTensor) -> object:
    """What `encode` was given; tensors are those that `take` finds."""
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


def encode_plain(value: object, name: str) -> JsonValue:
    """`encode` for what must not hold tensors."""
    return encode(value, name, _refuse_tensor)


def decode_plain(value: JsonValue) -> object:
    """`decode` for what holds no tensors."""
    return decode(value, _no_tensor_here)


def canonical_json(value: object) -> bytes:
    """The one spelling of `value`: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encode_all(values: list[object] | tuple[object, ...], name: str, put: PutTensor) -> list[JsonValue]:
    return [encode(inner, f"{name}/{index}", put) for index, inner in enumerate(values)]


def _checked_key(key: object, name: str) -> str:
    if not isinstance(key, str) or key.startswith("$"):
        raise StateUnsupportedError(name, f"keys must be strings that do not start with $, got {key!r}")
    return key


def _no_tensor_here(stand_in: Mapping[str, JsonValue]) -> NoReturn:
    raise StateUnsupportedError(str(stand_in[TENSOR_KEY]), "a tensor must not stand here; JSON values only")


def _refuse_tensor(name: str, _: Tensor) -> NoReturn:
    raise StateUnsupportedError(name, "a tensor must not stand here; JSON values only")
