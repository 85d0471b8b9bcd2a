from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tolaria.errors import RestoreAbandonedError
from tolaria.rollback import Filesystem, never
from tolaria.rollback.arena import arena_specs
from tolaria.rollback.digest import DTYPES, tensor_digest
from tolaria.rollback.filesystem import write_durably
from tolaria.rollback.tensor_file import TensorFileError, file_pieces, read_tensors

TENSORS = {
    **{f"z/{code}": torch.arange(7).to(dtype) for code, dtype in DTYPES.items()},
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "large": torch.randn(700, 901),
    "strided": torch.randn(5, 6).t(),
    "näme/with.dots": torch.ones(3),
}


def write(path: Path) -> None:
    """Write all kinds of tensors."""
    write_durably(Filesystem(), path, file_pieces(list(arena_specs(TENSORS)), TENSORS))


def read(path: Path, expired: object = never) -> dict[str, torch.Tensor]:
    """Read them back."""
    digests = {name: tensor_digest(name, tensor) for name, tensor in TENSORS.items()}
    return read_tensors(Filesystem(), path, list(arena_specs(TENSORS)), digests, expired)  # type: ignore[arg-type]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit-equal."""
    ours, theirs = ours.contiguous().reshape(-1), theirs.contiguous().reshape(-1)
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    """Names, shapes, dtypes and bytes are as the reference implementation sees them."""
    write(tmp_path / "t")
    found = safetensors.torch.load_file(tmp_path / "t")
    assert {n: (t.shape, same(t, TENSORS[n])) for n, t in found.items()} == {
        n: (t.shape, True) for n, t in TENSORS.items()
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """All dtypes and shapes, aligned and in the order asked for."""
    write(tmp_path / "t")
    found = read(tmp_path / "t")
    assert list(found) == list(TENSORS)
    assert all(same(found[name], tensor) and found[name].shape == tensor.shape for name, tensor in TENSORS.items())


@pytest.mark.parametrize("spot", [0, 9, 200, -1, -2_000_000])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, spot: int) -> None:
    """In the length, the header or the data."""
    write(tmp_path / "t")
    content = bytearray((tmp_path / "t").read_bytes())
    content[spot] ^= 4
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TensorFileError):
        read(tmp_path / "t")


def test_a_slow_read_can_be_given_up(tmp_path: Path) -> None:
    """The deadline is looked at between megabytes."""
    write(tmp_path / "t")
    asked = iter([False, True])
    with pytest.raises(RestoreAbandonedError):
        read(tmp_path / "t", lambda: next(asked))
