from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.reference.history import RUNS_MAX, EpochRecord, HistoryFiles, RunHistory, SeedOutcome, SeedTrial

HISTORY = RunHistory(
    first_loss=2.0,
    records=(EpochRecord(1, 100, 2.0, math.nan, math.inf), EpochRecord(2, 200, 1.0, 1.0, 0.5, "germinate", "lora")),
    trials=(SeedTrial("s", 100, 150, -math.inf, 160, 2), SeedTrial("t", 120)),
    outcomes=(SeedOutcome("r", 90, gained=True),),
    rate_changes=(50,),
)


def test_a_saved_history_is_read_again(tmp_path: Path) -> None:
    """By another object, with every field; runs are apart, and their ids need not be file names."""
    files = HistoryFiles(tmp_path / "peers")
    files.save("a/../b", HISTORY)
    assert repr(HistoryFiles(tmp_path / "peers").load("a/../b")) == repr(HISTORY)
    assert repr(files.load("other")) == repr(RunHistory())
    assert not list(tmp_path.glob("*.json"))


def test_without_a_directory_nothing_is_kept() -> None:
    """Saving does nothing."""
    HistoryFiles(None).save("run", HISTORY)
    assert repr(HistoryFiles(None).load("run")) == repr(RunHistory())


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    """The newest run's file is kept."""
    files = HistoryFiles(tmp_path)
    for number in range(RUNS_MAX + 5):
        files.save(f"run {number}", HISTORY)
    assert len(list(tmp_path.iterdir())) == RUNS_MAX
    assert files.load(f"run {RUNS_MAX + 4}").records


@given(damage=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | st.just(b'{"records": [1]}'))
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_file_counts_as_none(tmp_path_factory: pytest.TempPathFactory, damage: bytes, *, cut: bool) -> None:
    """Whatever is in it; the next save replaces it."""
    directory = tmp_path_factory.mktemp("peers")
    files = HistoryFiles(directory)
    files.save("run", HISTORY)
    (path,) = directory.iterdir()
    path.write_bytes(path.read_bytes()[: len(damage)] if cut else damage)
    assert files.load("run").records == ()
    files.save("run", HISTORY)
    assert repr(files.load("run")) == repr(HISTORY)


def test_a_directory_that_cannot_be_written_changes_no_decision(tmp_path: Path) -> None:
    """Saving fails without an error."""
    (tmp_path / "peers").write_text("a file")
    files = HistoryFiles(tmp_path / "peers")
    files.save("run", HISTORY)
    assert files.load("run").records == ()
