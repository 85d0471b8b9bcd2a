"""How training slows admin RPCs: GetStatus on a paused and on a training service, by turns, from another process.

    python tests/benchmarks/bench_rpc.py [--rounds N] [--calls N]

Two runs: one with epochs of some hundredths of a second, each with an evaluation, decisions and a checkpoint, and one
without epoch boundaries while it is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

import grpc

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import serve

TARGET = 1.2
RUNS = {
    "short epochs": ["training.epochs=1000000"],
    "steps only": ["training.steps=1000000000", "training.evaluate_every_steps=100000000"],
}


def latencies_ms(stub: TolariaAdminServiceStub, calls: int) -> list[float]:
    """Returns latencies of consecutive calls with a pause of a millisecond."""
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        stub.GetStatus(admin.GetStatusRequest(), timeout=10)
        found.append(1000 * (time.perf_counter() - started))
        time.sleep(0.001)
    return sorted(found)


def main() -> None:
    """Prints p50 and p99 of both states, and the median of the rounds' ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000)
    arguments = parser.parse_args()
    print("| run | | idle | training | ratio | target |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, settings in RUNS.items():
        idle, busy = measured(settings, arguments.rounds, arguments.calls)
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            a = [quantile(values, share) for values in idle]
            b = [quantile(values, share) for values in busy]
            ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
            medians = f"{statistics.median(a):.2f} ms | {statistics.median(b):.2f} ms"
            print(f"| {name} | {label} | {medians} | {ratio:.2f} | {TARGET if label == 'p99' else ''} |", flush=True)


def measured(settings: list[str], rounds: int, calls: int) -> tuple[list[list[float]], list[list[float]]]:
    """Returns the latencies of each round, of the paused and of the training service."""
    idle, busy = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(*settings, reference_peers=True, cwd=Path(folder)) as service,
        grpc.insecure_channel(service.addresses()[0]) as channel,
    ):
        stub = TolariaAdminServiceStub(channel)
        while not stub.GetStatus(admin.GetStatusRequest(), timeout=10).global_step:
            time.sleep(0.1)
        for _ in range(rounds):
            request_id = uuid.uuid4().hex
            stub.PauseTraining(admin.PauseTrainingRequest(request_id=f"p{request_id}", reason="measure"))
            idle.append(latencies_ms(stub, calls))
            stub.ResumeTraining(admin.ResumeTrainingRequest(request_id=f"r{request_id}", reason="measure"))
            busy.append(latencies_ms(stub, calls))
    return idle, busy


def quantile(values: list[float], share: float) -> float:
    """Returns the quantile of sorted values."""
    return values[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
