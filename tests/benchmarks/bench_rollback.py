"""A rollback from its trigger to the first good step after it, against torch's own way of going back.

    python tests/benchmarks/bench_rollback.py [--rounds 8] [--layers 30]

A whole run (event loop, lane, coordinator, journal, files) of the digits and of a model with 0.36 GB of state, without
peers. Each round rolls both tiers back, and, while the run is held, does what one would write at home to the same
model and optimizer: torch.load of a torch.save of both, from memory or from a file in the page cache, load_state_dict
twice, one step. What is told of Tolaria is its own `training_again`, from `RollbackDesk.begin` to the end of the step.
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
from tolaria.training.recovery.rollbacks import Asked
from tolaria.training.rig import Rig

TIERS = {"fast": ROLLBACK_TIER_FAST, "full": ROLLBACK_TIER_FULL}


@dataclass
class Case:
    """One run: its job and settings, and what it is called."""

    title: str
    job: str
    rounds: int
    rollback: dict[str, object]
    training: dict[str, Any] = field(default_factory=dict)


class AtHome:
    """Going back as one would write it: one torch.save of both, kept in memory and in a file."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig = rig
        self._memory = io.BytesIO()
        self._file = folder / "home.pt"
        self._save(self._memory)
        self._save(self._file)
        data = rig.job.training_data()
        data.begin_epoch(1)
        batch = data.next_batch()
        if batch is None:
            raise LookupError("the job has no data")
        self._batch = batch

    def from_memory(self) -> None:
        """Load and step."""
        self._memory.seek(0)
        self._load(self._memory)

    def from_file(self) -> None:
        """Load and step."""
        self._load(self._file)

    def _save(self, target: io.BytesIO | Path) -> None:
        rig = self._rig
        torch.save({"model": rig.model.state_dict(), "optimizer": rig.optimizer.state_dict()}, target)

    def _load(self, source: io.BytesIO | Path) -> None:
        rig = self._rig
        found = torch.load(source, weights_only=True)
        rig.model.load_state_dict(found["model"])
        rig.optimizer.load_state_dict(found["optimizer"])
        rig.optimizer.zero_grad()
        losses = rig.job.losses(rig.model, self._batch)
        losses[HOST].backward()  # type: ignore[index]
        rig.optimizer.step()
        rig.optimizer.zero_grad()


async def measure(case: Case, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Seconds by contender, and the gigabytes of the state."""
    found: dict[str, list[float]] = {"home_memory": [], "fast": [], "home_file": [], "full": []}
    sections: dict[str, object] = {
        "rollback": {"automatic": False, "halt_on_deadline": False, **case.rollback},
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
            await run.until(lambda: run.progress.global_step > 3)
            row = await run.loop.checkpoint("to go back to")
            for turn in range(case.rounds + 1):
                for name, tier in TIERS.items():
                    seconds = await roll_back(run, tier, lines)
                    if turn:
                        found[name].append(seconds)
                await at_home(run, folder, found, keep=turn > 0)
            await run.loop.stop("enough")
    return found, row.size_bytes / 1e9


async def roll_back(
    run: RunUnderTest, tier: RollbackTier.ValueType, lines: Sequence[MutableMapping[str, Any]]
) -> float:
    """One rollback through the run's desk; seconds until the first good step had been done."""

    def again() -> list[float]:
        return [float(line["after_ms"]) for line in list(lines) if line["event"] == "training_again"]

    before, step = len(again()), run.progress.global_step
    await run.until(lambda: run.progress.global_step > step)
    await run.loop.roll_back(Asked(tier, None, "measured", "operator"))
    with anyio.fail_after(30):
        while len(again()) == before:
            await anyio.sleep(0.002)
    return again()[-1] / 1e3


async def at_home(run: RunUnderTest, folder: Path, found: dict[str, list[float]], *, keep: bool) -> None:
    """The same with torch's own means, in a thread of its own as the lane is one, while the lane stands."""
    await run.loop.pause("measured")

    def both() -> tuple[float, float]:
        torch.set_num_threads(1)
        home = AtHome(run.rig, folder)
        return timed(home.from_memory), timed(home.from_file)

    from_memory_s, from_file_s = await anyio.to_thread.run_sync(both)
    if keep:
        found["home_memory"].append(from_memory_s)
        found["home_file"].append(from_file_s)
    # The lane's parameters were given another state; its own comes back before it goes on.
    await run.loop.roll_back(Asked(ROLLBACK_TIER_FAST, None, "undo", "operator"))
    run.loop.resume("measured")


def tell(case: Case, found: dict[str, list[float]], size_gb: float) -> None:
    """Both tiers beside their rivals."""
    words = {
        "home_memory": "torch.load from memory, load_state_dict, one step",
        "fast": "fast tier, trigger to the end of the first good step",
    }
    title = f"{case.title}: {size_gb:.4f} GB, {case.rounds} rounds; {machine()}"
    show(title, "home_memory", found, words)
    words = {
        "home_file": "torch.load from a file, load_state_dict, one step",
        "full": "full tier, trigger to the end of the first good step",
    }
    show("", "home_file", found, words)
    if size_gb > 0.1:
        fast, full = (1e3 * statistics.median(found[name]) / size_gb for name in TIERS)
        print(f"per GB: fast {fast:.0f} ms, full {full:.0f} ms")


def main() -> None:
    """Print both tables of both cases."""
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
        tell(case, found, size_gb)


if __name__ == "__main__":
    main()
