from __future__ import annotations

import pytest

from tolaria.rollback import CheckpointRow, Retention
from tolaria.rollback.retention import kept_of_all, kept_rows


def rows(*described: tuple[int, float | None]) -> tuple[CheckpointRow, ...]:
    """Rows of these steps and metrics."""
    return tuple(CheckpointRow(f"c{step}", step, "r", step, 1, 1, "d", metric) for step, metric in described)


@pytest.mark.parametrize(
    ("described", "retention", "kept"),
    [
        ([], Retention(), []),
        ([(1, None), (2, None), (3, None), (4, None)], Retention(), [2, 3, 4]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], Retention(), [1, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)], Retention(best="lowest"), [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)], Retention(), [2, 3, 4, 5]),
        ([(1, 0.9), (2, 0.1)], Retention(last=1), [1, 2]),
    ],
)
def test_retention(described: list[tuple[int, float | None]], retention: Retention, kept: list[int]) -> None:
    """The newest ones and the best stay; of equals the newest is the best; without a metric none is."""
    assert sorted(row.global_step for row in kept_rows(rows(*described), retention)) == kept


def of_runs(described: str) -> tuple[CheckpointRow, ...]:
    """One row for each letter, which is its run: oldest first, each with a metric lower than the one before."""
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
def test_retention_of_other_runs(described: str, kept: str) -> None:
    """Of the newest other runs their newest and their best stay, whatever of its own the run that goes on has."""
    retention = Retention(last=2, other_runs=2)
    found = kept_of_all(of_runs(described), retention, run_id="a")
    assert " ".join(sorted(row.checkpoint_id for row in found)) == kept
