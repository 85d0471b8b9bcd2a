"""What a group of ranks costs a step: their agreement, the sum of gradients, and a whole step against one rank.

    python tests/benchmarks/bench_ranks.py [--world N] [--rounds N]

The agreement is a sum of some numbers over gloo, apart or with the gradients, beside a computation that takes 10 ms on
every rank, or none, and the sum of gradients, for which ranks wait for each other in any case: steps with and without
it alternate in one run. Ranks of one machine share its cores, so that a step on several is not faster here than on one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.rank_run import run_on_ranks
from tolaria.ranks.group import Group

COMPUTED_S = 0.01


def agreement(group: Group, *, steps: int, computed_s: float, passes: Sequence[str]) -> dict[str, list[float]]:
    """Returns the times of whole steps in seconds, by how the ranks agree in them; one of each kind in turn.

    The times of kinds with " cpu" are those of all threads of this process on a core, which other load does not change.

    A step computes and sums 100 kB of gradients. `none`: no agreement beside that. `apart`: an operation before.
    `rides`: in the same operation.
    """
    word = ([0.5] * 5, {"completed steps": 1, "batches read": 2, "samples in them": 3, "names": 4, "announced": 5})
    parameters = [torch.zeros(25_000)]
    times: dict[str, list[float]] = {kind + suffix: [] for kind in passes for suffix in ("", " cpu")}
    for step in range(steps * len(passes)):
        kind = passes[step % len(passes)]
        group.all_reduce([0.0])  # both begin together
        started_s, used_s = time.perf_counter(), time.process_time()
        compute(computed_s)
        if kind == "rides":
            group.all_reduce_ride(group.step_word(*word, rides=True), parameters, parameters)
        else:
            if kind == "apart":
                group.all_reduce_step(*word)
            group.all_reduce_gradients(parameters, parameters)
        times[kind].append(time.perf_counter() - started_s)
        times[f"{kind} cpu"].append(time.process_time() - used_s)
    return times if group.leads else {}  # the pipe of another rank is read last


def compute(computed_s: float) -> None:
    """Multiplies small matrices for a time of this thread on a core, however long that takes."""
    matrix, until_s = torch.ones(32, 32), time.thread_time() + computed_s
    while time.thread_time() < until_s:
        matrix.mm(matrix)


def gradients(group: Group, *, megabytes: int, rounds: int) -> list[float]:
    """Returns the times of summing gradients in 100 tensors of float32, in seconds."""
    parameters = [torch.zeros(megabytes * 2500) for _ in range(100)]
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        group.all_reduce_gradients(parameters, parameters)
        times.append(time.perf_counter() - started_s)
    return times


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of each kind")
    options = parser.parse_args()
    here = "benchmarks.bench_ranks"
    sizes, passes = (1, 100), ("none", "apart", "rides")
    scenarios: list[tuple[str, dict[str, Any]]] = [
        (f"{here}:agreement", {"steps": options.steps, "computed_s": computed_s, "passes": passes})
        for computed_s in (COMPUTED_S, 0.0)
    ]
    scenarios += [(f"{here}:gradients", {"megabytes": size, "rounds": options.rounds}) for size in sizes]
    computing, idle, *summed = (results[0] for results in run_on_ranks(options.world, scenarios, 600))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {options.world} ranks")
    for what, times in ((f"a step of {1e3 * COMPUTED_S:.0f} ms", computing), ("a step without computing", idle)):
        bare_s = statistics.median(times["none"])
        print(f"{what} and its sum of gradients: median {1e3 * bare_s:.3f} ms")
        for kind in passes[1:]:
            more_s = statistics.median(times[kind]) - bare_s
            used_s = statistics.median(times[f"{kind} cpu"]) - statistics.median(times["none cpu"])
            print(
                f"  agreement {kind}: {1e3 * more_s:+.3f} ms, {100 * more_s / bare_s:+.1f} %;"
                f" {1e6 * used_s:+.0f} us of a core"
            )
    for size, times in zip(sizes, summed, strict=True):
        print(f"sum of {size} MB of gradients: median {1e3 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main()
