"""What the process of a lane does when it begins; how it dies is in tests/system/test_lane_process.py."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from tolaria.config import Settings
from tolaria.lane import hosting
from tolaria.lane.order import LaneOrder, RestorePlan
from tolaria.lane.process import Received
from tolaria.signals.lane_page import LanePage
from tolaria.wire import Frame, FrameKind


def test_silence_counts_from_the_moment_that_a_lane_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped right then has given a heartbeat, so that it is missed."""
    settings = Settings.model_validate(
        {"training": {"job": "support.jobs:TinyJob", "device": "cpu"}, "state": {"dir": str(tmp_path)}}
    )
    page, seen = LanePage.create(), list[tuple[FrameKind, float]]()

    def ready(_connection: socket.socket, frame: Frame) -> None:
        later_ns = time.monotonic_ns() + int(1e9 * (settings.emergency.heartbeat_timeout_s + 1))
        monkeypatch.setattr("tolaria.signals.lane_page.time.monotonic_ns", lambda: later_ns)
        seen.append((frame.kind, page.overdue_s()))
        raise InterruptedError

    monkeypatch.setattr(hosting, "send", ready)
    order = LaneOrder(settings.model_dump_json(), (), 1, RestorePlan())
    with pytest.raises(InterruptedError):
        hosting.host(Mock(), Received(order, {}, {}), settings, page)
    ((kind, overdue_s),) = seen
    assert kind is FrameKind.READY
    assert overdue_s == pytest.approx(settings.emergency.heartbeat_timeout_s + 1, abs=1)
