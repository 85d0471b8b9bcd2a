"""A real service whose lane is a group of two ranks on the CPU, which die in every way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.groups import FINITE, GROUP, JOB, LIMITS, agent_of, named, pass_lost_batches, words_of
from support.peers import FakeKasmina, served_without_change
from support.pods import free_port
from support.processes import is_alive, python_path, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.ranks.local_ranks import ranks_of


@pytest.fixture(scope="module")
def peers() -> Iterator[list[str]]:
    """Runs a Tamiyo that changes nothing, so that runs differ in nothing but deaths; yields the settings."""
    with served_without_change(FakeKasmina) as settings:
        yield settings


def programs_of(rank: int) -> list[int]:
    """Returns the programs that the job of a rank has started."""
    tasks = Path(f"/proc/{rank}/task").iterdir()
    return [
        pid for task in tasks for pid in map(int, (task / "children").read_text().split()) if "sleep" in words_of(pid)
    ]


@pytest.fixture(scope="module")
def undisturbed(peers: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Returns step and digest with which the finite run ends if no rank dies."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with serve(*GROUP, *FINITE, *peers, "service.exit_when_done=true", cwd=directory) as service:
        assert service.wait() == 0
    assert named(service, "tolaria.lane_lost") == []
    return last_checkpoint(directory)


DEATHS: Final = [
    ("rank 1", signal.SIGKILL, "killed", "rank 1 of 2 was killed by SIGKILL"),
    ("rank 0", signal.SIGKILL, "killed", "rank 0 of 2 was killed by SIGKILL"),
    ("rank 1", signal.SIGSTOP, "silent", "no heartbeat for"),
    ("agent", signal.SIGSTOP, "silent", "the agent of the group has given no heartbeat for"),
]


RANDOM_DEATHS: Final = 40
KINDS: Final = {
    signal.SIGKILL: "killed",
    signal.SIGSTOP: "silent",
    signal.SIGSEGV: "crashed",
    signal.SIGABRT: "crashed",
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_random_deaths_change_nothing(
    request: pytest.FixtureRequest, parallel: str, peers: list[str], tmp_path: Path
) -> None:
    """Of any process of the group, in any way, at any time; only with --long, as the test below is its short form."""
    if not request.config.getoption("--long"):
        pytest.skip("several minutes: needs --long")
    rng = random.Random(5)
    limits = [
        "emergency.heartbeat_timeout_s=10",
        "emergency.phase_timeout_s=20",
        "lane.restarts_max=1000",
        "lane.restart_pause_max_s=0.2",
    ]
    arguments = [*GROUP, *FINITE, *peers, *limits, f"lane.parallel={parallel}", "rollback.every_steps=3"]
    arguments += ["training.epochs=60", "service.exit_when_done=true", "checkpoint.every_steps=11"]
    (tmp_path / "calm").mkdir()
    with serve(*arguments, cwd=tmp_path / "calm") as service:
        assert service.wait(300) == 0
    with serve(*arguments, "training.options.step_s=0.02", cwd=tmp_path) as service, stub_of(service) as stub:
        expected = list[str]()
        wait_for(lambda: status(stub).global_step > 0)  # a death before would be one of a job that cannot be built
        for number in range(RANDOM_DEATHS):
            wait_for(lambda n=number: len(named(service, "tolaria.lane_recovered")) == n)  # type: ignore[misc]
            wait_for(lambda: len(ranks_of(agent_of(service))) == 2)
            pass_lost_batches(service)
            time.sleep(rng.uniform(0.0, 1.5))
            victims = [agent_of(service), *ranks_of(agent_of(service)).values()]
            how = rng.choice(list(KINDS))
            if (victim := rng.choice(victims)) == victims[0] and how == signal.SIGSTOP:
                how = signal.SIGKILL  # a stopped agent is no death
            os.kill(victim, how)
            expected.append(KINDS[how])
            wait_for(lambda n=number: len(named(service, "tolaria.lane_lost")) == n + 1)  # type: ignore[misc]
        assert service.wait(300) == 0
    lost = named(service, "tolaria.lane_lost")
    assert [line["cause"] for line in lost] == expected
    assert last_checkpoint(tmp_path) == last_checkpoint(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deaths_cost_nothing_but_time(
    request: pytest.FixtureRequest, peers: list[str], undisturbed: tuple[int, str], tmp_path: Path
) -> None:
    """The group starts again, restores on every rank, and the run ends bit-equal to one without a death.

    Of each rank, which one and how is said, and of the agent; without --long of rank 0 and the agent. No process
    is left, nor a program that the job started.
    """
    limits = ["emergency.heartbeat_timeout_s=5", "emergency.phase_timeout_s=8", "training.options.step_s=0.05"]
    arguments = [*GROUP, *FINITE, *peers, *limits, "service.exit_when_done=true", "rollback.every_steps=3"]
    arguments.append("training.options.starts=true")
    ended, deaths = list[int](), DEATHS if request.config.getoption("--long") else DEATHS[1::2]
    with serve(*arguments, cwd=tmp_path) as service, stub_of(service) as stub:
        for number, (who, how, _, _) in enumerate(deaths):
            wait_for(lambda n=number: status(stub).global_step > 15 + 30 * n)  # type: ignore[misc]
            ranks, agent = ranks_of(agent_of(service)), agent_of(service)
            started = [pid for rank in ranks.values() for pid in programs_of(rank)]
            assert len(started) == 2
            ended += [agent, *ranks.values(), *started]
            os.kill(agent if who == "agent" else ranks[int(who[-1])], how)
            wait_for(lambda n=number: len(named(service, "tolaria.lane_recovered")) == n + 1)  # type: ignore[misc]
        assert service.wait() == 0
        wait_for(lambda: not any(map(is_alive, ended)))
    lost = named(service, "tolaria.lane_lost")
    assert [line["cause"] for line in lost] == [kind for _, _, kind, _ in deaths]
    for line, (_, _, _, words) in zip(lost, deaths, strict=True):
        assert words in str(line["detail"])
    assert last_checkpoint(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_on_another_machine_outlives_the_first_one(
    peers: list[str], undisturbed: tuple[int, str], tmp_path: Path
) -> None:
    """The service dies with its memory and its ranks before there is a checkpoint; the run ends as if undisturbed."""
    (tmp_path / "secret").write_text("of both machines and no other\n")
    rendezvous = f"127.0.0.1:{free_port()}"
    arguments = [*JOB, "lane.mode=torchrun", "lane.nodes=2", f"lane.rendezvous={rendezvous}", "lane.secret_file=secret"]
    arguments += [*FINITE, *peers, "rollback.every_steps=3", "rollback.replicas=1", "service.exit_when_done=true"]
    arguments += ["checkpoint.every_epochs=100", "training.options.step_s=0.05", "logging.level=debug"]
    with joined(rendezvous, tmp_path) as join:
        with serve(*arguments, cwd=tmp_path) as service:
            wait_for(lambda: any(int(str(line["step"])) > 20 for line in named(service, "replica_stored")))
            service.process.kill()
        with serve(*arguments, cwd=tmp_path) as service:
            assert service.wait() == 0, "\n".join(service.lines)
        assert join.wait(180) == 0
    (restored,) = named(service, "replica_restored")
    (resumed,) = named(service, "resumed")
    assert resumed["step"] == restored["step"]
    assert int(str(restored["step"])) > 20
    assert resumed["checkpoint_id"] == restored["checkpoint_id"]
    assert last_checkpoint(tmp_path) == undisturbed


@contextmanager
def joined(rendezvous: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `tolaria lane join` there; kills it at the end if it still runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TOLARIA_")} | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "tolaria", "lane", "join", "--rendezvous", rendezvous, "--secret-file", "secret"]
    with (directory / "join.log").open("wb") as log:
        join = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        yield join
    finally:
        join.kill()
        join.wait(10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_death_of_a_sharded_rank_costs_nothing_but_time(peers: list[str], tmp_path: Path) -> None:
    """The run ends bit-equal to one without a death, as with whole models."""
    arguments = [*GROUP, *FINITE, *peers, *LIMITS, "lane.parallel=fsdp", "service.exit_when_done=true"]
    (tmp_path / "calm").mkdir()
    with serve(*arguments, cwd=tmp_path / "calm") as service:
        assert service.wait() == 0
    with serve(*arguments, "training.options.step_s=0.02", cwd=tmp_path) as service, stub_of(service) as stub:
        wait_for(lambda: status(stub).global_step > 30)
        os.kill(ranks_of(agent_of(service))[1], signal.SIGKILL)
        assert service.wait() == 0
    (lost,) = named(service, "tolaria.lane_lost")
    assert (lost["cause"], "rank 1 of 2 was killed by SIGKILL" in str(lost["detail"])) == ("killed", True)
    assert last_checkpoint(tmp_path) == last_checkpoint(tmp_path / "calm")
