"""Gradient metrics of one epoch by source, and the alarms that they raise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from leyline.v1.enums_pb2 import SeedLifecycleStage
from tolaria.config import GradientsSettings
from tolaria.values.training import HOST


@dataclass(frozen=True, slots=True)
class SeedMetrics:
    """The metrics of one source over one epoch. Means are over the steps in which the source had a row.

    Attributes:
        seed_id: the seed, or `host`.
        stage: at the last step; UNKNOWN for the host.
        weight: mean weight of the row, over all steps.
        norm: mean norm of the row, the teacher's share included.
        share: mean fraction of the sum of all rows' norms, 0 to 1.
        share_delta: `share` minus that of the epoch before; 0 in the first.
        alpha: at the last step.
        conflicts: mean number of other rows that the row conflicts with.
        conflict_ratio: `conflicts` divided by the number of other rows, 0 to 1.
        params: number of elements of the seed's parameters.
        mask_fraction: fraction of all microbatches in which the source had a loss.
        teacher_share: mean fraction of the row that is the teacher's; for the host, its fraction of all rows.
        layer_norms: the layers with the largest mean norm of the row (before attribution), largest first.
    """

    seed_id: str
    stage: SeedLifecycleStage.ValueType
    weight: float
    norm: float
    share: float
    share_delta: float
    alpha: float
    conflicts: float
    conflict_ratio: float
    params: int
    mask_fraction: float
    teacher_share: float
    layer_norms: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class SeedMetricSet:
    """The metrics of one epoch over all sources. Rates are means over steps."""

    steps: int
    microbatches: int
    conflicts: int
    conflict_ratio: float
    pair_conflict_ratio: float
    weights_mean: float
    pcgrad_applied: float
    teacher_share: float
    sources: tuple[SeedMetrics, ...]

    @property
    def seeds(self) -> tuple[SeedMetrics, ...]:
        """All sources except the host."""
        return tuple(source for source in self.sources if source.seed_id != HOST)


class AlarmKind(Enum):
    """The kind of threshold that was reached."""

    SHARE_JUMP = "share jump"
    SEED_CONFLICT = "seed conflict"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Alarm:
    """One threshold that was reached. `seed_id` is empty for the overall conflict ratio."""

    kind: AlarmKind
    seed_id: str
    value: float
    threshold: float


def alarms(metrics: SeedMetricSet, thresholds: GradientsSettings) -> tuple[Alarm, ...]:
    """Returns an alarm for each threshold that the epoch reached, in absolute value."""
    return tuple(alarm for alarm in _candidates(metrics, thresholds) if abs(alarm.value) >= alarm.threshold)


def _candidates(metrics: SeedMetricSet, thresholds: GradientsSettings) -> Iterator[Alarm]:
    yield Alarm(AlarmKind.CONFLICT, "", metrics.conflict_ratio, thresholds.conflict)
    for seed in metrics.seeds:
        yield Alarm(AlarmKind.SEED_CONFLICT, seed.seed_id, seed.conflict_ratio, thresholds.seed_conflict)
        yield Alarm(AlarmKind.SHARE_JUMP, seed.seed_id, seed.share_delta, thresholds.share_jump)
