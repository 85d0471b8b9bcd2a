from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tolaria.checkpoint.tensor_file import FreshMemory, TensorFileError, file_pieces, read_tensors
from tolaria.errors import RestoreAbandonedError
from tolaria.filesystem import Filesystem, write_durably
from tolaria.state.encoding import packed_bytes, specs_of, tensor_view
from tolaria.tensors import DTYPES

PAGE_BYTES = mmap.PAGESIZE

TENSORS = {
    **{f"z/{code}": torch.arange(7).to(dtype) for code, dtype in DTYPES.items()},
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "large": torch.randn(700, 901),
    "strided": torch.randn(5, 6).t(),
    "näme/with.dots": torch.ones(3),
}
SPECS = specs_of(TENSORS)


def write(path: Path) -> None:
    """Writes all kinds of tensors."""
    buffers = {name: packed_bytes(tensor) for name, tensor in TENSORS.items()}
    write_durably(Filesystem(), path, file_pieces(SPECS, buffers))


def read(path: Path, expired: Callable[[], bool] | None = None) -> dict[str, torch.Tensor]:
    """Reads them back as tensors."""
    digests = {spec.name: spec.digest(packed_bytes(TENSORS[spec.name])) for spec in SPECS}
    buffers = read_tensors(Filesystem(), path, SPECS, digests, expired)
    assert list(buffers) == list(TENSORS)
    return {spec.name: tensor_view(spec, buffers[spec.name]) for spec in SPECS}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are bit-equal."""
    ours, theirs = ours.contiguous().reshape(-1), theirs.contiguous().reshape(-1)
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    """Names, shapes, dtypes and bytes are the same for the reference implementation."""
    write(tmp_path / "t")
    found = safetensors.torch.load_file(tmp_path / "t")
    assert {n: (t.shape, same(t, TENSORS[n])) for n, t in found.items()} == {
        n: (t.shape, True) for n, t in TENSORS.items()
    }


def test_tensors_are_read_back(tmp_path: Path) -> None:
    """All dtypes and shapes come back bit-equal, in the order of the specs and aligned for their dtypes."""
    write(tmp_path / "t")
    found = read(tmp_path / "t")
    assert all(same(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in TENSORS.items())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


@pytest.mark.parametrize("spot", [0, 9, 200, -1, -2_000_000])
def test_a_flipped_bit_is_found(tmp_path: Path, spot: int) -> None:
    """In the header length, the header or the data."""
    write(tmp_path / "t")
    content = bytearray((tmp_path / "t").read_bytes())
    content[spot] ^= 4
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TensorFileError):
        read(tmp_path / "t")


def test_a_slow_read_can_be_abandoned(tmp_path: Path) -> None:
    """The deadline is checked between megabytes."""
    write(tmp_path / "t")
    answers = iter([False, True])
    with pytest.raises(RestoreAbandonedError):
        read(tmp_path / "t", lambda: next(answers))


@pytest.mark.parametrize("size_bytes", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES + 1])
def test_fresh_memory_is_writable_to_the_last_byte(size_bytes: int) -> None:
    """Whether or not its pages were populated."""
    memory = FreshMemory(size_bytes)
    memory.populate(0, size_bytes // 2)
    memory.buffer[:] = bytes([7]) * size_bytes
    assert sum(memory.buffer) == 7 * size_bytes


def test_populating_changes_no_byte() -> None:
    """Content stays, also when its page is populated again."""
    memory = FreshMemory(2 * PAGE_BYTES)
    memory.buffer[:] = bytes([3]) * 2 * PAGE_BYTES
    memory.populate(0, 2 * PAGE_BYTES)
    assert set(memory.buffer) == {3}


def test_a_view_keeps_the_memory() -> None:
    """A view of a part stays readable after the last reference to the whole is gone."""
    memory = FreshMemory(PAGE_BYTES)
    memory.buffer[:] = bytes([3]) * PAGE_BYTES
    part = memory.buffer[-64:]
    del memory
    FreshMemory(PAGE_BYTES).buffer[:] = bytes([4]) * PAGE_BYTES
    assert part.tolist() == [3] * 64


def test_a_kernel_without_populate_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel refuses the advice and maps the pages one by one; the memory works all the same."""

    class Refusing(mmap.mmap):
        def madvise(self, *_arguments: int) -> None:
            raise OSError(errno.EINVAL, "unknown advice")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    memory = FreshMemory(2 * PAGE_BYTES)
    memory.populate(0, PAGE_BYTES)
    memory.buffer[:] = bytes([5]) * 2 * PAGE_BYTES
    assert set(memory.buffer) == {5}
