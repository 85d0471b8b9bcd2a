"""What the process of a lane does when it begins; how it dies is in tests/system/test_lane_deaths.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from support.processes import python_path
from tolaria.config import Settings
from tolaria.config.ranks import PEER_LOST
from tolaria.errors import PeerLostError
from tolaria.lane import hosting
from tolaria.lane.order import LaneOrder, RestorePlan
from tolaria.lane.process import Received
from tolaria.signals.lane_page import LanePage
from tolaria.wire import Frame, FrameKind


def test_a_rank_that_hangs_ends_itself(tmp_path: Path) -> None:
    """Once its lane has been silent for too long, so that the leader does not wait for it; a rest is no silence."""
    script = f"""
import threading, time
from tolaria.config import Settings
from tolaria.config.ranks import PEER_LOST
from tolaria.errors import PeerLostError
from tolaria.lane.hosting import end_when_silent
from tolaria.signals.lane_page import LanePage, PagePulse
settings = Settings.model_validate(
    {{"state": {{"dir": {str(tmp_path)!r}}}, "emergency": {{"heartbeat_timeout_s": 1.0, "phase_timeout_s": 1.0}}}}
)
page = LanePage.create()
pulse = PagePulse(page, settings.emergency)
threading.Thread(target=end_when_silent, args=(page, 0), daemon=True).start()
time.sleep(2.5)
print("rested", flush=True)
with pulse.lane_works():
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "rested\n")
    assert "the rank has given no heartbeat" in done.stderr


def test_a_rank_that_misses_others_waits_until_the_loss_of_a_machine_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which takes `lane.node_timeout_s`, so that its agent learns who is lost before it has an end of its own."""
    waited = list[float]()
    settings = Settings.model_validate({"lane": {"node_timeout_s": 100}})
    monkeypatch.setattr(hosting, "join_group", Mock(side_effect=PeerLostError("gone")))
    monkeypatch.setattr("tolaria.lane.hosting.time.sleep", waited.append)
    order = LaneOrder(settings.model_dump_json(), (), 1, RestorePlan())
    assert hosting.host(Mock(), Received(order, {}, {}), settings, LanePage.create()) == PEER_LOST
    assert waited == [110]


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
