"""An epoch's gradient metrics as data, and which of them are worth an event. Pure; holds no tensors.

Knows nothing of how they are gathered, nor of metric and event names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tolaria.gradients.weights import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leyline.v1.enums_pb2 import SeedLifecycleStage


@dataclass(frozen=True, slots=True)
class SeedMetrics:
    """One source over one epoch. Means are over the steps that it had a row in, unless told.

    Attributes:
        seed_id: the seed, or `host`.
        stage: at the last step; UNKNOWN for the host.
        weight: mean weight of its row over all steps.
        norm: mean norm of its row, the teacher's share included.
        share: mean part of all rows' norms that is its own, 0 to 1.
        share_delta: `share` minus that of the epoch before; 0 in its first.
        alpha: at the last step.
        conflicts: mean number of other rows that its row conflicts with.
        conflict_ratio: the same divided by the number of other rows, 0 to 1.
        params: number of elements that it owns.
        mask_fraction: part of all microbatches that it took part in.
        teacher_share: mean part of its row that is the teacher's; for the host, the host's part of all rows.
        layer_norms: layers with the largest mean norm of its row (before sharing), largest first.
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
    """One epoch over all sources. Rates are means over steps."""

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
        """All sources but the host."""
        return tuple(source for source in self.sources if source.seed_id != HOST)


class AlarmKind(Enum):
    """Which threshold an epoch went over."""

    SHARE_JUMP = "share jump"
    SEED_CONFLICT = "seed conflict"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Alarm:
    """One threshold that was reached. `seed_id` is empty when it is about all of them."""

    kind: AlarmKind
    seed_id: str
    value: float
    threshold: float


@dataclass(frozen=True, slots=True)
class AlarmThresholds:
    """From which value on an epoch is worth an event: change of a share, a seed's conflict ratio, the overall one."""

    share_jump: float = 0.3
    seed_conflict: float = 0.5
    conflict: float = 0.75


def alarms(metrics: SeedMetricSet, thresholds: AlarmThresholds) -> tuple[Alarm, ...]:
    """All thresholds that the epoch reached. Pure."""
    return tuple(alarm for alarm in _measured(metrics, thresholds) if abs(alarm.value) >= alarm.threshold)


def _measured(metrics: SeedMetricSet, thresholds: AlarmThresholds) -> Iterator[Alarm]:
    yield Alarm(AlarmKind.CONFLICT, "", metrics.conflict_ratio, thresholds.conflict)
    for seed in metrics.seeds:
        yield Alarm(AlarmKind.SEED_CONFLICT, seed.seed_id, seed.conflict_ratio, thresholds.seed_conflict)
        yield Alarm(AlarmKind.SHARE_JUMP, seed.seed_id, seed.share_delta, thresholds.share_jump)
