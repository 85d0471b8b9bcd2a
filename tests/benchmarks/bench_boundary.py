"""The duration of an epoch boundary, with the reference Tamiyo and Kasmina beside a training service.

    python tests/benchmarks/bench_boundary.py [--boundaries 320] [--batch-size 128]

The service and the peers are separate processes on this machine; the digits are trained in short epochs. The figure is
the service's own (`boundary_ms` of its `epoch_finished` lines, whose quantiles are in GetStatus): from the end of the
lane's work, validation included, until training may go on. Boundaries at which Tamiyo was not called (a breach enters
conservative mode for some epochs) do not count. The first ten, with the first calls of both peers, are listed
separately. Target: a p99 under 18 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import Serve, serve

BUDGET_MS = 18.0
_FIRST = 10
_NOT_ASKED = "not asked"


def boundaries(service: Serve) -> list[tuple[float, str]]:
    """Returns milliseconds of each boundary so far, and Tamiyo's answer for display."""
    lines = [line for line in list(service.lines) if '"epoch_finished"' in line]
    return [(found["boundary_ms"], found["tamiyo"]) for found in map(json.loads, lines)]


def measure(wanted: int, batch_size: int) -> tuple[list[float], int]:
    """Returns boundaries at which Tamiyo was called, in milliseconds, and the number of all others."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(
            "training.epochs=1000000",
            f"training.options.batch_size={batch_size}",
            reference_peers=True,
            cwd=Path(folder),
        ) as service,
    ):
        service.addresses()
        asked: list[float] = []
        while len(asked) < wanted and service.process.poll() is None:
            time.sleep(0.5)
            found = boundaries(service)
            asked = [held_up_ms for held_up_ms, answer in found if not answer.startswith(_NOT_ASKED)]
        return asked, len(found) - len(asked)


def main() -> int:
    """Prints the figures as JSON; exit status 0 when the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boundaries", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    asked, skipped = measure(arguments.boundaries, arguments.batch_size)
    settled = asked[_FIRST:]
    p99 = statistics.quantiles(settled, n=100)[98]
    figures = {
        "boundaries": len(settled),
        "tamiyo_not_asked": skipped,
        "first_ten_max_ms": max(asked[:_FIRST]),
        "median_ms": round(statistics.median(settled), 2),
        "p90_ms": round(statistics.quantiles(settled, n=10)[8], 2),
        "p99_ms": round(p99, 2),
        "max_ms": max(settled),
        "over_budget": sum(held_up_ms > BUDGET_MS for held_up_ms in settled),
        "met": p99 < BUDGET_MS,
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
