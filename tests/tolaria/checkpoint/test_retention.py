from __future__ import annotations

import pytest

from tolaria.checkpoint.retention import Retention, kept_of_all, kept_rows
from tolaria.journal.rows import CheckpointRow

HIGHEST = Retention(last=3, best="highest")
LOWEST = Retention(last=3, best="lowest")


def rows(*described: tuple[int, float | None]) -> tuple[CheckpointRow, ...]:
    """Rows with these steps and metrics."""
    return tuple(CheckpointRow(f"c{step}", step, "r", step, 1, 1, "d", metric) for step, metric in described)


@pytest.mark.parametrize(
    ("described", "retention", "kept"),
    [
        ([], HIGHEST, []),
        ([(1, None), (2, None), (3, None), (4, None)], HIGHEST, [2, 3, 4]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], HIGHEST, [1, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], LOWEST, [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)], HIGHEST, [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1)], Retention(last=1, best="highest"), [1, 2]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    described: list[tuple[int, float | None]], retention: Retention, kept: list[int]
) -> None:
    """Of equally good checkpoints the newest is best; without a metric none is."""
    assert sorted(row.global_step for row in kept_rows(rows(*described), retention)) == kept


def rows_of_runs(described: str) -> tuple[CheckpointRow, ...]:
    """One row for each letter, which is its run: oldest first, each with a lower metric than the one before."""
    return tuple(CheckpointRow(f"{run}{n}", n, run, n, 1, 1, "d", -float(n)) for n, run in enumerate(described))


@pytest.mark.parametrize(
    ("described", "kept"),
    [
        ("", ""),
        ("aaaa", "a0 a2 a3"),
        ("bbbaaa", "a3 a4 a5 b0 b2"),
        ("bcdeaaa", "a4 a5 a6 d2 e3"),
        ("bbcdea", "a5 d3 e4"),
        ("bcab", "a2 b0 b3 c1"),
        ("bbcc", "b0 b1 c2 c3"),
    ],
)
def test_other_runs_keep_their_newest_and_best(described: str, kept: str) -> None:
    """Only the newest other runs count, however many checkpoints the active run `a` has."""
    retention = Retention(last=2, best="highest", other_runs=2)
    found = kept_of_all(rows_of_runs(described), retention, run_id="a")
    assert " ".join(sorted(row.checkpoint_id for row in found)) == kept
