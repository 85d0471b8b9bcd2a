"""What a flood of bad requests costs training: service, its peers and the generator on one core, the lane on another.

    python tests/benchmarks/bench_flood.py [--rounds N] [--seconds S] [--rate R] [--connections N] [--kind KIND]

Steps are counted with and without the flood, by turns; the ratio is that of the medians. `--kind`: token (a wrong one),
bytes (no message), method (an unknown one), good (GetStatus with a token). `--limits off` serves without limits.
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

import grpc
import grpc.aio

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import Serve, python_path, serve

TARGET = 0.95
PREFIX = "/leyline.v1.TolariaAdminService/"
WIDE = ['training.options={"width": 512}']
OFF = ["server.calls_per_second=0", "server.bad_calls_per_second=0", "server.calls_in_flight_max=10000"]


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
    parser.add_argument("--kind", choices=["token", "bytes", "method", "good"], default="token")
    parser.add_argument("--limits", choices=["on", "off"], default="on")
    parser.add_argument("--wide", action="store_true", help="a step of several milliseconds")
    parser.add_argument("--nice", type=int, default=0, help="below 0 keeps other processes away, as root")
    parser.add_argument("--flood", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        address, _, token = arguments.flood.partition(" ")
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
    overrides += WIDE if arguments.wide else []
    overrides += OFF if arguments.limits == "off" else []
    with serve(*overrides, cwd=folder) as service, grpc.insecure_channel(service.addresses()[0]) as channel:
        stub, metadata = TolariaAdminServiceStub(channel), (("authorization", f"Bearer {tokens['admin']}"),)
        while stub.GetStatus(admin.GetStatusRequest(), metadata=metadata).global_step < 200:
            time.sleep(0.1)
        pin_all(service, arguments.nice)
        quiet, flooded, answers, sent, cpu_s = [], [], Counter[str](), 0, 0.0
        presented = {"token": "wrong", "method": "wrong", "bytes": tokens["operator"], "good": tokens["viewer"]}
        for _ in range(arguments.rounds):
            quiet.append(steps_per_s(stub, metadata, arguments.seconds))
            generator = start_flood(arguments, f"{service.addresses()[0]} {presented[arguments.kind]}")
            time.sleep(1.0)
            flooded.append(steps_per_s(stub, metadata, arguments.seconds))
            output = json.loads(generator.communicate(timeout=120)[0])
            answers.update(output["answers"])
            sent, cpu_s = sent + output["sent"], cpu_s + output["cpu_s"]
    ratio = statistics.median(flooded) / statistics.median(quiet)
    length_s = arguments.rounds * (arguments.seconds + 1.5)
    print(f"kind {arguments.kind}, {arguments.connections} connections, limits {arguments.limits}")
    print(f"quiet   {[f'{rate:.0f}' for rate in quiet]} steps/s\nflooded {[f'{rate:.0f}' for rate in flooded]} steps/s")
    print(f"ratio {ratio:.3f} (target {TARGET})")
    print(f"{sent / length_s:.0f} calls/s offered, generator {100 * cpu_s / length_s:.0f} % of a core: {dict(answers)}")


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
