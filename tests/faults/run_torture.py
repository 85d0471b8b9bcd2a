"""Kills a run that trains, writes checkpoints, rolls back and grows seeds: `run_torture.py [--kills N] [--seed N]`.

The run, in a child process, reports which checkpoints are committed: those must survive any kill. It is the whole
service without its sockets and the signal handlers of its main thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, Protocol

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import anyio
import structlog
import torch

from faults.torture import IN_MEMORY
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.runs import FakePeers
from tolaria.checkpoint.inspection import inspect_storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings
from tolaria.errors import TolariaError
from tolaria.rollback.protocol import Rollback
from tolaria.run.resume import load_resume_point, locked_state, prepare_state, run_row
from tolaria.run.run import TrainingRun
from tolaria.service.foundation import Foundation, build_lane
from tolaria.service.wiring import Core, new_run
from tolaria.signals import SignalBoard
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics


def settings_of(directory: Path) -> Settings:
    """Returns settings of a small run in that directory that writes checkpoints all the time."""
    return Settings.model_validate(
        {
            "state": {"dir": str(directory)},
            "signals": {"path": str(directory / "board")},
            "training": {"job": "support.jobs:SlotJob", "epochs": 10**6, "device": "cpu", "threads": 1},
            "checkpoint": {"every_epochs": 1, "every_steps": 3, "keep_last": 4, "retry_s": 0.05},
            "rollback": {"automatic": False, "every_steps": 2, "fast_budget_s": 10.0},
            "optimizer": {"rebuild_min_interval_steps": 0},
            "emergency": {"sentinel": False},
            "control": {"boundary_budget_ms": 2000, "tamiyo_budget_ms": 1000},
        }
    )


class Report(Protocol):
    """Sends facts to the parent at once, as the child may be killed at any moment."""

    def __call__(self, **facts: object) -> None: ...


class AlternatingSeed(FakePeers):
    """Peers that desire a seed in every other epoch, so that the optimizer is rebuilt all the time."""

    async def export_seeds(self, state: SystemStatePacket, refusals: object = ()) -> list[SeedState]:
        seed = SeedState(seed_id="a", blueprint_id="residual_mlp", stage=SEED_STAGE_TRAINING, slot="middle")
        return [seed] if state.current_epoch % 2 else []


async def disturb(run: TrainingRun, generator: random.Random, report: Report) -> None:
    """Has checkpoints written and rollbacks carried out until cancelled."""
    while True:
        try:
            if generator.random() < 0.6:
                row = await run.checkpoint("torture")
                report(committed=row.checkpoint_id, step=row.global_step, digest=row.digest)
            else:
                tier = generator.choice([ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL])
                target = generator.choice([None, max(0, run.status().global_step - generator.randrange(20))])
                report(rolling_back=True)
                back = await run.roll_back(Rollback(tier, target, "torture", "operator"))
                report(restored=back.restored_step, proven=back.state_digest == back.expected_digest)
        except TolariaError as error:
            report(refused=str(error))
        await anyio.sleep(generator.random() * 0.02)


def train(directory: Path, seed: int, report: Report) -> None:
    """Resumes the run in that directory, or starts one, and trains until killed."""
    settings = settings_of(directory)
    build = build_lane(settings)
    with ExitStack() as stack:
        stack.enter_context(locked_state(settings))
        point = load_resume_point(stack.enter_context(prepare_state(settings)))
        if point.loaded is not None:
            build.resume_run(point.loaded.image, ())
        damaged = [] if point.loaded is None else [damage.checkpoint_id for damage in point.loaded.damaged]
        run_id, storage = point.state.run_id, point.state.storage
        step = build.ready.position.global_step
        report(ready=step, run=run_id, resumed=point.loaded is not None, damaged=damaged)
        foundation = Foundation(
            settings=settings,
            build=build,
            board=stack.enter_context(SignalBoard.create(directory / "board", run_id)),
            storage=storage,
            writer=stack.enter_context(CheckpointWriter(storage.checkpoints)),
            run=run_row(storage.journal, run_id),
            active_halt=None,
            metrics=Metrics(),
            emitter=Emitter(),
            log_context=LogContext(),
            newest_checkpoint_ns=None if point.loaded is None else point.loaded.row.at_ns,
            points=point.points,
            rollbacks=point.rollbacks,
        )
        anyio.run(serve, Core(foundation), random.Random(seed), report)


async def serve(core: Core, generator: random.Random, report: Report) -> None:
    """Serves the run and disturbs it."""
    service = new_run(core, AlternatingSeed().connected())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.serve, core, tasks)
        tasks.start_soon(disturb, service.run, generator, report)


def kill_runs(kills: int, seed: int) -> list[str]:
    """Kills one run in one directory at random moments; returns the problems found, as sentences."""
    generator = random.Random(seed)
    problems: list[str] = []
    seen = {"committed": 0, "restored": 0, "refused": 0}
    required: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tolaria-torture-", dir=IN_MEMORY) as place:
        directory = Path(place) / "state"
        for number in range(kills):
            facts = killed_child(directory, seed * 1000 + number, generator.random() * 0.4)
            problems += [f"kill {number}: {problem}" for problem in after_start(facts[0] if facts else {}, required)]
            required = required_after(facts, required)
            for kind in seen:
                seen[kind] += sum(kind in fact for fact in facts)
            problems += [f"kill {number}: step {f['restored']} unproven" for f in facts if f.get("proven") is False]
            problems += [f"kill {number}: {f.name}: {f.condition}" for f in inspect_storage(directory) if f.bad]
        last = killed_child(directory, seed, 0.0)
        problems += after_start(last[0] if last else {}, required)
    sys.stdout.write(f"{kills} kills: {json.dumps(seen)}\n")
    return problems


def after_start(ready: dict[str, Any], required: dict[str, Any]) -> list[str]:
    """Returns the problems of a resumed run, given what had been reported before the kill."""
    if "ready" not in ready:
        return [f"it was not resumed: {ready}"]
    problems = [f"{name} was damaged" for name in ready["damaged"]]
    if required and not ready["resumed"]:
        problems.append("it started anew although there were checkpoints")
    if required.get("run", ready["run"]) != ready["run"]:
        problems.append(f"it was resumed as another run than {required['run']}")
    if ready["ready"] < required.get("step", 0):
        problems.append(f"step {required['step']} was reported as committed, and it was resumed at {ready['ready']}")
    return problems


def required_after(facts: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """Returns what a resumed run must have: at least the newest commit, unless a rollback began after it."""
    required = dict(before)
    for fact in facts:
        if fact.get("resumed"):
            required = {"run": fact["run"], "step": fact["ready"]}
        if "committed" in fact:
            required = {"run": facts[0]["run"], "step": fact["step"]}
        if "rolling_back" in fact and required:
            required["step"] = 0
    return required


def killed_child(directory: Path, seed: int, after_s: float) -> list[dict[str, Any]]:
    """Forks a run and kills it `after_s` seconds after it was ready; returns the reported facts."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def report(**facts: object) -> None:
            os.write(writing, json.dumps(facts).encode() + b"\n")

        try:
            train(directory, seed, report)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(after_s)  # the moment of the kill is what is random here
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return [json.loads(line) for line in [first, *lines] if line.endswith("\n")]


def main() -> int:
    """Kills runs and prints the problems found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(processors=[_drop])
    started_s = time.monotonic()
    wrong = kill_runs(arguments.kills, arguments.seed)
    sys.stdout.write("\n  ".join([f"{len(wrong)} wrong, {time.monotonic() - started_s:.1f} s", *wrong[:20]]) + "\n")
    return 1 if wrong else 0


def _drop(_logger: object, _method: str, _event: object) -> NoReturn:
    raise structlog.DropEvent


if __name__ == "__main__":
    sys.exit(main())
