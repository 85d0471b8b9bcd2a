"""How the real service ends: by itself, by signals, with peers and jobs that are slow or hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.processes import is_alive, serve, stub_of, wait_for_steps
from support.waiting import wait_for

LONG = ["training.epochs=100000"]
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the signal boards are


@pytest.mark.parametrize(("more", "code"), [([], 0), (["service.exit_code_drained=143"], 143)])
def test_a_signal_right_after_the_start_drains(more: list[str], code: int, tmp_path: Path) -> None:
    """From the moment that the log says `serving`; the exit code is the one that is set."""
    with serve(*LONG, *more, cwd=tmp_path) as service:
        service.addresses()
        service.terminate()
        assert service.wait() == code
    assert service.events()[-1]["outcome"] == "drained"


WORKERS = ["training.job=support.user_jobs:Loader", "training.options.workers=2"]


@pytest.mark.parametrize(
    ("end", "job"),
    [
        pytest.param("finished", [], id="digits"),
        pytest.param("drained", WORKERS, id="workers", marks=pytest.mark.slow),
    ],
)
def test_everything_ends_by_itself(end: str, job: list[str], tmp_path: Path) -> None:
    """No peer has to be killed, no process is left, and the service is gone soon after it has logged `stopped`.

    With service.exit_when_done it ends after the last epoch, with 0 whatever a drain's code is.
    """
    finite = ["training.epochs=3", "service.exit_when_done=true", "service.exit_code_drained=143"]
    length = LONG if end == "drained" else finite
    with serve(*job, *length, cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
        children = service.children()
        if end == "drained":
            wait_for_steps(stub)
            children = service.children()
            service.terminate()
        wait_for(lambda: any('"stopped"' in line for line in service.lines) or service.process.poll() is not None)
        stopped_s = time.monotonic()
        assert service.wait() == 0
        assert time.monotonic() - stopped_s < 10
        assert not any(is_alive(pid) for pid in children)
    events = {event["event"]: event for event in service.events()}
    assert events["stopped"]["outcome"] == end
    if end == "finished":
        assert [event["epoch"] for event in service.events() if event["event"] == "epoch_finished"] == [1, 2, 3]
    assert not events.keys() & {"embedded_peer_killed", "embedded_peer_died"}


@pytest.mark.slow
def test_a_signal_that_comes_while_everything_ends_changes_nothing(tmp_path: Path) -> None:
    """The run has finished, and what the service has opened is closed: its board is gone, and the code is 0."""
    arguments = ["training.epochs=1", "service.exit_when_done=true"]
    with serve(*arguments, cwd=tmp_path, reference_peers=True) as service:
        service.addresses()
        children = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in service.children()}
        (peer,) = [pid for pid, words in children.items() if b"\0tamiyo\0" in words]
        wait_for(lambda: any("all epochs done" in line for line in service.lines))
        os.kill(peer, signal.SIGSTOP)
        wait_for(
            lambda: not any(b"tolaria.lane" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in service.children())
        )
        service.terminate()
        time.sleep(0.5)
        os.kill(peer, signal.SIGCONT)
        assert service.wait() == 0
    assert service.events()[-1]["outcome"] == "finished"
    board = service.events()[-1]["run_id"]
    assert not [path for path in SHARED_MEMORY.iterdir() if board in path.name]


@pytest.mark.slow
def test_a_slow_peer_gets_what_is_left_of_the_drain_timeout(tmp_path: Path) -> None:
    """It stands still for longer than the tenth that is its share, and is not killed."""
    limits = ["service.drain_timeout_s=20", "emergency.drain_s=30"]
    with serve(*LONG, *limits, cwd=tmp_path, reference_peers=True) as service, stub_of(service) as stub:
        wait_for_steps(stub)
        (slow,) = [pid for pid in service.children() if b"\0kasmina\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(slow, signal.SIGSTOP)
        service.terminate()
        wait_for(lambda: any('"finished"' in line for line in service.lines))
        time.sleep(3.0)
        os.kill(slow, signal.SIGCONT)
        assert service.wait() == 0
    assert not any(event["event"] == "embedded_peer_killed" for event in service.events())


def test_a_hanging_job_does_not_prevent_shutdown(tmp_path: Path) -> None:
    """If a microbatch never returns, SIGTERM ends the process within the drain timeout, with exit code 1."""
    arguments = ["training.job=support.jobs:StuckJob", "service.drain_timeout_s=4"]
    with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: stub.GetStatus(admin.GetStatusRequest(), timeout=180).phase == "starting")  # the first step
        started = time.monotonic()
        service.terminate()
        assert service.wait() == 1
        assert time.monotonic() - started < 8
    assert any(e["event"] == "lane_stuck" for e in service.events())
