"""Encodes frozen dataclasses of plain values as bytes, and back, without loss and without pickle.

Every value is one type byte followed by its content; integers are little-endian, lengths are unsigned 32-bit.

    N  None            T  true            F  false
    i  int64           I  other int       f  float64 (NaN and infinities included)
    s  str (UTF-8)     b  bytes           r  range: start, stop, step as int64
    t  tuple           d  mapping: pairs  D  dataclass: registered name, field values in order
    P  protobuf message: registered full name, serialized bytes
    e  enum member: registered name, value
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import chain
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from tolaria import errors
from tolaria.errors import TolariaError

_ERRORS: Final[dict[str, Callable[..., TolariaError]]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TolariaError)
}
_LENGTH = struct.Struct("<I")
_INT = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
_RANGE = struct.Struct("<qqq")
_INT_MAX: Final = 2**63

_CONSTANTS: Final = {b"N": None, b"T": True, b"F": False}
_FIXED: Final = {b"i": _INT, b"f": _FLOAT, b"r": _RANGE}
_CONTENTS: Final[Mapping[bytes, Callable[[bytes], object]]] = {b"I": int, b"s": bytes.decode, b"b": bytes}


class EncodingError(ValueError):
    """Raised for a value that has no encoding, and for bytes that are not an encoded value."""


def error_fields(error: TolariaError) -> tuple[str, tuple[object, ...]]:
    """Returns the class name and the constructor arguments, with lists as tuples; a chained cause is not included."""
    return type(error).__name__, tuple(tuple(field) if isinstance(field, list) else field for field in error.fields)


def is_catalogued(error: BaseException) -> bool:
    """Whether an error is of a class of `tolaria.errors`, so that `error_from_fields` can build it."""
    return _ERRORS.get(type(error).__name__) is type(error)


def error_from_fields(name: str, fields: tuple[object, ...]) -> TolariaError:
    """Returns the error that `error_fields` was called with. Raises KeyError for an unknown name."""
    return _ERRORS[name](*fields)


class Codec:
    """Encodes values of the given types.

    Args:
        types: dataclasses and enums; their names identify them and must differ.
        messages: protobuf message classes.
    """

    def __init__(self, types: Iterable[type[Any]], messages: Iterable[type[Message]]) -> None:
        known = list(types)
        self._types = {kind.__name__: kind for kind in known}
        if len(self._types) != len(known):
            raise ValueError("two types have the same name")
        self._messages = {kind.DESCRIPTOR.full_name: kind for kind in messages}
        self._field_names: dict[type[Any], tuple[str, ...]] = {
            kind: tuple(f.name for f in fields(kind)) for kind in known if is_dataclass(kind)
        }

    def encode(self, value: object) -> bytes:
        """Returns the bytes of `value`. Raises EncodingError for a type without an encoding."""
        out = bytearray()
        self._put(out, value)
        return bytes(out)

    def decode(self, data: bytes) -> Any:
        """Returns the value of `data`. Raises EncodingError unless `data` is exactly one encoded value."""
        try:
            value, end = self._take(data, 0)
        except EncodingError:
            raise
        except (struct.error, LookupError, ValueError, DecodeError, TypeError, RecursionError) as error:
            raise EncodingError(f"not an encoded value: {type(error).__name__}: {error}") from error
        if end != len(data):
            raise EncodingError(f"{len(data) - end} bytes follow the encoded value")
        return value

    def _put(self, out: bytearray, value: object) -> None:
        items: Iterable[object] = ()
        match value:
            case Enum():
                out += self._named(b"e", type(value))
                items = (value.value,)
            case None | bool() | int() | float() | str() | bytes() | range():
                out += _scalar(value)
            case tuple():
                out += b"t" + _LENGTH.pack(len(value))
                items = value
            case Mapping():
                out += b"d" + _LENGTH.pack(len(value))
                items = chain.from_iterable(value.items())
            case Message():
                name = value.DESCRIPTOR.full_name
                if name not in self._messages:
                    raise EncodingError(f"the message type {name} is not registered")
                out += _block(b"P", name.encode()) + _block(b"b", value.SerializeToString(deterministic=True))
            case _:
                out += self._named(b"D", type(value))
                items = (getattr(value, name) for name in self._field_names[type(value)])
        for item in items:
            self._put(out, item)

    def _named(self, tag: bytes, kind: type[Any]) -> bytes:
        if self._types.get(kind.__name__) is not kind:
            raise EncodingError(f"a {kind.__name__} has no encoding")
        return _block(tag, kind.__name__.encode())

    def _take(self, data: bytes, at: int) -> tuple[Any, int]:
        tag, at = data[at : at + 1], at + 1
        if tag in _CONSTANTS:
            return _CONSTANTS[tag], at
        if tag in _FIXED:
            numbers = _FIXED[tag].unpack_from(data, at)
            return (range(*numbers) if tag == b"r" else numbers[0]), at + _FIXED[tag].size
        if tag in {b"t", b"d"}:
            count = _LENGTH.unpack_from(data, at)[0]
            items, at = self._take_many(data, at + _LENGTH.size, count if tag == b"t" else 2 * count)
            return (items if tag == b"t" else dict(zip(items[::2], items[1::2], strict=True))), at
        content, at = _take_block(data, at)
        return (_CONTENTS[tag](content), at) if tag in _CONTENTS else self._take_named(tag, content.decode(), data, at)

    def _take_named(self, tag: bytes, name: str, data: bytes, at: int) -> tuple[Any, int]:
        match tag:
            case b"P":
                content, at = _take_block(data, at + 1)
                return self._messages[name].FromString(content), at
            case b"e":
                value, at = self._take(data, at)
                return self._types[name](value), at
            case b"D":
                kind = self._types[name]
                names = self._field_names[kind]
                values, at = self._take_many(data, at, len(names))
                return kind(**dict(zip(names, values, strict=True))), at
            case _:
                raise EncodingError(f"unknown type byte {tag!r}")

    def _take_many(self, data: bytes, at: int, count: int) -> tuple[tuple[Any, ...], int]:
        if count > len(data) - at:  # every value takes a byte at least
            raise EncodingError(f"{count} values cannot follow in {len(data) - at} bytes")
        items = []
        for _ in range(count):
            item, at = self._take(data, at)
            items.append(item)
        return tuple(items), at


def _scalar(value: float | str | bytes | range | None) -> bytes:
    match value:
        case None:
            encoded = b"N"
        case bool():
            encoded = b"T" if value else b"F"
        case int() if -_INT_MAX <= value < _INT_MAX:
            encoded = b"i" + _INT.pack(value)
        case int():
            encoded = _block(b"I", str(value).encode())
        case float():
            encoded = b"f" + _FLOAT.pack(value)
        case str():
            encoded = _block(b"s", value.encode())
        case bytes():
            encoded = _block(b"b", value)
        case range():
            encoded = b"r" + _RANGE.pack(value.start, value.stop, value.step)
    return encoded


def _block(tag: bytes, content: bytes) -> bytes:
    return tag + _LENGTH.pack(len(content)) + content


def _take_block(data: bytes, at: int) -> tuple[bytes, int]:
    length = _LENGTH.unpack_from(data, at)[0]
    start = at + _LENGTH.size
    if length > len(data) - start:
        raise EncodingError(f"{length} bytes cannot follow in {len(data) - start}")
    return data[start : start + length], start + length
