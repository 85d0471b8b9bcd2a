from __future__ import annotations

import pytest

from leyline.v1 import enums_pb2
from tolaria.config import GradientsSettings
from tolaria.values.gradients import Alarm, AlarmKind, SeedMetrics, SeedMetricSet, alarms
from tolaria.values.training import HOST

BLENDING = enums_pb2.SEED_STAGE_BLENDING
THRESHOLDS = GradientsSettings(share_jump=0.3, seed_conflict=0.5, conflict=0.75)


def metrics(**changes: float) -> SeedMetricSet:
    """An epoch of one seed with the given change of share and conflict ratios."""
    seed = SeedMetrics("s", BLENDING, 1, 1, 0.5, changes.get("delta", 0), 1, 0, changes.get("seed", 0), 0, 1, 0, ())
    host = SeedMetrics(HOST, BLENDING, 1, 1, 0.5, 0.9, 1, 0, 0.9, 0, 1, 0, ())
    return SeedMetricSet(1, 1, 0, changes.get("all", 0), 0, 1, 1, 0, (host, seed))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        ({"delta": 0.29, "seed": 0.49, "all": 0.74}, ()),
        ({"delta": 0.3}, (Alarm(AlarmKind.SHARE_JUMP, "s", 0.3, 0.3),)),
        ({"delta": -0.4}, (Alarm(AlarmKind.SHARE_JUMP, "s", -0.4, 0.3),)),
        ({"seed": 0.5}, (Alarm(AlarmKind.SEED_CONFLICT, "s", 0.5, 0.5),)),
        ({"all": 0.75}, (Alarm(AlarmKind.CONFLICT, "", 0.75, 0.75),)),
    ],
)
def test_alarms_by_threshold(changes: dict[str, float], expected: tuple[Alarm, ...]) -> None:
    """A value equal to its threshold raises an alarm, shares in either direction; the host raises none."""
    assert alarms(metrics(**changes), THRESHOLDS) == expected


def test_seeds_exclude_the_host() -> None:
    """`seeds` holds every source except the host."""
    assert [seed.seed_id for seed in metrics().seeds] == ["s"]
