from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tolaria.errors import BoardLostError
from tolaria.signals.layout import BOARD_SIZE
from tolaria.signals.memory import BoardMemory, fence, locked_fence


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a board's size."""
    path = tmp_path / "file"
    path.write_bytes(bytes(BOARD_SIZE))
    return path


def test_memory_words_are_the_files_little_endian_words(path: Path) -> None:
    """A stored word is in the file at once."""
    memory = BoardMemory(os.open(path, os.O_RDWR), path)
    memory.words[2] = 0x0102030405060708
    assert path.read_bytes()[16:24] == bytes(range(8, 0, -1))
    memory.close()


def test_memory_knows_when_its_file_is_cut_or_removed(path: Path) -> None:
    """A removed file is still whole, a short one is not to be touched, a closed one neither."""
    memory = BoardMemory(os.open(path, os.O_RDWR), path)
    assert (memory.intact, memory.named) == (True, True)
    spare = path.with_name("spare")
    path.rename(spare)
    assert memory.named
    os.truncate(spare, 8)
    with pytest.raises(BoardLostError, match="cut short"):
        memory.require_intact()
    spare.unlink()
    assert (memory.intact, memory.named) == (False, False)
    memory.close()
    with pytest.raises(BoardLostError, match="closed"):
        memory.require_intact()
    assert (memory.intact, memory.named) == (False, False)


def test_memory_fence_is_left_out_only_where_the_machine_keeps_order() -> None:
    """x86-64 needs no fence; every other machine gets the locked one, which any thread may call."""
    assert fence is (None if platform.machine() == "x86_64" else locked_fence)
    locked_fence()
