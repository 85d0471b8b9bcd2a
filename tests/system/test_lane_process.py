"""A real service whose lane, in a process of its own, dies in every way that user code and machines offer."""

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

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.peers import FakeKasmina, served_without_change
from support.processes import Serve, is_alive, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for

JOB: Final = ["training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1"]
RUNNING, PAUSED, RECOVERING = admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_RECOVERING
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where the signal boards are
FINITE: Final = [*JOB, "training.epochs=6", "training.deterministic=true", "training.options.samples=320"]
ENDLESS: Final = [*JOB, "training.epochs=100000000", "training.options.step_s=0.001", "training.options.lr=0.001"]


@pytest.fixture
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing, so that runs differ in nothing but deaths; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


def lane_of(service: Serve) -> int:
    """Returns the id of the process of the lane; 0 if there is none."""
    for pid in service.children():
        with suppress(OSError):
            if b"tolaria.lane" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def losses(service: Serve) -> list[dict[str, object]]:
    """Returns the log lines of lost processes."""
    return [line for line in service.events() if line["event"] == "tolaria.lane_lost"]


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
        ("segv", "crashed", "SIGSEGV"),
        ("exit", "exited", "ended with code 3"),
        pytest.param("raise", "raised", "OSError: the file server does not answer", marks=pytest.mark.long),
        pytest.param("hang", "silent", "no heartbeat for", marks=pytest.mark.long),
        ("gil", "silent", "no heartbeat for"),
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
        listed = stub.ListIncidents(admin.ListIncidentsRequest(), timeout=60).incidents
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


def test_a_batch_with_which_two_processes_die_is_left_out(peers: list[str], tmp_path: Path) -> None:
    """One sample that ends the process whenever it is used does not end the run."""
    arguments = [*JOB, *peers, "training.epochs=1", "training.options.samples=64", "training.options.poison=17"]
    with serve(*arguments, "service.exit_when_done=true", cwd=tmp_path) as service:
        assert service.wait() == 0
    assert [line["cause"] for line in losses(service)] == ["exited", "exited"]
    (left_out,) = [line for line in service.events() if line["event"] == "batch_left_out"]
    assert left_out["epoch_and_place"][0] == 1


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


def test_a_job_that_ends_the_process_while_it_is_built_is_refused(tmp_path: Path) -> None:
    """The service ends with an error that says so, instead of trying for an hour."""
    with serve("training.job=support.mortal_jobs:exiting_factory", cwd=tmp_path) as service:
        assert service.wait() != 0
    assert "ended with code 5" in service.lines[-1]


def test_a_paused_run_is_paused_after_a_death(tmp_path: Path) -> None:
    """Meanwhile status says so, and requests that need the lane are refused with a reason; resuming goes on."""
    with serve(*ENDLESS, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 200)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=60)
        before = lane_of(service)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: losses(service) != [])
        with pytest.raises(grpc.RpcError) as refused:
            stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=60)
        assert refused.value.code() is grpc.StatusCode.ABORTED
        wait_for(lambda: recoveries(service) == 1)
        step = status(stub).global_step
        time.sleep(0.5)
        assert (status(stub).state, status(stub).global_step) == (PAUSED, step)
        stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="r", reason="go on"), timeout=60)
        wait_for(lambda: status(stub).global_step > step + 100)
        assert lane_of(service) not in {0, before}


def test_a_lane_that_is_stopped_while_it_rests_is_noticed(peers: list[str], tmp_path: Path) -> None:
    """No heartbeat of its steps is due then, but one of its process."""
    limits = ["emergency.heartbeat_timeout_s=4", "emergency.phase_timeout_s=5"]
    with serve(*ENDLESS, *peers, *limits, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 50)
        stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"), timeout=60)
        time.sleep(7)  # a rest is no silence
        assert losses(service) == []
        stop_for_good(lane_of(service))
        wait_for(lambda: recoveries(service) == 1)
        assert status(stub).state == PAUSED
    assert [line["cause"] for line in losses(service)] == ["silent"]


def test_a_container_that_is_frozen_for_a_while_loses_nothing(peers: list[str], tmp_path: Path) -> None:
    """As by `docker pause`: the service may run first afterwards, and the lane has given no heartbeat meanwhile."""
    limits = ["emergency.heartbeat_timeout_s=4", "emergency.sentinel=false"]
    with serve(*ENDLESS, *peers, *limits, cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 50)
        both = service.process.pid, lane_of(service)
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in both:
            os.kill(pid, signal.SIGCONT)
            time.sleep(1.5)
        step = status(stub).global_step
        wait_for(lambda: status(stub).global_step > step + 50)
    assert losses(service) == []


def recoveries(service: Serve) -> int:
    """Returns how often the lane has recovered."""
    return sum(line["event"] == "tolaria.lane_recovered" for line in service.events())


def test_what_operators_do_works_before_and_after_a_death(tmp_path: Path) -> None:
    """Rollbacks of both tiers, learning rates, checkpoints and profiles; an adjusted rate outlives the death."""
    with serve(*ENDLESS, "rollback.fast_budget_s=20", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 200)
        stub.AdjustLearningRate(admin.AdjustLearningRateRequest(request_id="lr", reason="calm", factor=0.5), timeout=60)
        operate(stub, "before")
        os.kill(lane_of(service), signal.SIGSEGV)
        wait_for(lambda: recoveries(service) == 1)
        assert status(stub).learning_rates["host"] == pytest.approx(0.0005)
        operate(stub, "after")
        assert status(stub).state == RUNNING


def operate(stub: TolariaAdminServiceStub, name: str) -> None:
    """Has a checkpoint and a profile made, and rolls back by both tiers."""
    stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id=f"c{name}", reason="now"), timeout=60)
    profile = stub.CaptureProfile(
        admin.CaptureProfileRequest(request_id=f"f{name}", reason="look", active_steps=3), timeout=60
    )
    assert Path(profile.path).stat().st_size > 0
    for tier in (1, 2):
        request = admin.TriggerRollbackRequest(request_id=f"{name}{tier}", tier=tier, reason="odd")  # type: ignore[arg-type]
        back = stub.TriggerRollback(request, timeout=60)
        assert (back.tier, back.state_digest) == (tier, back.expected_digest)


def test_a_killed_service_leaves_no_process(tmp_path: Path) -> None:
    """Neither the lane nor the workers of its loader outlive it, even while the lane holds the GIL."""
    arguments = ["training.job=support.user_jobs:Loader", "training.options.workers=2", "training.device=cpu"]
    with serve(*arguments, "training.epochs=1000000", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 5)
        lane = lane_of(service)
        wait_for(lambda: len(workers_of(lane)) == 2)
        workers = workers_of(lane)
        service.process.kill()
        service.wait()
        wait_for(lambda: not any(map(is_alive, [lane, *workers])))


def workers_of(lane: int) -> list[int]:
    """Returns the processes that the lane has started."""
    children = Path(f"/proc/{lane}/task/{lane}/children").read_text().split()
    return [pid for pid in map(int, children) if is_alive(pid)]


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "drain"])
def test_a_run_can_be_ended_while_its_lane_is_being_started_again(how: str, tmp_path: Path) -> None:
    """It is stopped, or drained, and not failed, after a last checkpoint of the state that is restored."""
    with serve(*ENDLESS, "service.exit_when_done=true", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 100)
        os.kill(lane_of(service), signal.SIGKILL)
        wait_for(lambda: status(stub).state == RECOVERING)
        if how == "stop":
            stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"), timeout=60)
        else:
            service.terminate()
        assert service.wait() == 0
    assert service.events()[-1]["outcome"] == ("stopped" if how == "stop" else "drained")
    assert last_checkpoint(tmp_path)[0] > 0


def test_the_first_rpc_is_answered_before_torch_is_imported(peers: list[str], tmp_path: Path) -> None:
    """The service starts without it, and does not wait for the process that imports it."""
    with serve(*ENDLESS, *peers, cwd=tmp_path) as service, grpc.insecure_channel(service.addresses()[0]) as channel:
        answer = status(TolariaAdminServiceStub(channel))
        loaded = [pid for pid in (service.process.pid, lane_of(service)) if pid and "libtorch_cpu" in maps_of(pid)]
        assert (answer.state, loaded) == (admin.RUN_STATE_STARTING, [])
        wait_for(lambda: status(TolariaAdminServiceStub(channel)).state == RUNNING)
        assert "libtorch_cpu" in maps_of(lane_of(service))
        assert "libtorch_cpu" not in maps_of(service.process.pid)


def maps_of(pid: int) -> str:
    """Returns what a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_lane_prints_what_its_job_prints_and_gets_no_secret(tmp_path: Path) -> None:
    """Standard output is that of the service; the secret, for commands of the controller, does not stop the lane."""
    arguments = [*JOB, "training.epochs=2", "training.options.says=hello", "service.exit_when_done=true"]
    with serve(*arguments, "leyline.secret=0123456789abcdef0123456789abcdef", cwd=tmp_path) as service:
        assert service.wait() == 0
        assert service.process.stdout is not None
        assert service.process.stdout.read().strip() == "hello"
    assert losses(service) == []


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


def stop_for_good(pid: int) -> None:
    """Stops a process, as a debugger does that is forgotten."""
    os.kill(pid, signal.SIGSTOP)


KILLS: Final[dict[str, Callable[[int], None]]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "crashed": lambda pid: os.kill(pid, signal.SIGSEGV),
    "silent": stop_for_good,
}


@pytest.mark.timeout(1800)
def test_many_deaths_at_random_times_change_nothing(
    request: pytest.FixtureRequest, peers: list[str], undisturbed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Whatever the lane does then: the run ends bit-equal to an undisturbed one, and the service answered all along.

    Nothing accumulates in the service: descriptors, threads, shared memory. With --long there are 100 deaths.
    """
    deaths = 100 if request.config.getoption("--long") else 4
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
            wait_for(lambda: status(stub).state == admin.RUN_STATE_FINISHED, 240)
        answered = sorted(latencies)
        assert len(losses(service)) >= deaths - 1
        assert [line for line in service.events() if line["event"] == "batch_left_out"] == []
        assert last_checkpoint(tmp_path) == undisturbed(length)
        descriptors, threads = zip(*used, strict=True)
        assert max(descriptors[2:]) <= descriptors[1] + 4
        assert max(threads[2:]) <= threads[1] + 2
        assert answered[-1] < 5.0
        board = status(stub).run_id
        service.terminate()
        assert service.wait() == 0
    assert not [path for path in SHARED_MEMORY.iterdir() if board in path.name]


def footprint(service: Serve) -> tuple[int, int]:
    """Returns the numbers of descriptors and of threads of the service."""
    process = Path(f"/proc/{service.process.pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
