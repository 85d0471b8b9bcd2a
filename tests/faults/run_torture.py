"""Kills a run that trains, writes checkpoints, goes back and grows seeds: `run_torture.py [--kills N] [--seed N]`.

The run, in a child process, tells what has been reported to it as committed: that must survive any kill. All of the
service is in it but for its sockets and its main thread's signals.
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
from support.peers import as_clients
from support.runs import FakePeers
from tolaria.checkpoint.inspection import inspect_storage
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings
from tolaria.errors import TolariaError
from tolaria.service.parts import Ground, Parts, new_loop
from tolaria.service.start import new_keeper, new_progress, resume
from tolaria.signals import SignalBoard
from tolaria.telemetry.events import Emitter
from tolaria.telemetry.logging import LogContext
from tolaria.telemetry.metrics import Metrics
from tolaria.training.loop import TrainingLoop
from tolaria.training.recovery.rollbacks import Asked
from tolaria.training.recovery.startup import load_resume_point, prepare_state, run_row
from tolaria.training.rig import build_rig


def settings_of(directory: Path) -> Settings:
    """Of the run in that directory: small, quick, and always writing."""
    return Settings.model_validate(
        {
            "state": {"dir": str(directory)},
            "signals": {"path": str(directory / "board")},
            "training": {"job": "support.jobs:SlotJob", "epochs": 10**6, "device": "cpu", "threads": 1},
            "checkpoint": {"every_epochs": 1, "every_steps": 3, "keep_last": 4, "retry_s": 0.05},
            "rollback": {"automatic": False, "every_steps": 2, "fast_budget_s": 10.0, "halt_on_deadline": False},
            "optimizer": {"rebuild_min_interval_steps": 0},
            "emergency": {"sentinel": False},
            "control": {"boundary_budget_ms": 2000, "tamiyo_budget_ms": 1000},
        }
    )


class Tell(Protocol):
    """Tells the parent, at once: the next moment may be the last."""

    def __call__(self, **facts: object) -> None: ...


class Growers(FakePeers):
    """Peers that have a seed come in one epoch and go in the next, so that the optimizer is rebuilt all the time."""

    async def export_seeds(self, state: SystemStatePacket, refusals: object = ()) -> list[SeedState]:
        seed = SeedState(seed_id="a", blueprint_id="residual_mlp", stage=SEED_STAGE_TRAINING, slot="middle")
        return [seed] if state.current_epoch % 2 else []


async def disturb(loop: TrainingLoop, generator: random.Random, tell: Tell) -> None:
    """Have checkpoints written and rollbacks carried out, without end."""
    while True:
        try:
            if generator.random() < 0.6:
                row = await loop.checkpoint("torture")
                tell(committed=row.checkpoint_id, step=row.global_step, digest=row.digest)
            else:
                tier = generator.choice([ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL])
                target = generator.choice([None, max(0, loop.global_step - generator.randrange(20))])
                tell(going_back=True)
                outcome = await loop.roll_back(Asked(tier, target, "torture", "operator"))
                tell(restored=outcome.restored_step, proven=outcome.state_digest == outcome.expected_digest)
        except TolariaError as error:
            tell(refused=str(error))
        await anyio.sleep(generator.random() * 0.02)


def train(directory: Path, seed: int, tell: Tell) -> None:
    """Resume what is there, and go on until killed."""
    settings = settings_of(directory)
    rig = build_rig(settings)
    keeper = new_keeper(settings, rig)
    with ExitStack() as stack:
        point = load_resume_point(stack.enter_context(prepare_state(settings)))
        if point.loaded is not None:
            resume(keeper, point.loaded, settings)
        told = [] if point.loaded is None else [damage.checkpoint_id for damage in point.loaded.damaged]
        tell(ready=rig.global_step, run=point.state.run_id, resumed=point.loaded is not None, damaged=told)
        progress = new_progress(settings, rig, run_id=point.state.run_id)
        storage = point.state.storage
        ground = Ground(
            settings=settings,
            rig=rig,
            keeper=keeper,
            progress=progress,
            board=stack.enter_context(SignalBoard.create(directory / "board", progress.run_id)),
            metrics=Metrics(),
            emitter=Emitter(),
            log_context=LogContext(),
            storage=storage,
            run=run_row(storage.journal, progress.run_id),
            standing=None,
            writer=stack.enter_context(CheckpointWriter(storage.checkpoints)),
        )
        anyio.run(serve, Parts(ground), random.Random(seed), tell)  # noqa: S311 - chance, not secrets


async def serve(parts: Parts, generator: random.Random, tell: Tell) -> None:
    """The run with all that belongs to it."""
    peers = Growers()
    tamiyo, kasmina = as_clients(peers)
    loop = new_loop(parts, tamiyo=tamiyo, kasmina=kasmina, seats=peers.seats)
    async with anyio.create_task_group() as tasks:
        for task in (loop.consultant.serve, loop.rollbacks.serve, loop.checkpoints.serve, parts.archive.serve):
            tasks.start_soon(task)
        tasks.start_soon(loop.run)
        tasks.start_soon(disturb, loop, generator, tell)


def kill_runs(kills: int, seed: int) -> list[str]:
    """What was found wrong, as sentences: one directory, one run, killed at that many random moments."""
    generator = random.Random(seed)  # noqa: S311 - chance, not secrets
    problems: list[str] = []
    seen = {"committed": 0, "restored": 0, "refused": 0}
    claim: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tolaria-torture-", dir=IN_MEMORY) as place:
        directory = Path(place) / "state"
        for number in range(kills):
            told = killed_child(directory, seed * 1000 + number, generator.random() * 0.4)
            problems += [f"kill {number}: {problem}" for problem in after_start(told[0] if told else {}, claim)]
            claim = claimed(told, claim)
            for kind in seen:
                seen[kind] += sum(kind in fact for fact in told)
            problems += [f"kill {number}: step {f['restored']} unproven" for f in told if f.get("proven") is False]
            problems += [f"kill {number}: {f.name}: {f.condition}" for f in inspect_storage(directory) if f.bad]
        last = killed_child(directory, seed, 0.0)
        problems += after_start(last[0] if last else {}, claim)
    sys.stdout.write(f"{kills} kills: {json.dumps(seen)}\n")
    return problems


def after_start(ready: dict[str, Any], claim: dict[str, Any]) -> list[str]:
    """What is wrong with how a run came back, given what had been reported before it was killed."""
    if "ready" not in ready:
        return [f"it did not come back: {ready}"]
    problems = [f"{name} was damaged" for name in ready["damaged"]]
    if claim and not ready["resumed"]:
        problems.append("it began anew although there were checkpoints")
    if claim.get("run", ready["run"]) != ready["run"]:
        problems.append(f"it came back as another run than {claim['run']}")
    if ready["ready"] < claim.get("step", 0):
        problems.append(f"step {claim['step']} was reported as committed, and it came back at {ready['ready']}")
    return problems


def claimed(told: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """What a run must come back with: at least the newest commit, unless it has been told to go back since."""
    claim = dict(before)
    for fact in told:
        if fact.get("resumed"):
            claim = {"run": fact["run"], "step": fact["ready"]}
        if "committed" in fact:
            claim = {"run": told[0]["run"], "step": fact["step"]}
        if "going_back" in fact and claim:
            claim["step"] = 0
    return claim


def killed_child(directory: Path, seed: int, after_s: float) -> list[dict[str, Any]]:
    """Fork a run, kill it so long after it was ready; returns what it has told by then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def tell(**facts: object) -> None:
            os.write(writing, json.dumps(facts).encode() + b"\n")

        try:
            train(directory, seed, tell)
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
    """Kill runs and say what was found."""
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
