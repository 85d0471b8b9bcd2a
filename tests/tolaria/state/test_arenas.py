from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tolaria.segments import placed_bytes
from tolaria.state.arenas import Arena, grouped
from tolaria.state.encoding import packed_bytes, spec_of, specs_of
from tolaria.tensors import DTYPES

PLACES = [0, 1, 2**11, 2**13 + 1, 2**14 - 1]


def filled(tensor: Tensor) -> Arena:
    """An arena with a copy of the tensor."""
    tensors = {"x": tensor}
    arena = Arena(specs_of(tensors), pinned=False)
    arena.fill(tensors)
    return arena


def test_an_arena_is_filled_without_allocation() -> None:
    """Two fills use the same memory, which is independent of the live tensors."""
    tensors = {"a": torch.ones(3, 2).t(), "b": torch.tensor([True]), "c": torch.zeros(0, 4)}
    arena = Arena(specs_of(tensors), pinned=False)
    arena.fill(tensors)
    buffers = dict(arena.buffers)
    assert buffers["a"] == packed_bytes(tensors["a"])
    tensors["a"].zero_()
    assert any(buffers["a"])
    arena.fill(tensors)
    assert not any(buffers["a"])
    assert [arena.buffers[name] is buffers[name] for name in tensors] == [True] * 3
    assert buffers["a"].nbytes == 24


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_a_change_of_any_element_is_found(dtype: torch.dtype, place: int) -> None:
    """Every dtype, at the first, the last and other places."""
    tensor = torch.zeros(2**14).to(dtype)
    arena = filled(tensor)
    assert arena.holds({"x": tensor})
    tensor.view(torch.uint8)[place * tensor.element_size()] ^= 1
    assert not arena.holds({"x": tensor})


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(4, 3, 50, 60).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(80, 90).t(),
    "odd offset": lambda: torch.randn(4097)[1:],
    "odd length": lambda: torch.randn(4097),
    "every other column": lambda: torch.randn(60, 80)[:, ::2],
    "one row": lambda: torch.randn(1, 5000),
    "conjugate": lambda: torch.randn(5000, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(5000, dtype=torch.complex64).conj().imag,
    "scalar": lambda: torch.tensor(1.5),
    "empty": lambda: torch.zeros(0, 3),
    "inference": lambda: inference(torch.randn(5000)),
}


def inference(tensor: Tensor) -> Tensor:
    """An inference tensor, which has no version counter."""
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_live_tensor_does_not_matter(layout: str) -> None:
    """It is compared in its own order of elements; the last one counts like the first."""
    tensor = LAYOUTS[layout]()
    arena = filled(tensor)
    assert arena.holds({"x": tensor})
    if tensor.numel():
        changed = tensor.clone()
        changed[(-1,) * tensor.dim()] *= -1
        assert not arena.holds({"x": changed})


def test_bits_are_compared_and_not_numbers() -> None:
    """NaN equals itself, but not a NaN with another payload; zero differs from negative zero."""
    nan, zero = torch.full((3,), float("nan")), torch.zeros(3)
    assert filled(nan).holds({"x": nan.clone()})
    other = nan.clone()
    other.view(torch.int32)[2] ^= 1
    assert other.isnan().all()
    assert not filled(nan).holds({"x": other})
    assert not filled(zero).holds({"x": -zero})


def test_digests_are_those_of_the_content_after_each_fill() -> None:
    """A fill with other tensors gives other digests."""
    first, second = torch.zeros(5), torch.ones(5)
    arena = filled(first)
    for tensor in (first, second):
        arena.fill({"x": tensor})
        assert arena.digests() == {"x": spec_of("x", tensor).digest(packed_bytes(tensor))}


def test_only_large_tensors_that_are_not_trained_are_alone() -> None:
    """The others share an arena; the order of the tensors is kept."""
    sizes = {"a": 2**16, "b": 2**16, "c": 2**16 - 1, "d": 2**20, "e": 2}
    specs = specs_of({name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()})
    groups = grouped(specs, {"a", "e"})
    assert [[spec.name for spec in group] for group in groups] == [["a", "c", "e"], ["b"], ["d"]]
    assert sum(map(placed_bytes, groups)) == placed_bytes(specs)
