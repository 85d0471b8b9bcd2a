"""A rollback from its request to the first step after it, compared with restoring by torch.load.

    python tests/benchmarks/bench_rollback.py [--rounds 8] [--layers 30]

A whole run (event loop, lane, coordinator, journal, files) of the digits and of a model with 0.36 GB of state, without
peers. Each round rolls back in both tiers and, while the run is held, restores the same model and optimizer plainly:
torch.load of a torch.save of both, from memory or from a file in the page cache, load_state_dict twice, one step. The
time of Tolaria is that of its log event `training_again`, from `Recovery.begin` to the end of the step.
Takes a minute, 3 GB of memory and 1 GB of disk under the working directory.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import structlog
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.side_by_side import machine, show, timed
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, RollbackTier
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.jobs import HOST
from tolaria.lane.train_module import TrainModule
from tolaria.rollback.protocol import Rollback

TIERS = {"fast": ROLLBACK_TIER_FAST, "full": ROLLBACK_TIER_FULL}


@dataclass
class Case:
    """A run: its title, job and settings."""

    title: str
    job: str
    rounds: int
    rollback: dict[str, object]
    training: dict[str, Any] = field(default_factory=dict)


class PlainRestore:
    """Restores one torch.save of model and optimizer, from memory or from a file."""

    def __init__(self, module: TrainModule, folder: Path) -> None:
        self._module = module
        self._memory = io.BytesIO()
        self._file = folder / "plain.pt"
        self._save(self._memory)
        self._save(self._file)
        data = module.job.training_data()
        data.begin_epoch(1)
        batch = data.next_batch()
        if batch is None:
            raise LookupError("the job has no data")
        self._batch = batch

    def from_memory(self) -> None:
        """Loads and does a step."""
        self._memory.seek(0)
        self._load(self._memory)

    def from_file(self) -> None:
        """Loads and does a step."""
        self._load(self._file)

    def _save(self, target: io.BytesIO | Path) -> None:
        module = self._module
        torch.save({"model": module.model.state_dict(), "optimizer": module.optimizer.state_dict()}, target)

    def _load(self, source: io.BytesIO | Path) -> None:
        module = self._module
        found = torch.load(source, weights_only=True)
        module.model.load_state_dict(found["model"])
        module.optimizer.load_state_dict(found["optimizer"])
        module.optimizer.zero_grad()
        losses = module.job.losses(module.model, self._batch)
        losses[HOST].backward()  # type: ignore[index]
        module.optimizer.step()
        module.optimizer.zero_grad()


async def measure(case: Case, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Returns seconds by contender, and the gigabytes of the state."""
    found: dict[str, list[float]] = {"plain_memory": [], "fast": [], "plain_file": [], "full": []}
    sections: dict[str, object] = {
        "rollback": {"automatic": False, **case.rollback},
        "state": {"dir": str(folder / "state")},
    }
    run = new_run(
        FakePeers(),
        job=case.job,
        epochs=10**6,
        sections=sections | {"checkpoint": {"every_epochs": 0}},
        **case.training,
    )
    with structlog.testing.capture_logs() as lines:
        async with running(run):
            await run.until(lambda: run.status.global_step > 3)
            row = await run.run.checkpoint("to be restored")
            for turn in range(case.rounds + 1):
                for name, tier in TIERS.items():
                    seconds = await roll_back(run, tier, lines)
                    if turn:
                        found[name].append(seconds)
                await restore_plainly(run, folder, found, keep=turn > 0)
            await run.run.stop("enough")
    return found, row.size_bytes / 1e9


async def roll_back(
    run: RunUnderTest, tier: RollbackTier.ValueType, lines: Sequence[MutableMapping[str, Any]]
) -> float:
    """Rolls back; returns the seconds until the end of the first step after it."""

    def again() -> list[float]:
        return [float(line["after_ms"]) for line in list(lines) if line["event"] == "training_again"]

    before, step = len(again()), run.status.global_step
    await run.until(lambda: run.status.global_step > step)
    await run.run.roll_back(Rollback(tier, None, "measured", "operator"))
    with anyio.fail_after(60):
        while len(again()) == before:
            await anyio.sleep(0.002)
    return again()[-1] / 1e3


async def restore_plainly(run: RunUnderTest, folder: Path, found: dict[str, list[float]], *, keep: bool) -> None:
    """Does the same with torch.load, in another thread as the lane is one, while the lane is held."""
    await run.run.pause("measured")

    def both() -> tuple[float, float]:
        torch.set_num_threads(1)
        plain = PlainRestore(run.module, folder)
        return timed(plain.from_memory), timed(plain.from_file)

    from_memory_s, from_file_s = await anyio.to_thread.run_sync(both)
    if keep:
        found["plain_memory"].append(from_memory_s)
        found["plain_file"].append(from_file_s)
    # The plain restore has changed the lane's parameters.
    await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, None, "undo", "operator"))
    await run.run.resume("measured")


def show_case(case: Case, found: dict[str, list[float]], size_gb: float) -> None:
    """Prints both tiers beside the plain restores."""
    words = {
        "plain_memory": "torch.load from memory, load_state_dict, one step",
        "fast": "fast tier, request to the end of the first step",
    }
    title = f"{case.title}: {size_gb:.4f} GB, {case.rounds} rounds; {machine()}"
    show(title, "plain_memory", found, words)
    words = {
        "plain_file": "torch.load from a file, load_state_dict, one step",
        "full": "full tier, request to the end of the first step",
    }
    show("", "plain_file", found, words)
    if size_gb > 0.1:
        fast, full = (1e3 * statistics.median(found[name]) / size_gb for name in TIERS)
        print(f"per GB: fast {fast:.0f} ms, full {full:.0f} ms")


def main() -> None:
    """Prints both tables of both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"layers": arguments.layers, "batch": 4, "steps": 1000}
    cases = (
        Case("digits", "tolaria.jobs.digits:digits", 8 * arguments.rounds, {}),
        Case(
            "wide",
            "benchmarks.side_by_side:WideJob",
            arguments.rounds,
            {"memory_mb": 3000, "snapshots_max": 2, "fast_budget_s": 30.0, "full_budget_s": 60.0},
            {"options": options},
        ),
    )
    for case in cases:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
            found, size_gb = anyio.run(measure, case, Path(name))
        show_case(case, found, size_gb)


if __name__ == "__main__":
    main()
