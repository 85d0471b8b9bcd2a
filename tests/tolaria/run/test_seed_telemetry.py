from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_UNKNOWN
from leyline.v1.state_pb2 import HardwareContext
from support.events import RecordingEmitter
from tolaria.config import GradientsSettings
from tolaria.lane.messages import EpochDone, SeedsChanged
from tolaria.run.seed_telemetry import SeedTelemetry
from tolaria.telemetry.metrics import Metrics
from tolaria.values.evaluation import Evaluation
from tolaria.values.gradients import SeedMetrics, SeedMetricSet


def gathered(*, share_delta: float = 0.0, conflict_ratio: float = 0.0, overall: float = 0.0) -> SeedMetricSet:
    """An epoch of the host and one seed."""

    def source(seed_id: str) -> SeedMetrics:
        is_host = seed_id == "host"
        return SeedMetrics(
            seed_id=seed_id,
            stage=SEED_STAGE_UNKNOWN if is_host else SEED_STAGE_BLENDING,
            weight=1.0,
            norm=2.0,
            share=0.5,
            share_delta=0.0 if is_host else share_delta,
            alpha=0.5,
            conflicts=1.0,
            conflict_ratio=0.0 if is_host else conflict_ratio,
            params=10,
            mask_fraction=1.0,
            teacher_share=0.0,
            layer_norms=(("body", 1.5),),
        )

    return SeedMetricSet(4, 8, 3, overall, 0.5, 1.0, 1.0, 0.5, (source("host"), source("a")))


class Recorded:
    """Seed telemetry and what it wrote."""

    def __init__(self, **settings: object) -> None:
        self.metrics, self.emitter = Metrics(), RecordingEmitter()
        chosen = GradientsSettings(**settings)  # type: ignore[arg-type]
        self.telemetry = SeedTelemetry(chosen, self.metrics, self.emitter)

    def epoch(self, number: int, gradients: SeedMetricSet, *, layers: bool) -> None:
        """Observes an epoch with these gradients."""
        done = EpochDone(number, 8, Evaluation(1.0, 1, 1), 1.0, 0.0, {}, 0.0, HardwareContext(), gradients=gradients)
        self.telemetry.on_epoch(done, show_layers=layers)

    @property
    def events(self) -> list[str]:
        """Names of the events so far."""
        return self.emitter.names

    def value(self, name: str, **labels: str) -> float | None:
        """A series, or None where there is none."""
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize(
    ("epoch", "event"),
    [
        (gathered(), []),
        (gathered(share_delta=-0.31), ["seed_share_jump"]),
        (gathered(conflict_ratio=0.5), ["seed_conflict_high"]),
        (gathered(overall=0.75), ["grad_conflict_high"]),
    ],
)
def test_thresholds_are_events(epoch: SeedMetricSet, event: list[str]) -> None:
    """A jump of a share, a seed's conflicts and all conflicts each have their event at their threshold."""
    recorded = Recorded()
    recorded.epoch(3, epoch, layers=True)
    assert recorded.events == event


def test_compact_is_one_event_a_seed() -> None:
    """In compact mode a seed has one seed_health event and no others; conflicts over all sources are still an event."""
    recorded = Recorded(compact=True)
    recorded.epoch(3, gathered(share_delta=0.9, conflict_ratio=0.9, overall=0.9), layers=True)
    assert recorded.events == ["grad_conflict_high", "seed_health"]


def test_every_source_has_its_series_and_loses_them_when_it_is_gone() -> None:
    """Series are by seed and stage; a seed that is no source any more, or a layer not asked for, has none."""
    recorded = Recorded()
    recorded.epoch(1, gathered(), layers=True)
    assert recorded.value("tolaria.grad_agg.seed.params", seed_id="a", stage="blending") == 10
    assert recorded.value("tolaria.grad_agg.seed.layer_norm", seed_id="a", layer="body") == 1.5
    assert recorded.value("tolaria.grad_agg.microbatches_total") == 8
    recorded.epoch(1, gathered(), layers=False)
    assert recorded.value("tolaria.grad_agg.seed.layer_norm", seed_id="a", layer="body") is None
    recorded.epoch(2, SeedMetricSet(4, 8, 3, 0.0, 0.5, 1.0, 1.0, 0.5, ()), layers=True)
    assert recorded.value("tolaria.grad_agg.seed.params", seed_id="a", stage="blending") is None
    assert recorded.value("tolaria.grad_agg.microbatches_total") == 24


def test_a_failed_rebuild_is_an_event_and_a_count() -> None:
    """The stage and the reason are in the event; the counter goes up."""
    recorded = Recorded()
    recorded.telemetry.on_seeds_changed(SeedsChanged(7, rebuild_error="build: no such option"))
    assert recorded.events == ["tolaria.opt_rebuild_failed"]
    assert recorded.value("tolaria.opt.rebuild_failures_total") == 1


def test_rates_of_removed_groups_are_removed() -> None:
    """A seed's rate leaves the dashboard with the seed."""
    recorded = Recorded()
    recorded.telemetry.on_learning_rates({"host": 0.1, "seed:a": 0.01})
    recorded.telemetry.on_learning_rates({"host": 0.1})
    assert recorded.value("tolaria.lr_controller.current_lr", group="host") == 0.1
    assert recorded.value("tolaria.lr_controller.current_lr", group="seed:a") is None
