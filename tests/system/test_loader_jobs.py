"""Real services with a job that reads its data in worker processes: start, signals, kills, resumed runs."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.latency import QUANTILES, bare_server, sampled
from support.processes import Serve, is_alive, serve, status, stub_of
from support.waiting import wait_for

pytestmark = pytest.mark.timeout(900)
JOB = [
    *("training.job=support.user_jobs:Loader", "training.device=cpu", "training.epochs=100000"),
    *("training.options.workers=2", "training.options.item_s=0.05", "training.options.batch=4"),
]
SHORT_EPOCHS = "training.options.samples=32"
ANSWER_S = 0.1
"""How long an answer takes at most, beyond that of a bare server in another process, not counting what a busy machine
withholds.

A loop that waits for a worker is silent for an epoch, here half a minute.
"""


def step(stub: TolariaAdminServiceStub) -> int:
    """The present step."""
    return status(stub).global_step


def descendants(pid: int) -> set[int]:
    """The ids of all processes that it has started, and of theirs."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def workers_of(service: Serve) -> set[int]:
    """The forks of the lane's process."""
    lane = [pid for pid in service.children() if is_lane(pid)]
    forks = descendants(lane[0]) if lane else []
    return {pid for pid in forks if is_alive(pid) and is_lane(pid)}


def is_lane(pid: int) -> bool:
    """Whether a process is that of a lane, or a fork of it."""
    try:
        return b"tolaria.lane" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def signal_group(service: Serve, number: signal.Signals) -> None:
    """Sends a signal to the service and its forks, as a terminal and a container's runtime do."""
    for pid in (service.process.pid, *workers_of(service)):
        os.kill(pid, number)


def last_state(service: Serve) -> object:
    """The state with which the service stopped."""
    return service.events()[-1].get("state")


@pytest.mark.timeout(3600)
def test_starts_with_workers_always_answer(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """While workers are started and read, RPCs are answered; a signal to the whole group drains with a checkpoint."""
    option = request.config.getoption
    starts = 20 if option("--long") else 2 if option("--slow") else 1  # with persistent workers every other time
    for number in range(starts):
        directory = tmp_path / str(number)
        directory.mkdir()
        persistent = f"training.options.persistent={str(number % 2 == 1).lower()}"
        with bare_server() as bare, serve(*JOB, persistent, cwd=directory) as service, stub_of(service) as stub:
            call = partial(stub.GetStatus.future, admin.GetStatusRequest(), timeout=180)
            with sampled(service.process.pid, call, bare) as latencies:
                wait_for(lambda: step(stub) > 2 and latencies.calls > 300)
            with capsys.disabled():
                sys.stdout.write(f"\n{latencies.table()}" if request.config.getoption("--long") else "")
            for quantile in QUANTILES:
                assert latencies.excess_s(quantile) < ANSWER_S, latencies.table()
            forks = workers_of(service)
            assert len(forks) == 2
            signal_group(service, signal.SIGINT if number % 2 else signal.SIGTERM)
            assert service.wait() == 0
            assert not any(is_alive(pid) for pid in forks)
        assert last_state(service) == "finished"
        written = [line for line in service.events() if line["event"] == "checkpoint_written"]
        assert written, service.lines


@pytest.mark.slow
def test_a_killed_service_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its workers end with it, the next start resumes at once, reports changed settings, and drains; see below."""
    with serve(*JOB, SHORT_EPOCHS, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: step(stub) > 8)
        wait_for(lambda: any(line["event"] == "checkpoint_written" for line in service.events()))
        everything = descendants(service.process.pid)
        service.process.kill()
        service.process.wait()
        arguments = [*JOB, SHORT_EPOCHS, "training.options.lr=0.02", "training.options.workers=0"]
        with serve(*arguments, cwd=tmp_path) as again, stub_of(again) as stub_again:
            first = step(stub_again)
            assert not any(is_alive(pid) for pid in everything)
            wait_for(lambda: step(stub_again) > first)
            again.terminate()
            assert again.wait() == 0
    events = {line["event"]: line for line in again.events()}
    assert events["resumed"]["step"] >= 8
    changed = events["settings_changed"]
    assert changed["changed"] == {
        "training.options.lr": "unset -> 0.02",
        "training.options.workers": "2 -> 0",
    }
    assert changed["learning_rates"] == {"host": 0.01}
    with serve(*JOB, "training.options.samples=36", cwd=tmp_path) as grown:
        assert grown.wait() == 2
    assert "samples 32; this cursor has 36" in grown.lines[-1]


@pytest.mark.slow
def test_a_batch_with_a_sample_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """After two restarts of the lane, whose reasons name the sample in one line; the batch is not read again."""
    with serve(*JOB, "training.options.bad_item=37", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: any(line["event"] == "batch_left_out" for line in service.events()))
        wait_for(lambda: sum(line["event"] == "tolaria.lane_recovered" for line in service.events()) == 2)
        before = step(stub)
        wait_for(lambda: step(stub) > before + 4)
        service.terminate()
        assert service.wait() == 0
    assert all(line.startswith("{") for line in service.lines), service.lines
    lost = [line["detail"] for line in service.events() if line["event"] == "tolaria.lane_lost"]
    assert len(lost) == 2
    assert all("sample 37: RuntimeError: corrupt sample 37 (user_jobs.py:" in detail for detail in lost)
    assert not any(line.get("exception") for line in service.events())


@pytest.mark.slow
def test_a_killed_worker_costs_a_restart_of_the_lane(tmp_path: Path) -> None:
    """The reason names it, in one line, and training goes on. Signals that end the service do not end a worker."""
    with serve(*JOB, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: step(stub) > 2 and len(workers_of(service)) == 2)
        worker = min(workers_of(service))
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        before = step(stub)
        wait_for(lambda: step(stub) > before + 4)
        assert worker in workers_of(service)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: any(line["event"] == "tolaria.lane_recovered" for line in service.events()))
        before = step(stub)
        wait_for(lambda: step(stub) > before + 4)
        assert status(stub).state == admin.RUN_STATE_RUNNING
        service.terminate()
        assert service.wait() == 0
    assert all(line.startswith("{") for line in service.lines), service.lines
    (lost,) = [line for line in service.events() if line["event"] == "tolaria.lane_lost"]
    assert lost["cause"] == "raised"
    # PyTorch says one or the other: its handler of SIGCHLD, or the wait for a batch, may notice first.
    assert any(f"worker ({pid} {worker})" in lost["detail"] for pid in ("pid", "pid(s)"))
    (raised,) = [line for line in service.events() if line["event"] == "lane_raised"]
    assert not raised.get("exception")
