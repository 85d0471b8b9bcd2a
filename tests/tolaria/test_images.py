from __future__ import annotations

import pytest
import xxhash

from tolaria.errors import ImageDamagedError
from tolaria.images import DTYPE_BYTES, Fingerprint, StateImage, TensorSpec, canonical_json, combine
from tolaria.values.training import Position

VALUES = b'{"a":1}'


def new_image() -> StateImage:
    """An unsealed image with two tensors."""
    specs = (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BOOL", ()))
    buffers = {"a": memoryview(bytearray(range(24))), "b": memoryview(bytearray(1))}
    return StateImage(Position(7, 2), specs, buffers, VALUES)


@pytest.mark.parametrize(
    ("dtype", "shape", "size_bytes"), [("F32", (2, 3), 24), ("BF16", (5,), 10), ("C64", (), 8), ("U8", (0, 4), 0)]
)
def test_size_of_a_spec(dtype: str, shape: tuple[int, ...], size_bytes: int) -> None:
    """The size follows from dtype and shape."""
    assert TensorSpec("x", dtype, shape).size_bytes == size_bytes
    assert dtype in DTYPE_BYTES


def test_digests_are_those_of_existing_checkpoints() -> None:
    """The hashed bytes are fixed: name, dtype, shape, content; then digests by name, then the values."""
    image = new_image()
    first = xxhash.xxh3_128_hexdigest(b"a\nF32\n(2, 3)\n" + bytes(range(24)))
    second = xxhash.xxh3_128_hexdigest(b"b\nBOOL\n()\n\x00")
    rest = xxhash.xxh3_128_hexdigest(VALUES)
    total = xxhash.xxh3_128_hexdigest(f"{first} a\n{second} b\n{rest}\n".encode())
    assert image.seal() == Fingerprint({"a": first, "b": second}, rest, total)
    assert combine({"b": second, "a": first}, VALUES) == image.seal()


def test_the_seal_is_recorded_once() -> None:
    """An image has no fingerprint before `seal`; later changes do not change the recorded one."""
    image = new_image()
    assert image.sealed is None
    sealed = image.seal()
    image.buffers["a"][0] ^= 1
    assert image.sealed == image.seal() == sealed


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_changed_byte_is_found(name: str) -> None:
    """Verification names the damaged tensor."""
    image = new_image()
    assert image.verify() == image.seal()
    image.buffers[name][0] ^= 1
    with pytest.raises(ImageDamagedError, match=f"^{name}:"):
        image.verify()


def test_the_size_counts_tensors_and_values() -> None:
    """Bytes of all buffers and of the JSON."""
    assert new_image().size_bytes == 24 + 1 + len(VALUES)


def test_canonical_json_is_unique() -> None:
    """Keys are sorted, and neither spaces nor non-finite numbers are written."""
    assert canonical_json({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
