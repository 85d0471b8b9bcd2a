"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tolaria.journal.rows import CheckpointRow


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints are kept: of this run the newest `last` and the best by metric.

    Of the newest `other_runs` runs in the same directory the newest and the best checkpoint are kept, so that a new
    run does not remove an earlier run's result, and a directory in use for years does not fill up.
    """

    last: int
    best: Literal["highest", "lowest"]
    other_runs: int = 3


def kept_rows(rows: Sequence[CheckpointRow], retention: Retention) -> set[CheckpointRow]:
    """Selects what to keep of one run's committed rows, oldest first. Of equally good ones the newest is best."""
    kept = set(rows[-retention.last :]) if retention.last > 0 else set()
    sign = 1.0 if retention.best == "highest" else -1.0
    rated = [(sign * row.metric, row.at_ns, row) for row in rows if row.metric is not None]
    if rated:
        kept.add(max(rated, key=lambda entry: entry[:2])[2])
    return kept


def kept_of_all(rows: Sequence[CheckpointRow], retention: Retention, *, run_id: str) -> set[CheckpointRow]:
    """Selects what to keep of all runs' committed rows, oldest first, while `run_id` is the active run."""
    by_run: dict[str, list[CheckpointRow]] = {}
    for row in reversed(rows):
        by_run.setdefault(row.run_id, []).insert(0, row)
    kept = kept_rows(by_run.pop(run_id, []), retention)
    for others in list(by_run.values())[: retention.other_runs]:  # the run with the newest row first
        kept |= kept_rows(others, replace(retention, last=1))
    return kept
