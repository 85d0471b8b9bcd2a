"""A group of two machines, which are network namespaces with a switch between them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

import grpc
import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.hosts import NETWORK, Hosts, require_hosts, two_hosts
from support.processes import is_alive, python_path, status
from support.waiting import wait_for
from tolaria.ranks.local_ranks import ranks_of

RENDEZVOUS: Final = f"{NETWORK}.1:29400"
TIMEOUT_S: Final = 20.0  # after a cut of 5 s, TCP may wait for 12.6 s before it sends again
SETTINGS: Final = [
    "logging.format=json", "server.listen=127.0.0.1:50051", "metrics.listen=127.0.0.1:9464",
    "lane.mode=torchrun", "lane.nodes=1:2", f"lane.rendezvous={RENDEZVOUS}", "lane.secret_file=secret",
    f"lane.node_timeout_s={TIMEOUT_S}", "lane.join_wait_s=5", "lane.restart_pause_max_s=0.2",
    "training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1",
    "training.epochs=100000000", "training.options.step_s=0.002", "training.options.lr=0.001",
    "training.options.samples=320", "rollback.fast_budget_s=20", "tamiyo.target=127.0.0.1:1",
    "kasmina.target=127.0.0.1:1",
]  # fmt: skip


@dataclass
class Machines:
    """A service on one machine, and `tolaria lane join` on the other, each with its files."""

    hosts: Hosts
    directory: Path
    joins: list[Popen[str]] = field(default_factory=list)

    def run(self, host: str, name: str, *command: str) -> Popen[str]:
        """Starts a program of Python's on a host, in its own directory; its output goes to a file of that name."""
        place = self.hosts.first if host == "a" else self.hosts.second
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TOLARIA_")}
        environment |= {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
        cwd = self.directory / host
        return place.start([sys.executable, "-m", *command], cwd, environment, self.directory / name)

    def join(self) -> Popen[str]:
        """Has the second machine join."""
        name = f"join{len(self.joins)}.log"
        command = ("tolaria", "lane", "join", "--rendezvous", RENDEZVOUS, "--secret-file", "secret")
        self.joins.append(self.run("b", name, *command))
        return self.joins[-1]

    def joined(self) -> str:
        """What the latest `lane join` has printed."""
        return (self.directory / f"join{len(self.joins) - 1}.log").read_text()

    def events(self, name: str) -> list[Mapping[str, Any]]:
        """The lines of that event in the service's log."""
        lines = (self.directory / "service.log").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line["event"] == name]


@contextmanager
def served(hosts: Hosts, directory: Path) -> Iterator[tuple[Machines, Popen[str], TolariaAdminServiceStub]]:
    """Runs the service on the first machine, for which the second one waits; reaches it from outside its network."""
    machines = Machines(hosts, directory)
    for host in "ab":
        (directory / host).mkdir()
        (directory / host / "secret").write_text("of both machines and no other\n")
    machines.join()
    wait_for(lambda: "waiting for the service" in machines.joined())
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    service = machines.run("a", "service.log", "tolaria", "serve", *options)
    machines.run("a", "relay.log", "support.relay", str(directory / "relay"), "50051")
    wait_for(lambda: bool(machines.events("serving")))
    with grpc.insecure_channel(f"unix:{directory / 'relay'}") as channel:
        yield machines, service, TolariaAdminServiceStub(channel)


def agent_of(process: int) -> int:
    """Returns the agent that a process has started; 0 if there is none."""
    for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        if "tolaria.ranks.agent" in Path(f"/proc/{pid}/cmdline").read_text():
            return int(pid)
    return 0


def trained_on(stub: TolariaAdminServiceStub, hosts: list[tuple[int, int, str]]) -> None:
    """Waits until exactly these ranks, each with its machine, take steps."""

    def trains() -> bool:
        now = status(stub)
        places = [(rank.rank, rank.node, rank.host) for rank in now.ranks]
        return places == hosts and now.state == admin.RUN_STATE_RUNNING and now.global_step > 0

    wait_for(trains, 120, every_s=0.05)
    step = status(stub).global_step
    wait_for(lambda: status(stub).global_step > step + 5)


BOTH: Final = [(0, 0, "host-a"), (1, 1, "host-b")]
ALONE: Final = [(0, 0, "host-a")]
GONE: Final = f"the machine host-b ({NETWORK}.2) has gone: "


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_train_one_model_and_lose_each_other(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Rollbacks are proved on both; a cut of 5 s is no loss; the group goes on without the other one.

    The long form has a cut of more than lane.node_timeout_s too, after which both train together again.
    """
    require_hosts()
    long = bool(request.config.getoption("--long"))
    with two_hosts() as hosts, served(hosts, tmp_path) as (machines, service, stub):
        (first,) = machines.joins
        trained_on(stub, BOTH)
        roll_back(stub)

        hosts.cut()
        time.sleep(5)
        hosts.mend()
        trained_on(stub, BOTH)
        assert machines.events("tolaria.lane_lost") == []
        if long:
            cut_for_long(hosts, machines, service, stub)

        ranks = ranks_of(agent_of(first.pid))
        assert len(ranks) == 1
        first.kill()
        trained_on(stub, ALONE)
        assert not any(map(is_alive, ranks.values()))
        second = machines.join()
        wait_for(lambda: "waiting for its next start" in machines.joined())
        stub.StopTraining(admin.StopTrainingRequest(request_id="s", reason="enough"), timeout=180)
        assert second.wait(180) == 0
        assert machines.joined().endswith("the run has ended\n")

    lost = [(line["cause"], line["detail"]) for line in machines.events("tolaria.lane_lost")]
    assert [cause for cause, _ in lost] == ["node_lost", "killed", "node_lost"][0 if long else 2 :]
    assert lost[-1][1] == GONE + "the connection has ended"
    assert not long or lost[0][1].startswith(GONE + "it has been silent for")


def roll_back(stub: TolariaAdminServiceStub) -> None:
    """Rolls back by both tiers, which every rank proves."""
    wait_for(lambda: status(stub).global_step > 100)
    stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="now"), timeout=180)
    for tier in (1, 2):
        request = admin.TriggerRollbackRequest(request_id=f"r{tier}", tier=tier, reason="odd")  # type: ignore[arg-type]
        back = stub.TriggerRollback(request, timeout=180)
        assert (back.tier, back.state_digest) == (tier, back.expected_digest)


def cut_for_long(hosts: Hosts, machines: Machines, service: Popen[str], stub: TolariaAdminServiceStub) -> None:
    """Cuts the link until both sides have noticed; the machine returns at the next start of the group, not before."""
    hosts.cut()
    ranks = ranks_of(agent_of(machines.joins[0].pid))
    trained_on(stub, ALONE)
    wait_for(lambda: "it has been silent for" in machines.joined())
    wait_for(lambda: not any(map(is_alive, ranks.values())))
    hosts.mend()
    wait_for(lambda: len(machines.events("node_joined")) == 2)
    trained_on(stub, ALONE)
    os.kill(agent_of(service.pid), signal.SIGKILL)
    trained_on(stub, BOTH)
