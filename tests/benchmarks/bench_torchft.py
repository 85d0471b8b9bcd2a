"""From the death of one of two processes to the next good step: ranks of a lane beside two replicas of torchft.

    python tests/benchmarks/bench_torchft.py --python PYTHON [--rounds N] [--width N]

PYTHON has torchft 0.2 and the PyTorch of this one. By turns, over the same model and data on the CPU: a rank of two in
mode `torchrun` is killed, with a group that is started then, and with one that was ready (`lane.spare_after_s`); one of
two replicas of torchft is killed and started again at once. Of torchft there are two figures: until the other replica
takes its next step, alone, and until both take one. Its lighthouse has the times that its documentation uses.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tolaria
from support.groups import agent_of, named
from support.processes import Serve, cpu_s, python_path, serve, status, stub_of
from tolaria.ranks.local_ranks import children_of, ranks_of

REPLICA = """
import sys, time, torch
import torch.distributed as dist
from datetime import timedelta
from torch.nn import functional as F
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
number, width, lighthouse = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[:1]
from support.user_jobs import Line
from tolaria.jobs import JobContext

torch.set_num_threads(1)
job = Line(JobContext(0, torch.device("cpu"), {"width": width, "samples": 4096}))
model = job.build_model()
inner = torch.optim.Adam(model.parameters(), lr=0.0001)
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def load(state):
    model.load_state_dict(state["model"]); inner.load_state_dict(state["optimizer"])

manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=5)), min_replica_size=1, load_state_dict=load,
    state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
    replica_id=f"replica{number}", store_addr="127.0.0.1", store_port=store.port, rank=0, world_size=1,
    lighthouse_addr=lighthouse, hostname="127.0.0.1",
)
ddp, optimizer = DistributedDataParallel(manager, model), Optimizer(manager, inner)
while True:
    before = manager.current_step()
    optimizer.zero_grad()
    F.mse_loss(ddp(job.x[:8]), job.y[:8]).backward()
    optimizer.step()
    if manager.current_step() > before:
        print(manager.num_participants(), time.monotonic(), flush=True)
"""
LIGHTHOUSE = """
import sys, threading
from torchft._torchft import LighthouseServer
server = LighthouseServer("127.0.0.1:0", min_replicas=1, join_timeout_ms=10000, quorum_tick_ms=100)
print(server.address(), flush=True)
threading.Event().wait()
"""


class Replicas:
    """Two replicas and their lighthouse; `lines` has a file of each replica's steps, to which it is appended."""

    def __init__(self, python: str, width: int, folder: Path, stack: ExitStack) -> None:
        self._python, self._width, self._folder, self._stack = python, width, folder, stack
        server = self._start(["-c", LIGHTHOUSE], folder / "lighthouse")
        wait_for(lambda: (folder / "lighthouse").stat().st_size > 0)
        self._address = (folder / "lighthouse").read_text().strip()
        self.processes = [self._replica(number) for number in range(2)]
        self._server = server

    def _start(self, arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
        package = str(Path(tolaria.__file__).parents[1])  # PYTHON need not have it installed
        environment = os.environ | {"PYTHONPATH": f"{package}:{python_path()}"}
        with output.open("ab") as file, (self._folder / "errors").open("ab") as errors:
            process = subprocess.Popen([self._python, *arguments], stdout=file, stderr=errors, env=environment)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def _replica(self, number: int) -> subprocess.Popen[bytes]:
        return self._start(
            ["-c", REPLICA, str(number), str(self._width), self._address], self._folder / f"steps{number}"
        )

    def steps(self, number: int, *, after_s: float) -> list[tuple[int, float]]:
        """Returns the number of participants and the time of each step of a replica after a time."""
        lines = (self._folder / f"steps{number}").read_text().splitlines()
        found = [fields for line in lines[-2000:] if len(fields := line.split()) == 2]  # a kill may cut one off
        return [(int(count), float(at)) for count, at in found if float(at) > after_s]

    def killed(self) -> tuple[float, float]:
        """Kills the second replica, and starts it again; returns the seconds to the first step of one, and of two.

        What has not happened after a minute counts as infinite.
        """
        at_s = time.monotonic()
        self.processes[1].kill()
        self.processes[1].wait()
        self.processes[1] = self._replica(1)
        with suppress(TimeoutError):
            wait_for(lambda: any(count == 2 for count, _ in self.steps(1, after_s=at_s)))
        # A step that was on its way when the other one died is none of those that follow.
        alone = next((at for count, at in self.steps(0, after_s=at_s) if count == 1), math.inf)
        both = next((at for count, at in self.steps(1, after_s=at_s) if count == 2), math.inf)
        return min(alone, both) - at_s, both - at_s


def wait_for(done: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Waits until it is so."""
    until_s = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > until_s:
            raise TimeoutError
        time.sleep(0.005)


def rank_killed(service: Serve, deaths: int, *, spare: bool) -> float:
    """Kills the second rank of a service that has lost so many before; returns the seconds to the next step."""
    if spare:
        wait_for(lambda: group_is_ready(service, deaths + 1), 180)
    with stub_of(service) as stub:
        at_s = time.monotonic()
        os.kill(ranks_of(agent_of(service))[1], signal.SIGKILL)
        wait_for(lambda: len(named(service, "tolaria.lane_recovered")) > deaths, 120)
        step = int(str(named(service, "tolaria.lane_recovered")[-1]["step"]))
        wait_for(lambda: status(stub).global_step > step)
        return time.monotonic() - at_s


def group_is_ready(service: Serve, count: int) -> bool:
    """Whether so many groups have been started beside the lane, and the ranks of the last one wait."""
    found = [int(str(line["pid"])) for line in named(service, "spare_lane_started")]
    ranks = children_of(found[-1]) if len(found) >= count else []
    before = [cpu_s(pid) for pid in ranks]
    time.sleep(1)
    return len(ranks) == 2 and all(cpu_s(pid) == used > 1 for pid, used in zip(ranks, before, strict=True))


def main() -> None:
    """Prints medians and the longest of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    job = ["training.job=support.user_jobs:Line", "training.options.samples=4096", "training.epochs=100000000"]
    job += [f"training.options.width={options.width}", "training.options.lr=0.0001", "lane.restarts_max=1000"]
    job += ["training.device=cpu", "training.threads=1", "lane.mode=torchrun", "lane.processes=2"]
    gaps: dict[str, list[float]] = {}
    for number in range(options.rounds):
        # One at a time: on two cores, four processes that train would measure each other.
        for name, more in {"ranks": [], "ranks, a group ready": ["lane.spare_after_s=0.5"]}.items():
            with tempfile.TemporaryDirectory() as folder, serve(*job, *more, cwd=Path(folder)) as service:
                with stub_of(service) as stub:
                    wait_for(lambda stub=stub: status(stub).global_step > 50)  # type: ignore[misc]
                gaps.setdefault(name, []).append(rank_killed(service, 0, spare=bool(more)))
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            replicas = Replicas(options.python, options.width, Path(folder), stack)
            begun_s = time.monotonic()
            wait_for(lambda r=replicas, s=begun_s: any(c == 2 for c, _ in r.steps(1, after_s=s)), 120)  # type: ignore[misc]
            time.sleep(2)
            one, two = replicas.killed()
        gaps.setdefault("torchft, the other replica alone", []).append(one)
        gaps.setdefault("torchft, both replicas", []).append(two)
        print(f"round {number + 1}: {', '.join(f'{name} {found[-1]:.2f} s' for name, found in gaps.items())}")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, width {options.width}, {options.rounds} rounds")
    print("| | median | longest |\n| --- | --- | --- |")
    for name, found in gaps.items():
        print(f"| {name} | {statistics.median(found):.2f} s | {max(found):.2f} s |")


if __name__ == "__main__":
    main()
