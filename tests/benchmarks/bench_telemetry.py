"""What telemetry costs: step time with 10 scrapes a second and 10 subscribers, and the event loop while rendering.

    python tests/benchmarks/bench_telemetry.py [--rounds N] [--seconds S]

Steps of about 10 ms; the lane is pinned to one core, and the service, its peers and the readers to another, if there
are two. Windows with and without readers alternate; on a busy machine only CPU times mean something. The delay of the
event loop is that of a timer of a millisecond beside an exporter that another process scrapes without a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import grpc
from prometheus_client import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import Serve, serve, status, stub_of
from tolaria.telemetry.exporter import Readiness, exporter
from tolaria.telemetry.metrics import Metrics

SCRAPES_PER_S, SUBSCRIBERS = 10, 10
TARGET_MS = 5.0
JOB = {"width": 1024, "depth": 4, "steps": 60}


def scrape(address: str) -> str:
    """Returns the text of /metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return bytes(response.read()).decode()


def sample(text: str, name: str) -> float:
    """Returns the value of a series without labels."""
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def read(grpc_address: str, metrics_address: str) -> None:
    """Scrapes and subscribes until standard input ends; prints how much it has read."""
    counts, lost, ended = {"scrapes": 0, "packets": 0}, {"packets": 0}, threading.Event()

    def subscribe(channel: grpc.Channel) -> None:
        stream: Any = TolariaAdminServiceStub(channel).StreamTelemetry(admin.StreamTelemetryRequest())
        try:
            for response in stream:
                counts["packets"] += 1
                lost["packets"] = max(lost["packets"], sum(response.dropped.values()))
        except grpc.RpcError:
            pass  # the channel is closed at the end

    channels = [grpc.insecure_channel(grpc_address) for _ in range(SUBSCRIBERS)]
    for channel in channels:
        threading.Thread(target=subscribe, args=(channel,), daemon=True).start()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    print("ready", flush=True)
    while not ended.wait(1 / SCRAPES_PER_S):
        scrape(metrics_address)
        counts["scrapes"] += 1
    print(json.dumps(counts | {"lost": lost["packets"]}), flush=True)
    for channel in channels:
        channel.close()


@contextmanager
def reading(addresses: tuple[str, str], core: int | None, found: list[dict[str, int]]) -> Iterator[None]:
    """Runs the readers in another process while the block runs; appends what they have read."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--read", *addresses], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if core is not None:
        os.sched_setaffinity(child.pid, {core})
    child.stdout.readline()
    yield
    child.stdin.close()
    found.append(json.loads(child.stdout.readline()))
    child.wait(30)


@dataclass(frozen=True)
class Window:
    """The mean step of some seconds in wall time and in CPU time of the lane; the share of a core of the service."""

    step_ms: float
    cpu_ms: float
    service_share: float


def cpu_s(pid: int) -> float:
    """Returns the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def window(metrics_address: str, lane: int, seconds: float) -> Window:
    """Measures for some seconds."""
    before, lane_s, began_s = scrape(metrics_address), cpu_s(lane), time.monotonic()
    time.sleep(seconds)
    after, lane_s, took_s = scrape(metrics_address), cpu_s(lane) - lane_s, time.monotonic() - began_s

    def grown(name: str) -> float:
        return sample(after, name) - sample(before, name)

    steps = grown("tolaria_step_duration_seconds_count")
    step_ms = 1000 * grown("tolaria_step_duration_seconds_sum") / steps
    return Window(step_ms, 1000 * lane_s / steps, grown("process_cpu_seconds_total") / took_s)


def pin(service: Serve, lane: int) -> int | None:
    """Gives the lane a core, and the service and its other children another one; returns that, if there are two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    for pid in (service.process.pid, *service.children()):
        chosen = cores[1] if pid == lane else cores[0]
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {chosen})
    return cores[0]


def bench_steps(rounds: int, seconds: float) -> None:
    """Prints the rows of step times."""
    quiet, busy, read_by = list[Window](), list[Window](), list[dict[str, int]]()
    options = [f"training.options.{name}={value}" for name, value in JOB.items()]
    job = ["training.job=bench_hosting:HostedJob", "training.epochs=1000000", "training.threads=1", *options]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(*job, reference_peers=True, cwd=Path(folder)) as service,
        stub_of(service) as stub,
    ):
        lane = status(stub).ranks[0].pid
        core, addresses = pin(service, lane), service.addresses()
        window(addresses[1], lane, seconds)
        for _ in range(rounds):
            quiet.append(window(addresses[1], lane, seconds))
            with reading(addresses, core, read_by):
                busy.append(window(addresses[1], lane, seconds))
    for what, name in (("step, wall time", "step_ms"), ("step, CPU time of the lane", "cpu_ms")):
        pairs = [(getattr(q, name), getattr(b, name)) for q, b in zip(quiet, busy, strict=True)]
        alone_ms, read_ms = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(b / q for q, b in pairs)
        best = min(b for _, b in pairs) / min(q for q, _ in pairs)
        print(
            f"| {what} | {alone_ms:.2f} ms | {read_ms:.2f} ms | {ratio - 1:+.1%}, of the best {best - 1:+.1%} | 1 % |"
        )
    used = [f"{statistics.median(one.service_share for one in windows):.0%}" for windows in (quiet, busy)]
    print(f"| share of a core that the service uses | {used[0]} | {used[1]} | | |")
    totals = {key: sum(counts[key] for counts in read_by) for key in read_by[0]}
    print(f"| read: {totals['scrapes']} scrapes, {totals['packets']} packets, {totals['lost']} lost | | | | |")


class Sliced(Collector):
    """Metrics for an encoder; notes for how much CPU time it computes between two pauses."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._since_ns = time.thread_time_ns()
        self.slices_ms: list[float] = []

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        self._since_ns = time.thread_time_ns()
        return self._metrics.collected(self._pause)

    def _pause(self, _seconds: float) -> None:
        now_ns = time.thread_time_ns()
        self.slices_ms.append((now_ns - self._since_ns) / 1e6)
        self._since_ns = now_ns


def bench_slices() -> None:
    """Prints the row of the longest time for which rendering keeps the interpreter."""
    metrics, whole, longest = many_series(Metrics()), list[float](), list[float]()
    for _ in range(20):
        sliced, began_ns = Sliced(metrics), time.thread_time_ns()
        text = generate_latest(sliced)
        whole.append((time.thread_time_ns() - began_ns) / 1e6)
        longest.append(max(sliced.slices_ms))
    whole_ms, longest_ms = statistics.median(whole), statistics.median(longest)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    what = f"CPU time to render {series} series, and to the next pause at most"
    print(f"| {what} | {whole_ms:.1f} ms | {longest_ms:.1f} ms | | {TARGET_MS:.0f} ms |")


def many_series(metrics: Metrics) -> Metrics:
    """Returns the metrics with as many series as a run with twenty seeds has."""
    for seed, gauge in product(range(20), (metrics.seed_weight, metrics.seed_norm, metrics.seed_share)):
        gauge.labels(f"seed-{seed}", "training").set(seed)
    outcomes = ("ok", "timeout", "error", "skipped", "refused", "abandoned")
    for labels in product(("tamiyo", "kasmina"), ("a", "b", "c", "d", "e", "f"), outcomes):
        metrics.peer_call_duration_seconds.labels(*labels)
    return metrics


async def delays_ms(seconds: float, *, scraped: bool) -> list[float]:
    """Returns by how much timers of a millisecond were late, sorted."""
    found: list[float] = []
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    async with exporter([listener], many_series(Metrics()), lambda: Readiness([], [])):
        command = [sys.executable, __file__, "--scrape", address]
        async with await anyio.open_process(command, stdin=subprocess.PIPE) as child:
            if not scraped:
                child.kill()
            until_s = anyio.current_time() + seconds
            while (now_s := anyio.current_time()) < until_s:
                await anyio.sleep(0.001)
                found.append(1000 * (anyio.current_time() - now_s) - 1)
            if scraped:
                child.kill()
    return sorted(found)


def bench_rendering(seconds: float) -> None:
    """Prints the row of the event loop's delays."""
    quiet, busy = (anyio.run(lambda s=scraped: delays_ms(seconds, scraped=s)) for scraped in (False, True))  # type: ignore[misc]
    for name, share in (("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
        a, b = (values[min(len(values) - 1, int(share * len(values)))] for values in (quiet, busy))
        print(f"| delay of the event loop, {name} | {a:.1f} ms | {b:.1f} ms | {b - a:+.1f} ms | {TARGET_MS:.0f} ms |")


def main() -> None:
    """Prints the table, or does what another process asks for."""
    if sys.argv[1:2] == ["--read"]:
        read(*sys.argv[2:4])
        return
    if sys.argv[1:2] == ["--scrape"]:
        while True:
            scrape(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, {arguments.rounds} rounds by turns")
    print("| what | alone | read | difference | target |")
    print("| --- | --- | --- | --- | --- |")
    bench_slices()
    bench_rendering(arguments.seconds)
    bench_steps(arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
