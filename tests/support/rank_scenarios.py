"""What `run_on_ranks` runs: a training that the leader's script drives."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SeedLifecycleStage
from support.lane_driver import NoHeartbeat, RunningLane, running, seed
from support.waiting import wait_for
from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.tensor_file import file_pieces
from tolaria.config import Settings
from tolaria.errors import BlueprintError
from tolaria.images import StateImage
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.evaluation import evaluate
from tolaria.lane.group_state import GroupRestore
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
    SeedsChanged,
    StepDone,
)
from tolaria.lane.step import train_step
from tolaria.ranks.group import Group
from tolaria.seeds import Blueprints
from tolaria.seeds.slots import SlotSpec
from tolaria.shards import whole_value
from tolaria.state.encoding import packed_bytes, specs_of
from tolaria.state.shared_memory import SharedMemory
from tolaria.values.training import Position


def train(
    group: Group | None,
    *,
    job: str,
    script: Sequence[Sequence[Any]],
    sections: Mapping[str, Any] | None = None,
    shows: bool = True,
    **training: Any,
) -> dict[str, Any]:
    """Trains by a script of the leader's; returns its losses, norms, evaluations and answers, and the final digests.

    The leader shows its memory to the others, as on one machine, unless `shows` is False.

    Lines of the script: epoch · seeds STAGE · restore STEP · capture · reload SECONDS (the captured image, before a
    deadline) · hold SECONDS · release · begin SECONDS (an epoch, without waiting for its end).
    """
    torch.set_num_threads(1)
    given = {"job": f"support.rank_jobs:{job}", "device": "cpu", "threads": 1, "deterministic": True, **training}
    settings = Settings.model_validate({"training": given, **(sections or {})})
    sharded = settings.lane.parallel == "fsdp" and group is not None
    memory = SharedMemory(shows=True) if group is not None and group.leads and shows else None
    if group is not None:
        connect_segments(group, shows=shows)
    built = build_on_all_ranks(group, lambda: build(settings, memory, group), sharded=sharded)
    if group is not None and not group.leads:
        built.snapshots.takes_snapshots = False
        lane = built.lane(NoHeartbeat(), Path("unused"))
        lane.run(lane.take_events)
        if lane.peer_lost or lane.failed:
            return {"peer_lost": lane.peer_lost, "failed": lane.failed}
        return {"digests": group.all_gather_text(_digest(built))}
    with running(built, Path(tempfile.mkdtemp())) as run:
        answers = [_play(run, line) for line in script]
    if run.lane.peer_lost:
        return {"peer_lost": run.lane.peer_lost}
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
        "averages": [done.evaluation.figures().get("ema/loss") for done in run.all_of(EpochDone)],
        "figures": [done.evaluation.figures() for done in run.all_of(EpochDone)],
        "answers": answers,
        "waits": [
            [load.input_wait_s, load.rank_wait_s] for done in run.all_of(EpochDone)[-1:] for load in done.rank_loads
        ],
        "digests": [_digest(built)] if group is None else group.all_gather_text(_digest(built)),
        "peer_lost": run.lane.peer_lost,
        "culled": [list(event.refusals) for event in run.all_of(SeedsChanged) if event.refusals],
    }


def connect_segments(group: Group, *, shows: bool) -> None:
    """Has the ranks map the leader's memory, or not; whatever a scenario before has done."""
    group.segments = None
    if shows:
        group.connect_segments()


def train_with_seed(group: Group | None, *, where: str, on: int, **options: Any) -> dict[str, Any]:
    """Does as `train`; the only blueprint makes branches that raise after a while.

    `where` is forward, backward, eval (only there), build (from the first one) or out (another shape); `on` is the
    only rank, -1: all of them.
    """
    raises = on < 0 or (group is not None and group.rank == on)

    def build_branch(_self: Blueprints, _name: str, slot: SlotSpec, init_seed: int) -> nn.Module:
        if raises and where == "build":
            raise BlueprintError("no file for it")
        return Breaking(slot.features, where if raises else "")

    with (
        patch.object(Blueprints, "build", build_branch),
        patch.object(Blueprints, "check", lambda *_: None),
    ):
        return train(group, **options)


class Breaking(nn.Module):
    """A branch that raises once it has been called often enough."""

    def __init__(self, features: int, where: str) -> None:
        super().__init__()
        self.scale, self.where, self.calls = nn.Parameter(torch.ones(features)), where, 0

    def forward(self, h: Tensor) -> Tensor:
        """Multiplies by a parameter."""
        self.calls += 1
        if self.calls > 5 and self.where == ("forward" if self.training else "eval"):
            raise ValueError("no such shape")
        out: Tensor = h * self.scale
        if self.calls > 5 and self.where == "backward" and out.requires_grad:
            out.register_hook(_raise)  # type: ignore[no-untyped-call]
        return out[..., 1:] if self.calls > 5 and self.where == "out" else out


def _raise(_gradient: Tensor) -> Tensor:
    raise ValueError("no such gradient")


def save(group: Group | None, *, directory: str, job: str = "UnevenJob") -> str:
    """Trains sharded, with a seed, and saves the state as a checkpoint's files are; returns its digest."""
    built = _sharded(group, job)
    module, snapshots = built.module, built.snapshots
    _train(built, 5)
    module.seeds.reconcile(seed(SeedLifecycleStage.Value("SEED_STAGE_TRAINING"), steps=20), module.global_step)
    module.refresh()
    _train(built, 9)
    if group is not None and not group.leads:
        snapshots.take_part()
        return ""
    with snapshots.capture_image(beside=True) as image:
        Path(directory, "model.safetensors").write_bytes(b"".join(file_pieces(image.specs, image.buffers)))
        Path(directory, "values.json").write_bytes(image.values)
        Path(directory, "position.json").write_text(json.dumps(asdict(image.position)))
        return image.seal().total


def write_checkpoint(group: Group | None, *, directory: str) -> list[float]:
    """Trains sharded, with a seed that is blended half, and writes a checkpoint; returns the sums of an evaluation."""
    built = _sharded(group, "UnevenJob")
    module, snapshots = built.module, built.snapshots
    model = built.ready.model
    _train(built, 5)
    module.seeds.reconcile(seed(begin=0, steps=20), module.global_step)
    module.refresh()
    _train(built, 10)
    module.seeds.advance(module.global_step)
    found = evaluate(module)
    assert found is not None
    if group is not None and not group.leads:
        snapshots.take_part()
    else:
        storage = open_storage(Path(directory), run_id="run", retention=Retention(1, "highest"))
        with storage.journal, snapshots.capture_image(beside=True) as image:
            storage.checkpoints.write(image, metric=0.5, provenance=Provenance(model=model))
    return [found.loss_sum, float(found.correct or 0), float(found.samples)]


def load(group: Group | None, *, directory: str, job: str = "UnevenJob") -> dict[str, Any]:
    """Restores what `save` saved and trains on; returns the digests of each rank's state, and the losses."""
    built = _sharded(group, job)
    snapshots = built.snapshots
    tensors = dict(sorted(load_file(Path(directory, "model.safetensors")).items()))
    buffers = {name: packed_bytes(tensor) for name, tensor in tensors.items()}
    position = Position(**json.loads(Path(directory, "position.json").read_text()))
    image = StateImage(position, specs_of(tensors), buffers, Path(directory, "values.json").read_bytes())
    if group is None:
        snapshots.restore_image(image)
    else:
        GroupRestore(group, snapshots).start(lambda: snapshots.restore_image(image))
    sealed, share = image.seal(), snapshots.state.copy().size_bytes / image.size_bytes
    expected = str(sorted((name, digest) for name, digest in sealed.tensors.items() if not name.startswith("rng/")))
    found = {"digest": _digest(built), "expected": expected, "saved": sealed.total, "bytes": share}
    return {**found, "losses": [step.loss for step in _train(built, 14)]}


def scales(group: Group | None, *, job: str) -> dict[str, float]:
    """Returns the standard deviation of each parameter of a sharded model."""
    model = _sharded(group, job).module.model
    return {name: float(whole_value(p).std()) for name, p in model.named_parameters() if p.dim() > 1}


def _sharded(group: Group | None, job: str) -> BuiltLane:
    torch.set_num_threads(1)
    given = {"job": f"support.rank_jobs:{job}", "device": "cpu", "threads": 1}
    settings = Settings.model_validate({"training": given, "lane": {"mode": "torchrun", "parallel": "fsdp"}})
    built = build_on_all_ranks(group, lambda: build(settings, group=group), sharded=group is not None)
    built.snapshots.takes_snapshots = group is None or group.leads
    return built


def _train(built: BuiltLane, step: int) -> list[StepDone]:
    done = list[StepDone]()
    while built.module.global_step < step:
        built.module.begin_epoch()
        found = train_step(built.module, lambda: True)
        if found is None:
            built.module.progress = built.module.progress.ended()
        else:
            done.append(found)
    return done


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
            wait_for(lambda: len(run.all_of(EpochDone)) == number or ended(run))
            assert not ended(run), run.events[-1:]
        case "seeds":
            stage = SeedLifecycleStage.Value(arguments[0])
            done = run.done(run.send(ReconcileSeeds(seed(stage, steps=20))))
            changed = done.result
            assert isinstance(changed, SeedsChanged)
            return f"{done.failure}{changed.rebuild_error}{changed.refusals or ''}"
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
        case "ended":
            wait_for(lambda: ended(run))
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
    done = run.done(run.send(command), timeout_s=180)
    if not isinstance(done.result, Restored):
        return [str(done.failure)]
    return [done.result.position.global_step, done.result.state_digest == done.result.expected_digest]
