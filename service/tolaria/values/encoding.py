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
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from google.protobuf.message import DecodeError, Message

_LENGTH = struct.Struct("<I")
_INT = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
_RANGE = struct.Struct("<qqq")
_INT_MAX = 2**63


class EncodingError(ValueError):
    """Raised for a value that has no encoding, and for bytes that are not an encoded value."""


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
        except (
            struct.error,
            IndexError,
            UnicodeDecodeError,
            DecodeError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:
            raise EncodingError(f"not an encoded value: {type(error).__name__}: {error}") from error
        if end != len(data):
            raise EncodingError(f"{len(data) - end} bytes follow the encoded value")
        return value

    def _put(self, out: bytearray, value: object) -> None:
        match value:
            case None:
                out += b"N"
            case bool():
                out += b"T" if value else b"F"
            case Enum():
                self._require(type(value))
                self._put_text(out, b"e", type(value).__name__)
                self._put(out, value.value)
            case int():
                _put_int(out, value)
            case float():
                out += b"f" + _FLOAT.pack(value)
            case str():
                self._put_text(out, b"s", value)
            case bytes():
                _put_bytes(out, b"b", value)
            case range():
                out += b"r" + _RANGE.pack(value.start, value.stop, value.step)
            case _:
                self._put_compound(out, value)

    def _put_compound(self, out: bytearray, value: object) -> None:
        match value:
            case tuple():
                out += b"t" + _LENGTH.pack(len(value))
                for item in value:
                    self._put(out, item)
            case Mapping():
                out += b"d" + _LENGTH.pack(len(value))
                for key, item in value.items():
                    self._put(out, key)
                    self._put(out, item)
            case Message():
                name = value.DESCRIPTOR.full_name
                if name not in self._messages:
                    raise EncodingError(f"the message type {name} is not registered")
                self._put_text(out, b"P", name)
                _put_bytes(out, b"b", value.SerializeToString(deterministic=True))
            case _:
                self._put_dataclass(out, value)

    def _put_dataclass(self, out: bytearray, value: object) -> None:
        kind = type(value)
        self._require(kind)
        self._put_text(out, b"D", kind.__name__)
        for name in self._field_names[kind]:
            self._put(out, getattr(value, name))

    def _require(self, kind: type[Any]) -> None:
        if self._types.get(kind.__name__) is not kind:
            raise EncodingError(f"a {kind.__name__} has no encoding")

    def _put_text(self, out: bytearray, tag: bytes, text: str) -> None:
        _put_bytes(out, tag, text.encode())

    def _take(self, data: bytes, at: int) -> tuple[Any, int]:
        tag, at = data[at : at + 1], at + 1
        match tag:
            case b"N" | b"T" | b"F":
                return {b"N": None, b"T": True, b"F": False}[tag], at
            case b"i":
                return _INT.unpack_from(data, at)[0], at + _INT.size
            case b"f":
                return _FLOAT.unpack_from(data, at)[0], at + _FLOAT.size
            case b"r":
                return range(*_RANGE.unpack_from(data, at)), at + _RANGE.size
            case b"I" | b"s" | b"b":
                content, at = _take_bytes(data, at)
                return (content.decode() if tag == b"s" else int(content) if tag == b"I" else content), at
            case _:
                return self._take_compound(tag, data, at)

    def _take_compound(self, tag: bytes, data: bytes, at: int) -> tuple[Any, int]:
        if tag in {b"t", b"d"}:
            count = _LENGTH.unpack_from(data, at)[0]
            items, at = self._take_many(data, at + _LENGTH.size, count if tag == b"t" else 2 * count)
            return (items, at) if tag == b"t" else (dict(zip(items[::2], items[1::2], strict=True)), at)
        if tag not in {b"D", b"P", b"e"}:
            raise EncodingError(f"unknown type byte {tag!r}")
        content, at = _take_bytes(data, at)
        name = content.decode()
        if tag == b"P":
            content, at = _take_bytes(data, at + 1)
            return self._messages[name].FromString(content), at
        kind = self._types[name]
        if tag == b"e":
            value, at = self._take(data, at)
            return kind(value), at
        values, at = self._take_many(data, at, len(self._field_names[kind]))
        return kind(**dict(zip(self._field_names[kind], values, strict=True))), at

    def _take_many(self, data: bytes, at: int, count: int) -> tuple[tuple[Any, ...], int]:
        if count > len(data) - at:  # every value takes a byte at least
            raise EncodingError(f"{count} values cannot follow in {len(data) - at} bytes")
        items = []
        for _ in range(count):
            item, at = self._take(data, at)
            items.append(item)
        return tuple(items), at


def _put_int(out: bytearray, value: int) -> None:
    if -_INT_MAX <= value < _INT_MAX:
        out += b"i" + _INT.pack(value)
    else:
        _put_bytes(out, b"I", str(value).encode())


def _put_bytes(out: bytearray, tag: bytes, content: bytes) -> None:
    out += tag + _LENGTH.pack(len(content)) + content


def _take_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    length = _LENGTH.unpack_from(data, at)[0]
    start = at + _LENGTH.size
    if length > len(data) - start:
        raise EncodingError(f"{length} bytes cannot follow in {len(data) - start}")
    return data[start : start + length], start + length
