"""Snapshots and rollbacks of a sharded model: in memory that all ranks map, against gathering and sending the state.

    python tests/benchmarks/bench_rank_snapshots.py [--world N] [--width N] [--rounds N] [--turns N]

By turns, with `lane.parallel = fsdp`, AdamW and float64 on the CPU. Both include all digests: of what is captured, of
the image before it is restored, and of the live state afterwards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.rank_run import run_on_ranks


def main() -> None:
    """Prints the medians for each GB of the state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"world": 2, "width": 3072, "rounds": 5, "turns": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(options.turns):
        for shows, results in found.items():
            given = {"shows": shows, "width": options.width, "rounds": options.rounds}
            ((leader, *_),) = run_on_ranks(options.world, [("support.segment_scenarios:timed", given)])
            if not isinstance(leader, dict):
                raise SystemExit(f"a rank has failed: {leader}")
            results.append(leader)
    size_gb = found[True][0]["bytes"] / 1e9
    print(f"{os.cpu_count()} cores, {options.world} ranks, {size_gb:.2f} GB, {options.turns} turns")
    print("| | snapshot, s per GB | rollback, s per GB |\n| --- | --- | --- |")
    medians = {}
    for shows, results in found.items():
        medians[shows] = [
            statistics.median(s for each in results for s in each[what]) / size_gb for what in ("taken", "restored")
        ]
        name = "in place" if shows else "gathered and sent"
        print(f"| {name} | " + " | ".join(f"{each:.2f}" for each in medians[shows]) + " |")
    print("| ratio | " + " | ".join(f"{a / b:.2f}" for a, b in zip(medians[True], medians[False], strict=True)) + " |")


if __name__ == "__main__":
    main()
