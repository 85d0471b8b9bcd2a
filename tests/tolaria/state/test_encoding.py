from __future__ import annotations

import gc
import json

import pytest
import torch

from tolaria.errors import StateUnsupportedError
from tolaria.images import DTYPE_BYTES, canonical_json
from tolaria.state.encoding import (
    decode_plain,
    encode_plain,
    packed_bytes,
    spec_of,
    tensor_view,
)
from tolaria.tensors import DTYPES


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """The digest of a live tensor."""
    return spec_of(name, tensor).digest(packed_bytes(tensor))


def test_a_digest_covers_name_dtype_and_shape() -> None:
    """The same bytes under another name, dtype or shape have another digest; the memory layout does not matter."""
    zeros = torch.zeros(2, 3)
    others = [("b", zeros), ("a", zeros.view(3, 2)), ("a", torch.zeros(2, 3, dtype=torch.int32))]
    assert len({tensor_digest("a", zeros), *(tensor_digest(n, t) for n, t in others)}) == 4
    strided = torch.randn(3, 2).t()
    assert tensor_digest("a", strided) == tensor_digest("a", strided.contiguous())


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.0, 1e-320, float("inf"), "é", (1, (2.0, [])), {"a": [{"b": (None,)}]}, 2**80],
)
def test_values_survive_json(value: object) -> None:
    """Tuples, infinities and the sign of zero keep type and bits."""
    back = decode_plain(json.loads(canonical_json(encode_plain(value, "x"))))
    assert (back, repr(back)) == (value, repr(value))


@pytest.mark.parametrize("value", [object(), {1: 2}, {"$tuple": []}, {1, 2}, b"raw", torch.zeros(1)])
def test_values_without_a_faithful_form_are_refused(value: object) -> None:
    """A value that JSON cannot hold is an error that names its path."""
    with pytest.raises(StateUnsupportedError, match="here"):
        encode_plain(value, "here")


def test_every_dtype_has_its_element_size() -> None:
    """The torch-free table of element sizes covers the supported dtypes and agrees with torch."""
    assert {code: dtype.itemsize for code, dtype in DTYPES.items()} == DTYPE_BYTES


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_tensor_view_shares_and_keeps_the_memory(dtype: torch.dtype) -> None:
    """Writing through the view changes the buffer, and the view outlives every other reference to it."""
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    buffer = memoryview(bytearray(packed_bytes(tensor)))
    view = tensor_view(spec_of("x", tensor), buffer)
    assert (view.dtype, view.shape) == (dtype, tensor.shape)
    assert packed_bytes(view) == packed_bytes(tensor)
    view.zero_()
    assert not any(buffer)
    del buffer
    gc.collect()
    assert not any(packed_bytes(view))
