from __future__ import annotations

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_HALF_OPEN,
    CIRCUIT_STATE_OPEN,
    CircuitBreakerState,
)
from support.events import RecordingEmitter
from tolaria.lane.messages import SeedsChanged, StepDone
from tolaria.run.safety import BREAKERS, Safeguards
from tolaria.run.safety_telemetry import SafetyTelemetry
from tolaria.run.status import RunStatus
from tolaria.telemetry.metrics import Metrics
from tolaria.values.optimization import LearningRateViolation

COOLDOWN_S = 30.0


class Guarded:
    """Safeguards with a clock and telemetry that the test reads."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        self.safeguards = Safeguards(
            SafetyTelemetry(self.metrics, self.emitter, BREAKERS, degraded=False),
            RunStatus("run", "job", "test", epochs=1, started_at_s=0.0),
            recovery_epochs=2,
            clock=lambda: self.now_s,
        )

    def state(self, name: str) -> CircuitBreakerState.ValueType:
        return self.safeguards.breakers[name].state

    def events(self) -> list[str]:
        return [name.removeprefix("tolaria.") for name in self.emitter.names]

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tolaria.{name}", labels)


def step(*, violated: bool = False, skipped: bool = False, rescaled: bool = False) -> StepDone:
    """Returns a step with one failure at most."""
    violations = (LearningRateViolation("host", 0.1, 7.0),) if violated else ()
    return StepDone(1, 1, 0.5, 1.0, 8, 0.01, 0.0, 0.0, skipped=skipped, violations=violations, rescaled=rescaled)


def test_breaches_open_the_boundary_breaker_and_good_boundaries_close_it() -> None:
    """Three open it; open it waits; after the cooldown one good boundary closes it. No epoch of training has failed."""
    guarded = Guarded()
    assert [guarded.safeguards.epoch_over(breach=True) for _ in range(3)] == [True] * 3
    assert guarded.state("boundary") == CIRCUIT_STATE_OPEN
    assert guarded.safeguards.take_opened() == ["boundary"]
    assert list(guarded.safeguards.mode.reasons) == ["epoch_failed:boundary_breach", "breaker_open:boundary"]
    assert [guarded.safeguards.epoch_over(breach=False) for _ in range(2)] == [True] * 2
    assert list(guarded.safeguards.mode.reasons) == ["breaker_open:boundary"]
    guarded.now_s = COOLDOWN_S
    assert guarded.state("boundary") == CIRCUIT_STATE_HALF_OPEN
    guarded.safeguards.epoch_over(breach=False)
    assert guarded.state("boundary") == CIRCUIT_STATE_CLOSED
    assert not guarded.safeguards.mode.on
    assert guarded.value("epochs.failed") == 0


def test_the_mode_and_its_reasons_are_reported() -> None:
    """Entering and leaving are one event each; metrics and status name every reason."""
    guarded = Guarded()
    guarded.safeguards.epoch_failing("peer_failure")
    guarded.safeguards.epoch_failing("non_finite")
    assert guarded.value("mode.conservative") == 1
    assert guarded.value("mode.conservative_reasons", reason="epoch_failed:peer_failure") == 1
    status = GetStatusResponse()
    guarded.safeguards.add_to(status)
    assert list(status.conservative_reasons) == ["epoch_failed:peer_failure", "epoch_failed:non_finite"]
    assert dict(status.breakers) == dict.fromkeys(BREAKERS, CIRCUIT_STATE_CLOSED)
    assert guarded.safeguards.epoch_over(breach=False) is False
    guarded.safeguards.epoch_over(breach=False)
    guarded.safeguards.epoch_over(breach=False)
    assert guarded.events() == ["conservative_mode_entered", "conservative_mode_cleared"]
    assert guarded.value("mode.conservative") == 0
    assert guarded.value("mode.conservative_reasons", reason="epoch_failed:peer_failure") == 0


def test_foreign_writes_in_a_row_open_the_integrity_breaker() -> None:
    """Three violations with no clean epoch between them; a clean epoch starts the streak anew."""
    guarded = Guarded()
    for _ in range(2):
        guarded.safeguards.step(step(violated=True))
    guarded.safeguards.epoch_over(breach=False)  # not clean: the streak goes on
    guarded.safeguards.epoch_over(breach=False)
    for _ in range(2):
        guarded.safeguards.step(step(violated=True))
    assert guarded.state("lr_integrity") == CIRCUIT_STATE_CLOSED
    guarded.safeguards.step(step(violated=True))
    assert guarded.state("lr_integrity") == CIRCUIT_STATE_OPEN
    assert guarded.safeguards.mode.reasons == ("breaker_open:lr_integrity",)
    assert guarded.safeguards.epoch_over(breach=False) is True  # training is not ill


def test_failed_rebuilds_open_the_optimizer_breaker() -> None:
    """Three failed rebuilds; a step without one does not close it."""
    guarded = Guarded()
    for _ in range(3):
        guarded.safeguards.seeds_changed(SeedsChanged(1, rebuild_error="validation: no"))
    assert guarded.state("optimizer") == CIRCUIT_STATE_OPEN
    guarded.safeguards.seeds_changed(SeedsChanged(1))
    assert guarded.state("optimizer") == CIRCUIT_STATE_OPEN


def test_a_skipped_step_is_no_failure() -> None:
    """Its epoch is healthy, and the mode is off; only training that is ill, as health finds it, fails an epoch."""
    guarded = Guarded()
    guarded.safeguards.step(step(skipped=True))
    assert not guarded.safeguards.mode.on
    assert guarded.safeguards.epoch_over(breach=False) is True
    guarded.safeguards.epoch_failing("loss_explosion")
    assert guarded.safeguards.epoch_over(breach=False) is False
    assert guarded.value("epochs.failed") == 1


def test_a_peer_that_fails_keeps_the_mode_on_and_fails_no_epoch() -> None:
    """The mode ends after healthy epochs in which no peer has failed."""
    guarded = Guarded()
    for _ in range(5):
        guarded.safeguards.disturbed("peer_failure")
        assert guarded.safeguards.epoch_over(breach=False) is True
        assert guarded.safeguards.mode.reasons == ("epoch_failed:peer_failure",)
    guarded.safeguards.epoch_over(breach=False)
    guarded.safeguards.epoch_over(breach=False)
    assert not guarded.safeguards.mode.on
    assert guarded.value("epochs.failed") == 0


def test_a_half_open_peer_gets_its_trial_while_the_mode_is_on() -> None:
    """The mode is on because of the breaker, and the breaker closes by a call: that one call is let through."""
    guarded = Guarded()
    for _ in range(3):
        guarded.safeguards.breakers["tamiyo"].failed()
    assert not guarded.safeguards.permits("tamiyo")
    guarded.now_s = COOLDOWN_S
    assert guarded.safeguards.permits("tamiyo")
    assert not guarded.safeguards.permits("kasmina")
    assert not guarded.safeguards.all_closed
    guarded.safeguards.breakers["tamiyo"].succeeded()
    assert guarded.safeguards.permits("kasmina")
    assert guarded.safeguards.all_closed
