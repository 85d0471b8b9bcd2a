"""What the seeds of `tolaria demo` bring: validation accuracy with and without them, over several random seeds.

Runs the demo itself, one after another: `bench_demo_seeds.py --seeds 5`. Each run takes about 40 s on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

_POINTS_MIN = 2.0


def demo(seed: int) -> dict[str, Any]:
    """Runs the demo with a random seed, on free ports, and returns its summary."""
    settings = [f"training.seed={seed}", "server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0"]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "tolaria", "demo", "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def main() -> int:
    """Prints a line for each run and the mean; the exit code is 1 if the seeds bring less than 2 points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of random seeds")
    parser.add_argument(
        "--first", type=int, default=0, metavar="SEED", help="the first of them; 0 to 4 chose the settings"
    )
    options = parser.parse_args()
    gains = []
    for seed in range(options.first, options.first + options.seeds):
        summary = demo(seed)
        grown, plain = summary["final_accuracy"], summary["final_accuracy_without_seeds"]
        if plain is None:
            sys.exit(f"seed {seed}: the run without seeds failed")
        gains.append(100 * (grown - plain))
        conflicts = [f"{row['conflicts']:.0%}" for row in summary["seeds"] if row["weight"]]
        print(
            f"seed {seed}: {plain:.2%} without, {grown:.2%} with seeds: {gains[-1]:+.2f} points; conflicts "
            f"{', '.join(conflicts) or 'none'}; {summary['rollbacks']} rollbacks, {summary['skipped_steps']} skipped; "
            f"{summary['wall_seconds']:.0f} s",
            flush=True,
        )
    mean = statistics.mean(gains)
    print(f"mean {mean:+.2f} points, lowest {min(gains):+.2f}, over {len(gains)} runs; wanted {_POINTS_MIN:+.2f}")
    return int(mean < _POINTS_MIN)


if __name__ == "__main__":
    sys.exit(main())
