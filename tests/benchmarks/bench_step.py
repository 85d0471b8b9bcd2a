"""What a step of the lane costs against plain training, without seeds: the digits host and a wide MLP, by turns.

    python tests/benchmarks/bench_step.py [--rounds N]

Plain training is a textbook loop over the same batches, with the same optimizer. The lane's step also checks that loss
and gradients are finite, measures their norm, and controls the learning rate.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tolaria.config import FastPathSettings, Settings, TrainingSettings
from tolaria.jobs import HOST, JobContext, build_job
from tolaria.lane.build import build
from tolaria.lane.step import train_step

TARGET = 1.02
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "digits host (two slots, no seeds)": ("digits", {}),
    "MLP, step of some 10 ms": ("bench_hosting:HostedJob", {"width": 1024, "depth": 4, "steps": 45}),
}


def plain_s(job_name: str, options: dict[str, int]) -> float:
    """Returns the median time of a step in an epoch of the plain loop."""
    torch.manual_seed(0)
    job = build_job(job_name, JobContext(0, torch.device("cpu"), dict(options)))
    model = job.build_model()
    optimizer, cursor = job.build_optimizer(model), job.training_data()
    cursor.begin_epoch(1)
    model.train()
    times: list[float] = []
    while (batch := cursor.next_batch()) is not None:
        started = time.perf_counter()
        optimizer.zero_grad()
        losses = job.losses(model, batch)
        losses[HOST].backward()  # type: ignore[index]
        optimizer.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def lane_s(job_name: str, options: dict[str, int]) -> float:
    """Returns the same for the lane's step, without its wait for data, which the plain loop does not measure."""
    training = TrainingSettings(job=job_name, options=dict(options), device="cpu")
    module = build(Settings(training=training, fastpaths=FastPathSettings(fused="off"))).module
    module.begin_epoch()
    times: list[float] = []
    while True:
        started = time.perf_counter()
        step = train_step(module, lambda: True)
        if step is None:
            return statistics.median(times)
        module.seeds.advance(module.global_step)
        times.append(time.perf_counter() - started - step.input_wait_s)


def main() -> None:
    """Prints one row for each case: medians of the rounds and of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| case | plain step | lane's step | ratio | target |")
    print("| --- | --- | --- | --- | --- |")
    for name, (job_name, options) in CASES.items():
        pairs = [(plain_s(job_name, options), lane_s(job_name, options)) for _ in range(rounds)]
        ratio = statistics.median(lane / plain for plain, lane in pairs)
        plain_ms, lane_ms = (1000 * statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {name} | {plain_ms:.3f} ms | {lane_ms:.3f} ms | {ratio:.3f} | {TARGET} |")


if __name__ == "__main__":
    main()
