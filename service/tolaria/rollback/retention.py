"""Which checkpoints stay when there are more than are kept. Pure; knows no directory and no journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tolaria.rollback.journal_rows import CheckpointRow


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay: the newest `last`, and the best by metric.

    Of other runs in the same directory their newest and their best stay, for the newest `other_runs` of them: what an
    earlier run was for must not go because a later one begins, and a directory that is used for years must not fill.
    """

    last: int = 3
    best: Literal["highest", "lowest"] = "highest"
    other_runs: int = 3


def kept_rows(rows: Sequence[CheckpointRow], retention: Retention) -> set[CheckpointRow]:
    """Those of one run's committed rows, oldest first, that stay. Of equally good ones the newest is best."""
    kept = set(rows[-retention.last :]) if retention.last > 0 else set()
    sign = 1.0 if retention.best == "highest" else -1.0
    rated = [(sign * row.metric, row.at_ns, row) for row in rows if row.metric is not None]
    if rated:
        kept.add(max(rated, key=lambda entry: entry[:2])[2])
    return kept


def kept_of_all(rows: Sequence[CheckpointRow], retention: Retention, *, run_id: str) -> set[CheckpointRow]:
    """Those of all runs' committed rows, oldest first, that stay while `run_id` is the run that goes on."""
    by_run: dict[str, list[CheckpointRow]] = {}
    for row in reversed(rows):
        by_run.setdefault(row.run_id, []).insert(0, row)
    kept = kept_rows(by_run.pop(run_id, []), retention)
    for others in list(by_run.values())[: retention.other_runs]:  # the run with the newest row first
        kept |= kept_rows(others, replace(retention, last=1))
    return kept
