"""What a flood of bad requests costs training: service, its peers and the generator on one core, the lane on another.

    python tests/benchmarks/bench_flood.py [--rounds N] [--seconds S] [--rate R] [--connections N] [--kind KIND]

Steps are counted with and without the flood, by turns; the ratio is the median of those of the rounds. `--kind`: token
(a wrong one), bytes (no message), method (an unknown one), good (GetStatus with a token), scrape (as many scrapers as
connections, flat out), view (as many viewers of the status page), reload (that load the page, all its files and a first
frame, flat out). `--limits off` serves without limits. On a busy machine the rates say little; the CPU time of
the service, which is what a flood takes from the boundaries on its core, varies less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
from torch import nn

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import Serve, python_path, serve
from tolaria.jobs import Batch, JobContext
from tolaria.jobs.digits import digits
from tolaria.jobs.job import TrainingJob
from tolaria.status_page.site import FILES

TARGET = 0.95
PREFIX = "/leyline.v1.TolariaAdminService/"
HTTP_KINDS = ("scrape", "view", "reload")
WAITING = ["training.job=benchmarks.bench_flood:waiting"]
OFF = ["server.calls_per_second=0", "server.bad_calls_per_second=0", "server.calls_in_flight_max=10000"]


def waiting(context: JobContext) -> TrainingJob:
    """The digits, whose steps wait for 5 ms and compute little: other processes on the lane's core matter less."""
    job = digits(context)
    losses = job.losses

    def late_losses(model: nn.Module, batch: Batch) -> Any:
        time.sleep(0.005)
        return losses(model, batch)

    job.losses = late_losses  # type: ignore[method-assign]
    return job


async def flood(address: str, *, kind: str, rate: float, seconds: float, connections: int, token: str) -> None:
    """Offers `rate` calls per second, whatever is answered; prints the answers by status, and the time that it took."""
    method = f"{PREFIX}{'Nothing' if kind == 'method' else 'GetStatus' if kind in {'good', 'token'} else 'WatchStatus'}"
    if kind == "bytes":
        method = f"{PREFIX}PauseTraining"
    body = b"\xff" * 20 if kind == "bytes" else b""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(connections)
    ]
    calls: list[Any] = [channel.unary_unary(method) for channel in channels]
    answers: Counter[str] = Counter()
    cpu = time.process_time()
    async with asyncio.TaskGroup() as tasks:

        async def once(number: int) -> None:
            try:
                await calls[number % connections](body, timeout=2.0, metadata=metadata)
                answers["OK"] += 1
            except grpc.aio.AioRpcError as error:
                answers[error.code().name] += 1

        begun, sent = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < seconds:
            due = int(elapsed * rate)
            while sent < due:
                tasks.create_task(once(sent))
                sent += 1
            await asyncio.sleep(0.002)
    print(json.dumps({"answers": answers, "sent": sent, "cpu_s": time.process_time() - cpu}))


async def scrape(address: str, *, kind: str, seconds: float, connections: int) -> None:
    """Scrapes, views or loads flat out on each connection; prints the answers by status."""
    answers: Counter[str] = Counter()
    cpu, until = time.process_time(), time.perf_counter() + seconds
    paths = {"scrape": ["metrics"], "view": ["page/events"], "reload": ["", *(f"page/{name}" for name in FILES)]}[kind]
    paths += ["page/events"] if kind == "reload" else []

    async def read(response: aiohttp.ClientResponse) -> None:
        """Reads an answer: of a stream all until the end, or the first frame of a page that is loaded again."""
        if response.content_type != "text/event-stream":
            await response.read()
            return
        async for line in response.content:
            answers["bytes"] += len(line)
            if time.perf_counter() > until or (kind == "reload" and line.startswith(b"data:")):
                response.close()
                return

    async def scraper(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            for path in paths:
                try:
                    async with session.get(f"http://{address}/{path}") as response:
                        await read(response)
                        answers[str(response.status)] += 1
                except aiohttp.ClientError as error:
                    answers[type(error).__name__] += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(scraper(session))
    print(
        json.dumps({"answers": answers, "sent": answers.total() - answers["bytes"], "cpu_s": time.process_time() - cpu})
    )


def cpu_s(pid: int) -> float:
    """Returns the CPU time of a process, without its children's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pin(pid: int, cores: set[int]) -> None:
    """Pins all threads of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def steps_per_s(stub: TolariaAdminServiceStub, metadata: tuple[tuple[str, str], ...], seconds: float) -> float:
    """Returns the rate of training over some seconds."""

    def step() -> int:
        return int(stub.GetStatus(admin.GetStatusRequest(), timeout=30, metadata=metadata).global_step)

    first, begun = step(), time.perf_counter()
    time.sleep(seconds)
    last = step()
    return (last - first) / (time.perf_counter() - begun)


def children_of(pid: int) -> list[int]:
    """Returns the ids of the child processes of all threads."""
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def pin_all(service: Serve, nice: int) -> None:
    """Puts the lane on the last core, everything else on the first, all with this niceness."""
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    pin(service.process.pid, {first})
    for child in children_of(service.process.pid):
        is_lane = "tolaria.lane" in Path(f"/proc/{child}/cmdline").read_text()
        pin(child, {last if is_lane else first})
    for pid in (service.process.pid, *children_of(service.process.pid)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)


def main() -> None:
    """Prints the rates, their ratio, and what was answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--kind", choices=["token", "bytes", "method", "good", *HTTP_KINDS], default="token")
    parser.add_argument("--limits", choices=["on", "off"], default="on")
    parser.add_argument("--waiting", action="store_true", help="steps that wait 5 ms, as for a GPU")
    parser.add_argument("--nice", type=int, default=0, help="below 0 keeps other processes away, as root")
    parser.add_argument("--flood", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        address, _, token = arguments.flood.partition(" ")
        if arguments.kind in HTTP_KINDS:
            asyncio.run(
                scrape(address, kind=arguments.kind, seconds=arguments.seconds, connections=arguments.connections)
            )
            return
        asyncio.run(
            flood(
                address,
                kind=arguments.kind,
                rate=arguments.rate,
                seconds=arguments.seconds,
                connections=arguments.connections,
                token=token,
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Runs the rounds."""
    tokens = {name: new_token(folder, name) for name in ("admin", "operator", "viewer")}
    overrides = ["training.epochs=1000000", f"server.tokens={folder / 'tokens.toml'}", "checkpoint.every_epochs=0"]
    overrides += WAITING if arguments.waiting else []
    overrides += OFF if arguments.limits == "off" else []
    with (
        serve(*overrides, reference_peers=True, cwd=folder) as service,
        grpc.insecure_channel(service.addresses()[0]) as channel,
    ):
        stub, metadata = TolariaAdminServiceStub(channel), (("authorization", f"Bearer {tokens['admin']}"),)
        while stub.GetStatus(admin.GetStatusRequest(), metadata=metadata).global_step < 200:
            time.sleep(0.1)
        pin_all(service, arguments.nice)
        rates: dict[str, list[float]] = {"quiet": [], "flooded": []}
        loads: dict[str, list[float]] = {"quiet": [], "flooded": []}

        def count(name: str) -> None:
            begun_s, begun_cpu_s = time.perf_counter(), cpu_s(service.process.pid)
            rates[name].append(steps_per_s(stub, metadata, arguments.seconds))
            loads[name].append((cpu_s(service.process.pid) - begun_cpu_s) / (time.perf_counter() - begun_s))

        answers, sent, generator_s = Counter[str](), 0, 0.0
        presented = {"token": "wrong", "method": "wrong", "bytes": tokens["operator"], "good": tokens["viewer"]}
        address = service.addresses()[arguments.kind in HTTP_KINDS]
        for _ in range(arguments.rounds):
            count("quiet")
            generator = start_flood(arguments, f"{address} {presented.get(arguments.kind, '')}")
            time.sleep(1.0)
            count("flooded")
            output = json.loads(generator.communicate(timeout=120)[0])
            answers.update(output["answers"])
            sent, generator_s = sent + output["sent"], generator_s + output["cpu_s"]
    length_s = arguments.rounds * (arguments.seconds + 1.5)
    print(f"kind {arguments.kind}, {arguments.connections} connections, limits {arguments.limits}")
    for name, values in rates.items():
        load = statistics.median(loads[name])
        print(f"{name:<8} {[f'{rate:.0f}' for rate in values]} steps/s, service {100 * load:.0f} % of a core")
    ratio = statistics.median(y / x for x, y in zip(rates["quiet"], rates["flooded"], strict=True))
    print(f"ratio {ratio:.3f} (target {TARGET})")
    share = generator_s / length_s
    print(f"{sent / length_s:.0f} calls/s offered, generator {100 * share:.0f} % of a core: {dict(answers)}")


def start_flood(arguments: argparse.Namespace, target: str) -> subprocess.Popen[str]:
    """Starts a generator on the first core, for a little longer than a measurement."""
    options = [f"--kind={arguments.kind}", f"--rate={arguments.rate}", f"--connections={arguments.connections}"]
    options += [f"--seconds={arguments.seconds + 1.5}", f"--flood={target}"]
    core = str(min(os.sched_getaffinity(0)))
    return subprocess.Popen(
        ["taskset", "-c", core, sys.executable, __file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )


def new_token(folder: Path, name: str) -> str:
    """Makes a token of a role with the command line."""
    file = str(folder / "tokens.toml")
    command = [sys.executable, "-m", "tolaria", "token", "new", name, "--role", name, "--file", file]
    return str(subprocess.run(command, check=True, capture_output=True, text=True).stdout).strip()


if __name__ == "__main__":
    main()
