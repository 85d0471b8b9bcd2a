from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from support.exported import Trained, outputs, record_settings, trained
from tolaria.checkpoint.directory import CHECKPOINTS
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import (
    CheckpointDamagedError,
    ExportFailedError,
    ExportRefusedError,
    NoCheckpointError,
)
from tolaria.export import load
from tolaria.export.card import CARD, TRANSIENT_FILE, read_card
from tolaria.export.source import BEST, NEWEST, choose, read_source
from tolaria.export.writing import ExportFiles, ExportOrder, _run, export_model, remove_partial_exports
from tolaria.journal.rows import CheckpointRow


def test_the_files_have_the_names_of_the_job_s_own_model(gpt: Trained, tmp_path: Path) -> None:
    """The weights are those of `state_dict`, without repeated tied ones, and `load_model` of safetensors takes them."""
    card = gpt.export(tmp_path / "out")
    listed = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    own = gpt.model.state_dict()
    assert set(own) - set(listed) == set(card.tied) == {"head.weight"}
    assert set(listed) <= set(own)
    assert (tmp_path / "out" / TRANSIENT_FILE).exists()
    with torch.no_grad():
        model = load(tmp_path / "out", gpt.job.build_model)
        for parameter in model.parameters():
            parameter.zero_()
    safetensors.torch.load_model(model, tmp_path / "out" / "model.safetensors")
    assert torch.equal(outputs(gpt.job, model), outputs(gpt.job, gpt.model))


def test_a_file_of_torch_is_the_whole_state_dict(gpt: Trained, tmp_path: Path) -> None:
    """All names of tied tensors are there, in one storage, and a strict `load_state_dict` takes it."""
    gpt.export(tmp_path / "out", "torch")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state.keys() == gpt.model.state_dict().keys()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    assert all(torch.equal(state[name], tensor) for name, tensor in gpt.model.state_dict().items())


def test_large_models_are_divided_and_listed_in_an_index(gpt: Trained, tmp_path: Path) -> None:
    """The index names the file of each tensor; the sum of their sizes is that of the whole; loading reads all."""
    card = gpt.export(tmp_path / "out", shard_bytes=600)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(card.weights) > 2
    assert set(index["weight_map"].values()) == set(card.weights)
    found = {name: set(safetensors.torch.load_file(tmp_path / "out" / name)) for name in card.weights}
    assert {tensor: name for name, tensors in found.items() for tensor in tensors} == index["weight_map"]
    sizes = (t.nbytes for n in card.weights for t in safetensors.torch.load_file(tmp_path / "out" / n).values())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert gpt.evaluation(load(tmp_path / "out", gpt.job.build_model)) == gpt.evaluation()


def test_the_card_says_what_the_export_holds(gpt: Trained, tmp_path: Path) -> None:
    """Run, step, the digest of the training state, metrics and the step at which they were made, seeds, job."""
    record_settings(gpt.directory, training={"job": "my:Job", "options": {"width": 3}, "seed": 7})
    card = replace(gpt.export(tmp_path / "out"), files={})
    order = ExportOrder(gpt.directory, NEWEST, "safetensors", tmp_path / "again")
    assert export_model(order).job == "my:Job"
    journal = open_storage(gpt.directory, run_id="run", retention=Retention(3, "highest")).journal
    (recorded,) = journal.rows(CheckpointRow)
    journal.close()
    assert (card.run_id, card.global_step, card.digest) == ("run", recorded.global_step, recorded.digest)
    assert (card.metrics, card.random_seed, card.job_options) == ({"loss": 1.5}, 7, {"width": 3})
    (seed,) = card.seeds
    assert (seed.seed_id, seed.blueprint, seed.slot, seed.alpha) == ("seed-0", "lora", "tokens", 0.5)
    assert read_card(tmp_path / "out") == replace(card, files=read_card(tmp_path / "out").files)


def test_a_seed_without_effect_is_left_out(tmp_path: Path) -> None:
    """One whose alpha is 0 is named in the card, and no tensor of it is in the files."""
    it = trained(tmp_path / "state", "support.export_jobs:TokensJob", growing=[("lora", "tokens")], growing_alpha=0.0)
    card = it.export(tmp_path / "out")
    assert card.grown == ()
    assert "alpha is 0" in card.seeds[0].left_out
    assert not any("seeds" in name for name in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    assert it.evaluation(load(tmp_path / "out", it.job.build_model)) == it.evaluation()


def test_an_existing_target_is_refused(gpt: Trained, tmp_path: Path) -> None:
    """Also an empty directory, a file and a link to nowhere; nothing changes there."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(ExportRefusedError, match=f"{name} exists already"):
            gpt.export(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_an_existing_target_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Also if there is nothing to export."""
    with pytest.raises(ExportRefusedError, match="exists already"):
        export_model(ExportOrder(tmp_path / "nowhere", NEWEST, "safetensors", tmp_path))


def test_a_target_that_appears_meanwhile_is_kept(gpt: Trained, tmp_path: Path) -> None:
    """An empty directory would be replaced by a rename."""

    class Slow(ExportFiles):
        def sync_directory(self, path: Path) -> None:
            super().sync_directory(path)
            (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(ExportRefusedError, match="exists already"):
        export_model(ExportOrder(gpt.directory, NEWEST, "safetensors", tmp_path / "out"), Slow())
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]


class FullDisk(ExportFiles):
    """A disk on which one kind of operation fails, at its `at`th call."""

    def __init__(self, operation: str, at: int) -> None:
        super().__init__()
        self.operation, self.left = operation, at

    def _fail_at(self, operation: str) -> None:
        if operation == self.operation:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, descriptor: int, content: memoryview) -> int:
        self._fail_at("write")
        return super().write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        self._fail_at("sync")
        super().sync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._fail_at("rename")
        super().rename(source, target)


@pytest.mark.parametrize(("operation", "at"), [("write", 1), ("write", 4), ("sync", 1), ("sync", 3), ("rename", 1)])
def test_an_export_that_fails_leaves_nothing(gpt: Trained, tmp_path: Path, operation: str, at: int) -> None:
    """Neither the target nor a part of it, wherever the disk fails."""
    order = ExportOrder(gpt.directory, NEWEST, "safetensors", tmp_path / "out")
    with pytest.raises(ExportFailedError, match="No space left"):
        export_model(order, FullDisk(operation, at))
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_complete_when_it_appears(gpt: Trained, tmp_path: Path) -> None:
    """All is written and flushed before the one rename that gives the directory its name."""
    seen: list[list[str]] = []

    class Watching(ExportFiles):
        def rename(self, source: Path, target: Path) -> None:
            seen.append(sorted(path.name for path in source.iterdir()))
            assert not target.exists()
            super().rename(source, target)

    export_model(ExportOrder(gpt.directory, NEWEST, "safetensors", tmp_path / "out"), Watching())
    assert seen == [sorted(path.name for path in (tmp_path / "out").iterdir())]
    assert CARD in seen[0]


def test_a_damaged_checkpoint_is_refused_by_its_digest(tmp_path: Path) -> None:
    """One changed byte of a tensor, and nothing is written; the checkpoint stays where it is."""
    it = trained(tmp_path / "state", "support.export_jobs:TokensJob")
    file = tmp_path / "state" / CHECKPOINTS / it.checkpoint_id / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for which in (NEWEST, it.checkpoint_id):
        with pytest.raises(CheckpointDamagedError, match="digest"):
            it.export(tmp_path / "out", checkpoint=which)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    assert file.exists()


def test_another_checkpoint_of_the_same_id_is_refused(tmp_path: Path) -> None:
    """One that is whole, but not the one that the journal has recorded."""
    it = trained(tmp_path / "state", "support.export_jobs:TokensJob")
    journal = open_storage(it.directory, run_id="run", retention=Retention(3, "highest")).journal
    (recorded,) = journal.rows(CheckpointRow)
    journal.put(replace(recorded, digest="0" * 32))
    journal.close()
    with pytest.raises(CheckpointDamagedError, match="another digest than the journal's"):
        it.export(tmp_path / "out")


def row(checkpoint_id: str, *, run_id: str = "b", metric: float | None = None, **fields: object) -> CheckpointRow:
    """A row of the journal."""
    return CheckpointRow(checkpoint_id, 0, run_id, 1, 1, 1, "d", metric, **fields)  # type: ignore[arg-type]


def test_the_newest_and_the_best_are_those_of_the_newest_run() -> None:
    """A suspect checkpoint is taken only without another one; a superseded one only by its id."""
    rows = [
        row("other", run_id="a", metric=0.99), row("first", metric=0.5), row("second", metric=0.9),
        row("third", metric=0.7), row("rising", suspect=1), row("undone", state="superseded", metric=1.0),
        row("gone", state="pruned", detail="retention"),
    ]  # fmt: skip
    assert choose(rows, NEWEST, direction="max").checkpoint_id == "third"
    assert choose(rows, BEST, direction="max").checkpoint_id == "second"
    assert choose(rows, BEST, direction="min").checkpoint_id == "first"
    assert choose(rows, "undone", direction="max").checkpoint_id == "undone"
    assert choose([row("rising", suspect=1)], NEWEST, direction="max").checkpoint_id == "rising"
    with pytest.raises(NoCheckpointError, match="pruned: retention"):
        choose(rows, "gone", direction="max")
    with pytest.raises(NoCheckpointError, match="no checkpoint has a metric"):
        choose([row("x")], BEST, direction="max")
    with pytest.raises(NoCheckpointError, match="no checkpoint yet"):
        choose([], NEWEST, direction="max")


def test_checkpoints_that_are_removed_too_quickly_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has gone by the time it is read, and the journal no longer lists it."""
    numbers = iter(range(100))
    monkeypatch.setattr("tolaria.export.source.read_journal", lambda *_: [row(f"point{next(numbers)}")])
    with pytest.raises(NoCheckpointError, match="removes checkpoints faster than one can be read"):
        read_source(tmp_path, NEWEST)


def test_a_child_process_is_killed_once_the_export_is_not_wanted(tmp_path: Path) -> None:
    """A drain does not wait for it."""
    stop, place = threading.Event(), tmp_path / "pid"
    code = (
        f"import os, pathlib, time; p = pathlib.Path({str(place)!r}); p.write_text(str(os.getpid())); time.sleep(600)"
    )
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(_run, [sys.executable, "-c", code], stop)
        until_s = time.monotonic() + 180
        while not (place.exists() and place.read_text()) and time.monotonic() < until_s:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(ExportFailedError, match="stopped before its end"):
            result.result(60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_stopped_export_leaves_nothing(gpt: Trained, tmp_path: Path) -> None:
    """Not even before its first file."""
    stop = threading.Event()
    stop.set()
    order = ExportOrder(gpt.directory, NEWEST, "safetensors", tmp_path / "exports" / "out")
    with pytest.raises(ExportFailedError, match="stopped before its end"):
        export_model(order, stop=stop)
    assert list((tmp_path / "exports").iterdir()) == []


def test_what_a_killed_process_has_left_is_removed(gpt: Trained, tmp_path: Path) -> None:
    """Whole exports stay."""
    gpt.export(tmp_path / "out")
    left = tmp_path / ".out.partial-01234567"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    remove_partial_exports(tmp_path)
    remove_partial_exports(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
