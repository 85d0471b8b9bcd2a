from __future__ import annotations

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import (
    CIRCUIT_STATE_CLOSED,
    CIRCUIT_STATE_HALF_OPEN,
    CIRCUIT_STATE_OPEN,
    HEALTH_STATUS_DEGRADED,
    HEALTH_STATUS_HEALTHY,
    HEALTH_STATUS_UNHEALTHY,
    CircuitBreakerState,
)
from leyline.v1.telemetry_pb2 import SystemHealth
from support.events import RecordingEmitter
from tolaria.optimization import Violation
from tolaria.telemetry.metrics import Metrics
from tolaria.training.growth import SeedsReport
from tolaria.training.reports import StepReport
from tolaria.training.safeguards import BREAKERS, Safeguards

COOLDOWN_S = 30.0


class Ward:
    """Safeguards with a clock and telemetry of their own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        self.opened: list[str] = []
        self.it = Safeguards(
            recovery_epochs=2,
            metrics=self.metrics,
            emitter=self.emitter,
            changed=lambda: None,
            opened=self.opened.append,
            clock=lambda: self.now_s,
        )

    def state(self, name: str) -> CircuitBreakerState.ValueType:
        return self.it.breakers[name].state

    def events(self) -> list[str]:
        return [event.name.removeprefix("tolaria.") for event in self.emitter.events]

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tolaria.{name}", labels)


def step(*, violated: bool = False, void: bool = False, rescaled: bool = False) -> StepReport:
    """A step report with one mishap at most."""
    violations = (Violation("host", 0.1, 7.0),) if violated else ()
    return StepReport(1, 1, 0.5, 1.0, 8, 0.01, 0.0, 0.0, void=void, violations=violations, rescaled=rescaled)


def test_failed_epochs_open_the_boundary_breaker_and_good_ones_close_it() -> None:
    """Three breaches open it; open it waits; after the cooldown one good epoch closes it and the mode can end."""
    ward = Ward()
    assert [ward.it.epoch_over(breach=True) for _ in range(3)] == [False] * 3
    assert ward.state("boundary") == CIRCUIT_STATE_OPEN
    assert ward.opened == ["boundary"]
    assert list(ward.it.mode.reasons) == ["epoch_failed:boundary_breach", "breaker_open:boundary"]
    assert [ward.it.epoch_over(breach=False) for _ in range(2)] == [True] * 2
    assert list(ward.it.mode.reasons) == ["breaker_open:boundary"]
    ward.now_s = COOLDOWN_S
    assert ward.state("boundary") == CIRCUIT_STATE_HALF_OPEN
    ward.it.epoch_over(breach=False)
    assert ward.state("boundary") == CIRCUIT_STATE_CLOSED
    assert not ward.it.mode.on
    assert ward.value("epochs.failed") == 3


def test_the_mode_and_its_reasons_are_told() -> None:
    """Entering and leaving are one event each; metrics and status name every reason."""
    ward = Ward()
    ward.it.failing("peer_failure")
    ward.it.failing("non_finite")
    assert ward.value("mode.conservative") == 1
    assert ward.value("mode.conservative_reasons", reason="epoch_failed:peer_failure") == 1
    status = GetStatusResponse()
    ward.it.tell(status)
    assert list(status.conservative_reasons) == ["epoch_failed:peer_failure", "epoch_failed:non_finite"]
    assert dict(status.breakers) == dict.fromkeys(BREAKERS, CIRCUIT_STATE_CLOSED)
    assert ward.it.epoch_over(breach=False) is False
    ward.it.epoch_over(breach=False)
    ward.it.epoch_over(breach=False)
    assert ward.events() == ["conservative_mode_entered", "conservative_mode_cleared"]
    assert ward.value("mode.conservative") == 0
    assert ward.value("mode.conservative_reasons", reason="epoch_failed:peer_failure") == 0


def test_foreign_writes_in_a_row_open_the_integrity_breaker() -> None:
    """Three violations with no clean epoch between them; a clean epoch starts the row anew."""
    ward = Ward()
    for _ in range(2):
        ward.it.step(step(violated=True))
    ward.it.epoch_over(breach=False)  # not clean: the row goes on
    ward.it.epoch_over(breach=False)
    for _ in range(2):
        ward.it.step(step(violated=True))
    assert ward.state("lr_integrity") == CIRCUIT_STATE_CLOSED
    ward.it.step(step(violated=True))
    assert ward.state("lr_integrity") == CIRCUIT_STATE_OPEN
    assert ward.it.mode.reasons == ("breaker_open:lr_integrity",)
    assert ward.it.epoch_over(breach=False) is False


def test_failed_rebuilds_open_the_optimizer_breaker() -> None:
    """Three rebuilds that failed; seeds are left alone from then on."""
    ward = Ward()
    for _ in range(3):
        ward.it.rebuilt(SeedsReport(1, rebuild_error="validation: no"))
    assert ward.state("optimizer") == CIRCUIT_STATE_OPEN
    ward.it.rebuilt(SeedsReport(1))
    assert ward.state("optimizer") == CIRCUIT_STATE_OPEN


def test_a_void_step_fails_its_epoch_and_a_rescaled_one_does_not() -> None:
    """float16's loss scale being lowered is no mistake."""
    ward = Ward()
    ward.it.step(step(void=True, rescaled=True))
    assert not ward.it.mode.on
    ward.it.step(step(void=True))
    assert ward.it.mode.reasons == ("epoch_failed:non_finite",)


def test_a_half_open_peer_gets_its_trial_while_the_mode_is_on() -> None:
    """The mode is on because of the breaker, and the breaker closes by a call: that one call is let through."""
    ward = Ward()
    for _ in range(3):
        ward.it.breakers["tamiyo"].failed()
    assert not ward.it.permits("tamiyo")
    ward.now_s = COOLDOWN_S
    assert ward.it.permits("tamiyo")
    assert not ward.it.permits("kasmina")
    assert not ward.it.all_closed
    ward.it.breakers["tamiyo"].succeeded()
    assert ward.it.permits("kasmina")
    assert ward.it.all_closed


def test_a_breaker_that_is_not_closed_degrades_the_health() -> None:
    """A run that is well otherwise is degraded while a breaker is open, with its name; a failed one stays unhealthy."""
    safeguards = Ward().it
    healthy = GetStatusResponse(health=SystemHealth(status=HEALTH_STATUS_HEALTHY))
    safeguards.tell(healthy)
    assert healthy.health.status == HEALTH_STATUS_HEALTHY
    safeguards.force("tamiyo", CIRCUIT_STATE_OPEN)
    for before, after in ((HEALTH_STATUS_HEALTHY, HEALTH_STATUS_DEGRADED), (HEALTH_STATUS_UNHEALTHY,) * 2):
        status = GetStatusResponse(health=SystemHealth(status=before))
        safeguards.tell(status)
        assert status.health.status == after
    assert healthy.health.summary == ""
