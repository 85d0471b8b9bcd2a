from __future__ import annotations

from dataclasses import replace

from leyline.v1.state_pb2 import HardwareContext
from tolaria.lane.messages import EpochDone
from tolaria.run.lane_telemetry import LaneTelemetry
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.metrics import Metrics
from tolaria.values.evaluation import Evaluation
from tolaria.values.training import RankLoad


def test_ranks_that_have_left_the_group_have_no_series() -> None:
    """They would show their last values for ever."""
    metrics = Metrics()
    observer = LaneTelemetry(metrics, Emitter())
    epoch = EpochDone(3, 100, Evaluation(1.0, 1, 1), 1.0, 0.0, {}, 0.0, HardwareContext())
    for ranks in (4, 2, 0, 3):
        loads = tuple(RankLoad(0.1, 0.2, 3) for _ in range(ranks))
        observer.on_epoch(replace(epoch, rank_loads=loads), show_layers=False)
        for name in ("input_wait_seconds", "wait_seconds", "memory_bytes"):
            found = [
                metrics.registry.get_sample_value(f"tolaria.rank.{name}", {"rank": str(rank)}) for rank in range(5)
            ]
            assert [value is not None for value in found] == [rank < ranks for rank in range(5)]
