"""The curves of earlier processes of a run, read from its log of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.status_page import earlier
from tolaria.status_page.curves import Curve
from tolaria.status_page.earlier import earlier_curves
from tolaria.trackers.metrics_log import MetricsLog
from tolaria.trackers.records import METRICS_DIR, segment_path, segments_in, to_line
from tolaria.trackers.tracker import Note, Point, Record, Rewind, TrackedRun
from tolaria.values.lineage import Lineage


def run(step: int = 0, run_id: str = "one") -> TrackedRun:
    """A run that starts or resumes at a step."""
    return TrackedRun(run_id, "name", "experiment", "digits", {}, {}, step, 1, 1.5)


def losses(first: int, last: int, value: float, attempt: int = 1) -> list[Record]:
    """A loss for each of these steps."""
    return [Point(step, attempt, 1, 2.0, {"train/loss": value}) for step in range(first, last + 1)]


def write(state: Path, *records: Record, size: int = 8_000_000) -> Path:
    """Writes a log; returns its newest segment."""
    log = MetricsLog(state / METRICS_DIR, size)
    log.start()
    for record in records:
        log.put(record)
    assert log.close(30)
    return segment_path(state / METRICS_DIR, segments_in(state / METRICS_DIR)[-1])


def values(curve: Curve) -> dict[int, float]:
    """The mean by step of a curve that is not condensed."""
    return {point.first: point.mean for point in curve.points}


def test_each_curve_of_the_page_is_found_in_the_log(tmp_path: Path) -> None:
    """Of losses, evaluations, learning rates and what the job logs; a point that was not finite is left out."""
    step = Point(10, 1, 1, 2.0, {"train/loss": 0.5, "train/gradient_norm": 2.0, "train/thirds": 3.0})
    bad = Point(20, 1, 1, 2.0, {"train/loss": float("nan"), "train/thirds": 4.0})
    epoch = {"train/epoch_loss": 9.0, "validation/loss": 0.25, "validation/accuracy": 0.75, "validation/far/f1": 0.1}
    write(tmp_path, run(), step, bad, Point(20, 1, 1, 2.0, {**epoch, "lr/host/0": 0.01, "seeds/active": 1.0}))
    found = earlier_curves(tmp_path, "one", Lineage(), 20)
    assert {name: values(curve) for name, curve in found.items()} == {
        "loss": {10: 0.5},
        "validation_loss": {20: 0.25},
        "accuracy": {20: 0.75},
        "boundary_ms": {},
        "step/thirds": {10: 3.0, 20: 4.0},
        "evaluation/far/f1": {20: 0.1},
        "rate/host/0": {20: 0.01},
    }
    assert found.first_step == 10


@pytest.mark.parametrize(
    ("lineage", "step", "expected"),
    [
        (Lineage().back_to(4, 2), 6, {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0}),
        (Lineage(), 8, {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}),  # of the attempt that was left: what is known of it
        (Lineage(), 3, {1: 1.0, 2: 1.0, 3: 1.0}),
    ],
)
def test_only_points_that_led_to_the_state_are_left(
    lineage: Lineage, step: int, expected: dict[int, float], tmp_path: Path
) -> None:
    """After a rollback, and a crash that lost the steps after the checkpoint."""
    write(
        tmp_path,
        run(0, "zero"),
        *losses(1, 3, 9.0),
        run(),
        *losses(1, 8, 1.0),
        Rewind(4, 2, 3.0),
        *losses(5, 9, 2.0, 2),
    )
    assert values(earlier_curves(tmp_path, "one", lineage, step)["loss"]) == expected


def test_damaged_lines_cost_their_points_only(tmp_path: Path) -> None:
    """Garbage, a torn line, wrong types: whatever a disk makes of them."""
    newest = write(tmp_path, run(), *losses(1, 5, 1.0), Note(5, 1, 1.0, "seen"), *losses(6, 7, 1.0))
    lines = newest.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"global_step":2', b'"global_step":"2"')
    lines[3] = b"\x00" * 40 + b"\n"
    lines[4] = lines[4].replace(b"1.0}", b'["x"]}')
    lines[5:5] = [b"[" * 100_000 + b"\n", b"\xff\xfe\n", to_line(losses(9, 9, 1.0)[0])[:20] + b"\n"]
    newest.write_bytes(b"".join(lines) + b'{"kind":"point","glo')
    assert list(values(earlier_curves(tmp_path, "one", Lineage(), 10)["loss"])) == [1, 5, 6, 7]


def test_only_the_newest_part_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several segments, from within a line on; the run goes on in it."""
    write(tmp_path, run(), *losses(1, 900, 1.0), size=8 * 20_000)
    assert len(segments_in(tmp_path / METRICS_DIR)) > 3
    line = len(to_line(losses(800, 800, 1.0)[0]))
    monkeypatch.setattr(earlier, "READ_BYTES_MAX", 500 * line + line // 2)
    found = earlier_curves(tmp_path, "one", Lineage(), 900)
    (loss,) = [curve for name, curve in found.items() if name == "loss"]
    assert loss.points[-1].last == 900
    assert sum(point.count for point in loss.points) == pytest.approx(500, abs=10)


def test_without_a_log_the_curves_begin_with_this_process(tmp_path: Path) -> None:
    """So also if it is of another run, or cannot be read."""
    assert earlier_curves(tmp_path, "one", Lineage(), 9).first_step is None
    write(tmp_path, run(0, "zero"), *losses(1, 3, 1.0), run(0, "other"), *losses(1, 3, 1.0))
    assert earlier_curves(tmp_path, "one", Lineage(), 9).first_step is None
    (tmp_path / METRICS_DIR / "metrics-000002.jsonl").mkdir()
    assert earlier_curves(tmp_path, "other", Lineage(), 9).first_step is None
