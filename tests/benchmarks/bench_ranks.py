"""What a group of ranks costs a step: their agreement, the sum of gradients, and merging gradients of sources.

    python tests/benchmarks/bench_ranks.py [--world N] [--rounds N]

The agreement is a sum of some numbers over gloo, apart or with the gradients, beside a computation that takes 10 ms on
every rank, or none, and the sum of gradients, for which ranks wait for each other in any case: steps with and without
it alternate in one run. Merging is PCGrad on rows of sources, as one rank does it, as replicas do, which sum the rows
first, and as ranks with shards do, which sum the dot products of their columns. Ranks of one machine share its cores,
so that a step on several is not faster here than on one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.rank_run import run_on_ranks
from tolaria.gradients.gram import combine_rows, gram_matrix
from tolaria.gradients.pcgrad import project, projection_order, step_generator
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


def merging(group: Group, *, sources: int, elements: int, rounds: int) -> dict[str, list[float]]:
    """Returns, for each kind of group, the seconds that each merge of float32 rows took; nothing if this rank follows.

    `one`: one rank alone, while the others wait. `replicas`: with the sum of the rows. `shards`: the columns of each
    rank, with the sum of their dot products. `sum`: the sum of a single gradient, which replicas need in any case.
    """
    matrix = torch.randn(sources, elements)
    columns = torch.randn(sources, elements // group.world)
    order = projection_order(sources, step_generator("benchmark", 0))
    out, part = torch.empty(elements), torch.empty(elements // group.world)

    def merge(rows: Tensor, result: Tensor, *, over_shards: bool = False) -> None:
        gram = gram_matrix(rows)
        if over_shards:
            group.all_reduce_tensor(gram)
        combine_rows(rows, project(gram, order).combined([1.0] * sources), out=result)

    def replicas() -> None:
        group.all_reduce_tensor(matrix)
        merge(matrix, out)

    kinds: dict[str, Callable[[], object]] = {
        "one": lambda: merge(matrix, out) if group.leads else None,
        "replicas": replicas,
        "shards": lambda: merge(columns, part, over_shards=True),
        "sum": lambda: group.all_reduce_gradients([matrix[0]], [matrix[0]]),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, work in kinds.items():
            matrix.normal_()  # sums do not grow from round to round
            columns.normal_()
            group.all_reduce([0.0])  # all begin together
            started_s = time.perf_counter()
            work()
            times[kind].append(time.perf_counter() - started_s)
            group.all_reduce([0.0])  # and none fills its rows while another one is measured
    return times if group.leads else {}


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
    rows = [(4, 1_000_000), (4, 10_000_000)]
    scenarios += [
        (f"{here}:merging", {"sources": sources, "elements": elements, "rounds": options.rounds})
        for sources, elements in rows
    ]
    computing, idle, *others = (results[0] for results in run_on_ranks(options.world, scenarios, 600))
    summed, merged = others[: len(sizes)], others[len(sizes) :]
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
    for (sources, elements), times in zip(rows, merged, strict=True):
        one_s = statistics.median(times["one"])
        print(f"PCGrad on {sources} rows of {elements} elements: one rank {1e3 * one_s:.1f} ms")
        for kind in ("replicas", "shards", "sum"):
            ratio = statistics.median(a / b for a, b in zip(times[kind], times["one"], strict=True))
            print(f"  {kind}: {1e3 * statistics.median(times[kind]):.1f} ms, {ratio:.2f} of one rank's")


if __name__ == "__main__":
    main()
