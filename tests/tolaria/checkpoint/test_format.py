from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tolaria
from tolaria.checkpoint.format import Manifest
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import NoCheckpointError

if TYPE_CHECKING:
    from faults.small_training import Training


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_manifest_is_read_back(training: Training) -> None:
    """The bytes determine the manifest, and any change of them is an error."""
    image = training.state().copy()
    manifest = Manifest.of(image, checkpoint_id="c", run_id="r", created_at_ns=5, metric=0.5)
    content = manifest.to_bytes()
    assert Manifest.from_bytes(content) == manifest
    assert manifest.size_bytes == image.size_bytes
    for changed in (content + b" ", content.replace(b'"metric":0.5', b'"metric":0.6'), content[:-1], b"[]", b"{}"):
        with pytest.raises(ValueError, match=r"."):
            Manifest.from_bytes(changed)


def test_no_module_can_unpickle() -> None:
    """No module that handles state names pickle or a function of torch or numpy that reads or writes it."""
    forbidden = re.compile(r"\b(import pickle|from pickle|torch\.(load|save)|np\.(load|save)|marshal|shelve|dill)\b")
    package = Path(tolaria.__file__).parent
    sources = [path for room in ("checkpoint", "images", "journal", "state") for path in (package / room).glob("*.py")]
    assert len(sources) > 10
    assert [str(path) for path in sources if forbidden.search(path.read_text())] == []


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, training: Training, name: str) -> None:
    """A pickle in place of any of a checkpoint's files is damage, and its payload is not executed."""
    mark = tmp_path / "exploded"
    storage = open_storage(tmp_path / "state", run_id="r", retention=Retention(last=3, best="highest"))
    with storage.journal:
        row = storage.checkpoints.write(training.state().copy())
        (tmp_path / "state" / "checkpoints" / row.checkpoint_id / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(NoCheckpointError):
            storage.checkpoints.load_newest()
    assert not mark.exists()
