"""A real service whose lane dies in every way that user code and machines offer, and again and again."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.mortal_lanes import FINITE, JOB, lane_of, losses, recoveries, stop_for_good
from support.peers import FakeKasmina, served_without_change
from support.processes import Serve, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for


@pytest.fixture
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing, so that runs differ in nothing but deaths; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where the signal boards are


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, str]]:
    """Returns step and digest with which a run of these settings ends whose lane does not die; runs it once."""

    @cache
    def run(*more: str) -> tuple[int, str]:
        directory = tmp_path_factory.mktemp("undisturbed")
        with (
            served_without_change(FakeKasmina) as peers,
            serve(*FINITE, *peers, *more, "service.exit_when_done=true", cwd=directory) as service,
        ):
            assert service.wait() == 0
        assert losses(service) == []
        return last_checkpoint(directory)

    return run


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        pytest.param("segv", "crashed", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("exit", "exited", "ended with code 3", marks=pytest.mark.slow),
        pytest.param("raise", "raised", "OSError: the file server does not answer", marks=pytest.mark.long),
        pytest.param("hang", "silent", "no heartbeat for", marks=pytest.mark.long),
        pytest.param("gil", "silent", "no heartbeat for", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_a_death_costs_nothing_but_time(
    how: str, kind: str, words: str, *, peers: list[str], undisturbed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """The service answers all along, says why the lane died, and the run ends bit-equal to one without a death."""
    limits = ["emergency.heartbeat_timeout_s=8", "emergency.phase_timeout_s=20"]
    arguments = [*FINITE, *peers, *limits, "training.options.at=100", f"training.options.how={how}"]
    with serve(*arguments, "service.exit_when_done=true", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: losses(service) != [] or service.process.poll() is not None)
        listed = stub.ListIncidents(admin.ListIncidentsRequest(), timeout=180).incidents
        assert service.wait() == 0
    (lost,) = losses(service)
    assert lost["cause"] == kind
    assert words in str(lost["detail"])
    if kind == "silent":  # the stacks say where it hung
        assert "in die" in (tmp_path / "state" / "stacks.txt").read_text()
    assert any(words in str(incident) for incident in listed)
    assert last_checkpoint(tmp_path) == undisturbed()
    assert any(line["event"] == "tolaria.lane_recovered" for line in service.events())


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """Makes a control group with at most 1 GiB of memory; yields its directory."""
    group = limited_group()
    if group is None:
        pytest.skip("no control group of memory can be made here")
    yield group
    wait_for(lambda: (group / "cgroup.procs").read_text() == "")
    group.rmdir()


def limited_group() -> Path | None:
    """Returns a new control group with at most 1 GiB of memory, of version 2 or 1; None if there can be none."""
    for version, limit in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        group = Path("/sys/fs/cgroup", version, f"tolaria-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text("1073741824")
                return group
            group.rmdir()
    return None


@pytest.mark.slow
def test_a_lane_that_is_killed_for_lack_of_memory_says_so(
    peers: list[str], memory_cgroup: Path, tmp_path: Path
) -> None:
    """Which nothing but the counter of the control group tells from any other SIGKILL."""
    dies = ["training.options.at=100", "training.options.how=memory", "training.options.step_s=0.005"]
    with serve(*FINITE, *peers, *dies, "service.exit_when_done=true", cwd=tmp_path) as service:
        wait_for(lambda: lane_of(service) != 0)
        for pid in (service.process.pid, lane_of(service)):
            (memory_cgroup / "cgroup.procs").write_text(str(pid))
        assert service.wait() == 0
    (lost,) = losses(service)
    assert lost["cause"] == "out_of_memory"
    assert "the cgroup is out of memory" in str(lost["detail"])


@pytest.mark.slow
def test_a_batch_with_which_two_processes_die_is_left_out(peers: list[str], tmp_path: Path) -> None:
    """One sample that ends the process whenever it is used does not end the run."""
    arguments = [*JOB, *peers, "training.epochs=1", "training.options.samples=64", "training.options.poison=17"]
    with serve(*arguments, "service.exit_when_done=true", cwd=tmp_path) as service:
        assert service.wait() == 0
    assert [line["cause"] for line in losses(service)] == ["exited", "exited"]
    (left_out,) = [line for line in service.events() if line["event"] == "batch_left_out"]
    assert left_out["epoch_and_place"][0] == 1


@pytest.mark.slow
def test_an_exception_that_comes_again_and_again_fails_the_run(peers: list[str], tmp_path: Path) -> None:
    """After the third process that ends by the same exception; the reason says which one it is."""
    arguments = [*JOB, *peers, "training.options.at=3", "training.options.how=raise", "training.options.always=true"]
    with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).state == admin.RUN_STATE_FAILED)
        assert "the file server does not answer" in status(stub).state_reason
        service.terminate()
        assert service.wait() == 1
    assert len(losses(service)) == 2


@pytest.mark.long
def test_a_lane_that_dies_again_and_again_fails_the_run(peers: list[str], tmp_path: Path) -> None:
    """Beyond lane.restarts_max; the reason names the number of deaths and the last cause."""
    arguments = [*JOB, *peers, "training.options.at=3", "training.options.how=exit", "training.options.always=true"]
    with serve(*arguments, "lane.restarts_max=2", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).state == admin.RUN_STATE_FAILED)
        assert "died 3 times within 3600 s" in status(stub).state_reason
        assert "ended with code 3" in status(stub).state_reason


@contextmanager
def watched(stub: TolariaAdminServiceStub) -> Iterator[list[float]]:
    """Asks for the status every 20 ms while the block runs; yields the latencies in seconds."""
    latencies, over = list[float](), threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            started_s = time.monotonic()
            status(stub)
            latencies.append(time.monotonic() - started_s)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield latencies
    finally:
        over.set()
        thread.join()


KILLS: Final[dict[str, Callable[[int], None]]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "crashed": lambda pid: os.kill(pid, signal.SIGSEGV),
    "silent": stop_for_good,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_deaths_at_random_times_change_nothing(
    request: pytest.FixtureRequest, peers: list[str], undisturbed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Whatever the lane does then: the run ends bit-equal to an undisturbed one, and the service answered all along.

    Nothing accumulates in the service: descriptors, threads, shared memory. With --long there are 100 deaths, in CI 10.
    """
    option = request.config.getoption
    deaths = 100 if option("--long") else 10
    rng = random.Random(11)
    slow = ["training.options.step_s=0.004", "rollback.every_steps=7", "checkpoint.every_steps=45"]
    length = f"training.epochs={max(12, deaths)}"  # so long that the run does not end before the last death
    arguments = [*FINITE, *peers, *slow, length, "lane.restarts_max=1000", "lane.restart_pause_max_s=0.2"]
    limits = ["emergency.heartbeat_timeout_s=8", "emergency.phase_timeout_s=30"]
    with serve(*arguments, *limits, cwd=tmp_path) as service, stub_of(service) as stub:
        with watched(stub) as latencies:
            used, kind = list[tuple[int, int]](), "killed"
            for _ in range(deaths):
                wait_for(lambda: recoveries(service) == len(losses(service)) >= len(used))
                time.sleep(rng.uniform(0.0, 0.25))
                if status(stub).state == admin.RUN_STATE_FINISHED:
                    break
                used.append(footprint(service))
                # Two crashes in a row, by chance with the same batch, would be taken for its fault.
                kind = rng.choice([each for each in KILLS if each == "killed" or each != kind])
                KILLS[kind](lane_of(service))
            wait_for(lambda: status(stub).state == admin.RUN_STATE_FINISHED)
        answered = sorted(latencies)
        assert len(losses(service)) >= deaths - 1
        assert [line for line in service.events() if line["event"] == "batch_left_out"] == []
        assert last_checkpoint(tmp_path) == undisturbed(length)
        # The ring fills, and some descriptors are open for a moment; one left by each death would be 5 in half of 10.
        half = len(used) // 2
        more_descriptors, more_threads = (max(each[half:]) - max(each[:half]) for each in zip(*used, strict=True))
        assert more_descriptors <= 4
        assert more_threads <= 2
        assert answered[-1] < 5.0
        board = status(stub).run_id
        service.terminate()
        assert service.wait() == 0
    assert not [path for path in SHARED_MEMORY.iterdir() if board in path.name]


def footprint(service: Serve) -> tuple[int, int]:
    """Returns the numbers of descriptors and of threads of the service."""
    process = Path(f"/proc/{service.process.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
