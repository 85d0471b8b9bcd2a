"""What `run_on_ranks` runs: a training that the leader's script drives."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from leyline.v1.enums_pb2 import SeedLifecycleStage
from support.lane_driver import NoHeartbeat, RunningLane, running, seed
from support.waiting import wait_for
from tolaria.config import Settings
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.hosting import build_on_all_ranks
from tolaria.lane.messages import (
    CaptureImage,
    EpochDone,
    Hold,
    ImageCaptured,
    LaneEnded,
    ReconcileSeeds,
    Release,
    Restore,
    Restored,
    RunEpoch,
    StepDone,
)
from tolaria.ranks.group import Group


def train(
    group: Group | None,
    *,
    job: str,
    script: Sequence[Sequence[Any]],
    sections: Mapping[str, Any] | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Trains by a script of the leader's; returns its losses, norms, evaluations and answers, and the final digests.

    Lines of the script: epoch · seeds STAGE · restore STEP · capture · reload SECONDS (the captured image, before a
    deadline) · hold SECONDS · release · begin SECONDS (an epoch, without waiting for its end).
    """
    torch.set_num_threads(1)
    given = {"job": f"support.rank_jobs:{job}", "device": "cpu", "threads": 1, "deterministic": True, **training}
    settings = Settings.model_validate({"training": given, **(sections or {})})
    built = build_on_all_ranks(group, lambda: build(settings, group=group))
    if group is not None and not group.leads:
        built.snapshots.takes_snapshots = False
        lane = built.lane(NoHeartbeat(), Path("unused"))
        lane.run(lane.take_events)
        if lane.peer_lost or lane.failed:
            return {"peer_lost": lane.peer_lost, "failed": lane.failed}
        return {"digests": group.all_gather_text(_digest(built))}
    with running(built, Path(tempfile.mkdtemp())) as run:
        answers = [_play(run, line) for line in script]
    steps = run.all_of(StepDone)
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "samples": [step.samples for step in steps],
        "skipped": [step.global_step for step in steps if step.skipped],
        "left_out": [list(step.left_out) for step in steps],
        "judged": [step.judged for step in steps],
        "evaluations": [
            [done.evaluation.loss_sum, done.evaluation.correct, done.evaluation.samples]
            for done in run.all_of(EpochDone)
        ],
        "answers": answers,
        "digests": [_digest(built)] if group is None else group.all_gather_text(_digest(built)),
        "peer_lost": run.lane.peer_lost,
    }


def _digest(built: BuiltLane) -> str:
    """The digest of parameters, buffers and optimizer state: random numbers are those of each rank."""
    found = built.snapshots.state.fingerprint()
    return str(sorted((name, digest) for name, digest in found.tensors.items() if not name.startswith("rng/")))


def _play(run: RunningLane, line: Sequence[Any]) -> Any:
    word, *arguments = line
    match word:
        case "epoch":
            number = len(run.all_of(EpochDone)) + 1
            run.send(RunEpoch(number))
            wait_for(lambda: len(run.all_of(EpochDone)) == number or ended(run), 60)
            assert not ended(run), run.events[-1:]
        case "seeds":
            stage = SeedLifecycleStage.Value(arguments[0])
            return str(run.done(run.send(ReconcileSeeds(seed(stage, steps=20)))).failure)
        case "capture":
            done = run.done(run.send(CaptureImage(beside=True)))
            assert isinstance(done.result, ImageCaptured)
            run.image = run.lane.images.take(done.result.image_id)  # type: ignore[attr-defined]
            return run.image.image.seal().total  # type: ignore[attr-defined]
        case "reload":
            image_id = run.lane.images.put(run.image.image)  # type: ignore[attr-defined]
            return _restored(run, Restore(0, time.monotonic() + arguments[0], image_id))
        case "restore":
            return _restored(run, Restore(arguments[0], time.monotonic() + 30))
        case "hold":
            run.send(Hold(1))
            time.sleep(arguments[0])
        case "release":
            run.send(Release())
        case "begin":
            run.send(RunEpoch(len(run.all_of(EpochDone)) + 1))
            time.sleep(arguments[0])
        case _:
            raise ValueError(word)
    return None


def ended(run: RunningLane) -> bool:
    """Whether the lane has ended, which the script does not ask for."""
    return bool(run.lane.peer_lost or run.all_of(LaneEnded))


def _restored(run: RunningLane, command: Restore) -> list[object]:
    done = run.done(run.send(command), timeout_s=60)
    if not isinstance(done.result, Restored):
        return [str(done.failure)]
    return [done.result.position.global_step, done.result.state_digest == done.result.expected_digest]
