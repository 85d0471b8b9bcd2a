"""Events about the time that epochs and their boundaries take."""

from __future__ import annotations

import math

import pytest

from leyline.v1.state_pb2 import HardwareContext
from support.events import RecordingEmitter
from tolaria.lane.messages import EpochDone, StepDone
from tolaria.run.status import RunStatus
from tolaria.run.training_telemetry import TrainingTelemetry
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.values.evaluation import Evaluation


class Epochs:
    """Ends epochs of ten steps, one after the other, at a factor of 3."""

    def __init__(self) -> None:
        self.emitter = RecordingEmitter()
        self.telemetry = TrainingTelemetry(Metrics(), self.emitter, LogContext(), run_id="run", latency_factor=3.0)
        self.status = RunStatus("run", "job", "", epochs=100, started_at_s=0.0)

    def end(self, step_s: float, *, boundary_ms: float = 1.0, budget_ms: float = 18.0, breach: bool = False) -> None:
        """Ends one whose steps took `step_s` each."""
        self.status.begin_epoch(self.status.epoch + 1)
        for _ in range(10):
            self.status.sums.add(StepDone(1, 1, 1.0, 1.0, 8, step_s, 0.0, 0.0))
        self.status.boundary(boundary_ms, breach=breach)
        epoch = EpochDone(self.status.epoch, 10, Evaluation(1.0, 1, 1), 1.0, 0.0, {}, 0.0, HardwareContext())
        self.telemetry.on_boundary(self.status, epoch, budget_ms=budget_ms, breach=breach)


@pytest.mark.parametrize(
    ("before_s", "step_s", "reported"),
    [
        ([0.1, 0.1, 0.1], 0.31, True),
        ([0.1, 0.1, 0.1], 0.29, False),
        ([0.1, 9.0, 0.1, 0.1], 0.31, True),  # the median counts
        ([0.1, 0.1], 9.0, False),  # too few to compare with
        ([0.01, 0.01, 0.01], 0.1, False),  # less than a second more in all
    ],
)
def test_an_epoch_that_takes_unusually_long_is_reported(before_s: list[float], step_s: float, reported: bool) -> None:
    """More than three times as long as usual, and a second at least, compared by step."""
    epochs = Epochs()
    for earlier_s in before_s:
        epochs.end(earlier_s)
    count = len(epochs.emitter.attributes_of("latency_high"))
    epochs.end(step_s)
    found = epochs.emitter.attributes_of("latency_high")[count:]
    assert bool(found) is reported
    if found:
        assert float(found[0]["latency_ms"]) == pytest.approx(10_000 * step_s, rel=1e-3)
        assert float(found[0]["usual_ms"]) == pytest.approx(1000.0)


def test_a_level_that_stays_is_usual_after_a_while() -> None:
    """The machine may have become slower for good: that is reported a few times, and then no longer."""
    epochs = Epochs()
    for _ in range(16):
        epochs.end(0.1)
    for _ in range(40):
        epochs.end(0.5)
    assert len(epochs.emitter.attributes_of("latency_high")) == 8  # until the median has moved


@pytest.mark.parametrize(
    ("boundary_ms", "budget_ms", "breach", "expected"),
    [
        (17.0, 18.0, False, []),
        (19.0, 18.0, False, ["epoch_hook_latency_high"]),  # within the slack, which is no breach
        (30.0, 18.0, True, ["epoch_hook_latency_high", "tolaria.epoch_budget_exceeded"]),
        (900.0, math.inf, False, []),  # a deterministic run waits for every answer
    ],
)
def test_a_boundary_over_its_budget_is_reported(
    boundary_ms: float, budget_ms: float, breach: bool, expected: list[str]
) -> None:
    """Beyond the slack it is a breach, too."""
    epochs = Epochs()
    epochs.end(0.1, boundary_ms=boundary_ms, budget_ms=budget_ms, breach=breach)
    assert epochs.emitter.names == expected
