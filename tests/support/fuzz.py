"""Hypothesis strategies for arbitrary messages and malformed bytes, built from the contract's descriptors.

No message is known by name, so additions to the contract are fuzzed too. `overrides` give single fields plausible
values, since a message of arbitrary values never passes the first check.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Kind = TypeVar("Kind", bound=Message)
Overrides = Mapping[str, SearchStrategy[Any]]

_DEPTH_MAX = 3
_ITEMS_MAX = 3
_F = FieldDescriptor
_INT32 = st.one_of(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))
_INT64 = st.one_of(st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1))
_UINT32 = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
_UINT64 = st.one_of(st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
_WORDS = ["", " ", "a", "\x00", "\u202e", "é" * 90, "🜍" * 300, "x" * 129, "y" * 1025, "../../etc", "%s{0}"]
_TEXT = st.one_of(st.sampled_from(_WORDS), st.text(max_size=12))  # hypothesis makes no surrogates: they have no UTF-8

_SCALARS: Mapping[int, SearchStrategy[Any]] = {
    _F.TYPE_DOUBLE: st.floats(),
    _F.TYPE_FLOAT: st.floats(width=32),
    _F.TYPE_INT32: _INT32,
    _F.TYPE_SINT32: _INT32,
    _F.TYPE_SFIXED32: _INT32,
    _F.TYPE_INT64: _INT64,
    _F.TYPE_SINT64: _INT64,
    _F.TYPE_SFIXED64: _INT64,
    _F.TYPE_UINT32: _UINT32,
    _F.TYPE_FIXED32: _UINT32,
    _F.TYPE_UINT64: _UINT64,
    _F.TYPE_FIXED64: _UINT64,
    _F.TYPE_BOOL: st.booleans(),
    _F.TYPE_STRING: _TEXT,
    _F.TYPE_BYTES: st.binary(max_size=24),
}


def messages(kind: type[Kind], overrides: Overrides | None = None) -> SearchStrategy[Kind]:
    """Messages of a type, with any fields set: extremes, NaN, unknown enum numbers, long and unusual strings, nesting.

    `overrides`: strategies by `Message.field`, whose values are those that Python's protobuf accepts (mapping, list,
    message as a mapping); a field with an override is always set.
    """
    factory = _StrategyFactory(overrides or {})
    return factory.values(cast("Descriptor", kind.DESCRIPTOR), 0).map(lambda values: kind(**values))


def wire(kind: type[Message], overrides: Overrides | None = None) -> SearchStrategy[bytes]:
    """Malformed bytes for a message type: truncated, corrupted, of wrong wire types, or random."""
    numbers = st.one_of(
        st.sampled_from([field.number for field in kind.DESCRIPTOR.fields] or [1]), st.integers(1, 2**29 - 1)
    )
    fields = st.lists(st.builds(_field, numbers, st.integers(0, 7), st.binary(max_size=24)), max_size=4)
    made = messages(kind, overrides).map(lambda message: message.SerializeToString())
    return st.one_of(
        fields.map(b"".join),
        st.builds(_truncated, made, st.integers(0, 2**10)),
        st.builds(_corrupted, made, st.integers(0, 2**10), st.integers(1, 255)),
        st.binary(max_size=64),
    )


def weighted(*choices: tuple[int, SearchStrategy[Any]]) -> SearchStrategy[Any]:
    """One of several, chosen by weight; `one_of` would drop duplicates and flatten nested alternatives."""
    tickets = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(tickets) - 1).flatmap(tickets.__getitem__)


class _StrategyFactory:
    """Strategies for one set of overrides, cached because building them for every draw would dominate the run time."""

    def __init__(self, overrides: Overrides) -> None:
        self._overrides = overrides
        self._made: dict[tuple[str, int], SearchStrategy[dict[str, Any]]] = {}

    def values(self, descriptor: Descriptor, depth: int) -> SearchStrategy[dict[str, Any]]:
        """Values of a message's fields by name; at the maximum depth none of them is a message."""
        key = (descriptor.full_name, depth)
        if key not in self._made:
            self._made[key] = self._new_values(descriptor, depth)
        return self._made[key]

    def _new_values(self, descriptor: Descriptor, depth: int) -> SearchStrategy[dict[str, Any]]:
        choices = {oneof.name: st.sampled_from([f.name for f in oneof.fields]) for oneof in descriptor.oneofs}
        fields = [(f.name, f.containing_oneof, self._field(descriptor, f, depth)) for f in descriptor.fields]

        @st.composite
        def values(draw: DrawFn) -> dict[str, Any]:
            taken = {oneof: draw(choice) for oneof, choice in choices.items()}
            made = {
                name: draw(strategy)
                for name, oneof, strategy in fields
                if oneof is None or taken[oneof.name] == name or f"{descriptor.name}.{name}" in self._overrides
            }
            return {name: value for name, value in made.items() if value is not None}

        return values()

    def _field(self, parent: Descriptor, field: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
        override = self._overrides.get(f"{parent.name}.{field.name}")
        if override is not None:
            return override
        if field.message_type is not None and depth >= _DEPTH_MAX:
            return st.none()
        return st.one_of(st.none(), self._present(field, depth))

    def _present(self, field: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
            return st.dictionaries(self._one(key, depth), self._one(value, depth), max_size=_ITEMS_MAX)
        if field.is_repeated:
            return st.lists(self._one(field, depth), max_size=_ITEMS_MAX)
        return self._one(field, depth)

    def _one(self, field: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
        if field.message_type is not None:
            kind = GetMessageClass(field.message_type)  # maps of messages do not accept a mapping
            return self.values(field.message_type, depth + 1).map(lambda values: kind(**values))
        if field.enum_type is not None:
            return st.one_of(st.sampled_from([value.number for value in field.enum_type.values]), _INT32)
        return _SCALARS[field.type]


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    """A tag followed by content that need not match it."""
    bodies = {
        0: _varint(int.from_bytes(payload[:9], "little")),
        1: payload[:8].ljust(8, b"\0"),
        2: _varint(len(payload)) + payload,
        5: struct.pack("<I", len(payload)),
    }
    return _varint(number << 3 | wire_type) + bodies.get(wire_type, payload)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _truncated(raw: bytes, at: int) -> bytes:
    return raw[: at % (len(raw) + 1)]


def _corrupted(raw: bytes, at: int, by: int) -> bytes:
    if not raw:
        return raw
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ by]) + raw[at + 1 :]
