from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tolaria.rollback
from tolaria.errors import NoCheckpointError
from tolaria.rollback import Retention, never, open_storage

if TYPE_CHECKING:
    from faults.small_training import Training


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_nothing_in_the_room_can_unpickle() -> None:
    """No module of the room names pickle or a function of torch or numpy that reads or writes it."""
    forbidden = re.compile(r"\b(import pickle|from pickle|torch\.(load|save)|np\.(load|save)|marshal|shelve|dill)\b")
    sources = sorted(Path(tolaria.rollback.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    assert [str(path) for path in sources if forbidden.search(path.read_text())] == []


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, training: Training, name: str) -> None:
    """A pickle in the place of any of a checkpoint's files is damage, and its payload is not executed."""
    mark = tmp_path / "exploded"
    storage = open_storage(tmp_path / "state", run_id="r", retention=Retention())
    with storage.journal:
        row = storage.checkpoints.write(training.state().copy())
        (tmp_path / "state" / "checkpoints" / row.checkpoint_id / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(NoCheckpointError):
            storage.checkpoints.load_newest(never)
    assert not mark.exists()
