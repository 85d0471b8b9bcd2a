"""What a group of ranks costs a step: their agreement, the sum of gradients, and a whole step against one rank.

    python tests/benchmarks/bench_ranks.py [--world N] [--rounds N]

The agreement (`Group.all_reduce_step`) is one sum of twelve float64 numbers over gloo, after a computation that takes
10 ms on every rank, or none. Ranks of one machine share its cores, so that a step on several is not faster here than on
one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.rank_run import run_on_ranks
from tolaria.ranks.group import Group

COMPUTED_S = 0.01


def agreement(group: Group, *, steps: int, computed_s: float) -> dict[str, Any]:
    """Returns the times of the agreement after each computation, and of both together, in seconds."""
    agreed, whole = list[float](), list[float]()
    for step in range(steps):
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < computed_s:
            pass
        asked_s = time.perf_counter()
        group.all_reduce_step([0.5] * 5, {"completed steps": step, "batches read": step, "names of losses": 7})
        agreed.append(time.perf_counter() - asked_s)
        whole.append(time.perf_counter() - started_s)
    return {"agreed": agreed, "whole": whole}


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
    options = parser.parse_args()
    here = "benchmarks.bench_ranks"
    sizes = (1, 100)
    scenarios: list[tuple[str, dict[str, Any]]] = [
        (f"{here}:agreement", {"steps": 500, "computed_s": computed_s}) for computed_s in (COMPUTED_S, 0.0)
    ]
    scenarios += [(f"{here}:gradients", {"megabytes": size, "rounds": options.rounds}) for size in sizes]
    agreed, alone, *summed = (results[0] for results in run_on_ranks(options.world, scenarios))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {options.world} ranks")
    ordered = sorted(agreed["agreed"])
    print(
        f"agreement: median {1e3 * statistics.median(ordered):.3f} ms, p99 {1e3 * ordered[-len(ordered) // 100]:.3f} ms"
    )
    print(f"agreement without computing: median {1e3 * statistics.median(alone['agreed']):.3f} ms")
    share = statistics.median(agreed["whole"]) / COMPUTED_S - 1
    print(f"a step of {1e3 * COMPUTED_S:.0f} ms takes {100 * share:.1f} % longer with it")
    for size, times in zip(sizes, summed, strict=True):
        print(f"sum of {size} MB of gradients: median {1e3 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main()
