"""Layers that a job freezes and unfreezes: rollbacks, resumed runs and the first look restore which are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_PROBATIONARY, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.lane_driver import DrivenLane
from support.user_jobs import Line, Unfreezing
from tolaria.config import Settings, TrainingSettings
from tolaria.errors import RestoreAbandonedError
from tolaria.images import StateImage, canonical_json
from tolaria.jobs import Batch, TensorCursor
from tolaria.lane.build import build
from tolaria.lane.messages import BoundaryCommand, ReconcileSeeds

HERE = __name__


class Counted(Unfreezing):
    """Unfreezes its first layer in pass 17 and freezes its last one in pass 21, and keeps the count in its state."""

    built_frozen: ClassVar[bool] = True

    def build_model(self) -> nn.Module:
        model: nn.Sequential = super().build_model()  # type: ignore[no-untyped-call]
        return model if self.built_frozen else model.requires_grad_(requires_grad=True)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.calls == 20:
            model[3].requires_grad_(requires_grad=False)  # type: ignore[index]
        losses: Mapping[str, Tensor] = super().losses(model, batch)  # type: ignore[no-untyped-call]
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Edited(Counted):
    """The same job after its user has deleted the line that freezes the first layer at the start."""

    built_frozen = False


class ByEpoch(Line):
    """Unfreezes its first layer in the third epoch, which has steps 17 to 24, and looks the epoch up in its data."""

    def build_model(self) -> nn.Module:
        model: nn.Sequential = super().build_model()  # type: ignore[no-untyped-call]
        model[0].requires_grad_(requires_grad=False)
        return model

    def training_data(self) -> TensorCursor:
        self.cursor = TensorCursor((self.x, self.y), batch_size=8, seed=self.seed)
        return self.cursor

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if self.cursor.state_dict()["epoch"] == 3:
            model[0].requires_grad_(requires_grad=True)  # type: ignore[index]
        losses: Mapping[str, Tensor] = super().losses(model, batch)  # type: ignore[no-untyped-call]
        return losses


class First(Line):
    """Freezes its first layer and unfreezes its last one in its first pass."""

    def build_model(self) -> nn.Module:
        model: nn.Sequential = super().build_model()  # type: ignore[no-untyped-call]
        model[3].requires_grad_(requires_grad=False)
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if not self.calls:
            model[0].requires_grad_(requires_grad=False)  # type: ignore[index]
            model[3].requires_grad_(requires_grad=True)  # type: ignore[index]
        losses: Mapping[str, Tensor] = super().losses(model, batch)  # type: ignore[no-untyped-call]
        return losses


class Remembering(First):
    """The same job with its count in its state, so that its first pass in the run is the first one again."""

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def lane(job: str, **training: Any) -> DrivenLane:
    """A driven lane of a job of this module."""
    torch.set_num_threads(1)
    settings = TrainingSettings(job=f"{HERE}:{job}", device="cpu", threads=1, deterministic=True, **training)
    return DrivenLane(build(Settings(training=settings)))


def frozen(driven: DrivenLane) -> set[str]:
    """The names of the host's parameters that are not trained."""
    named = driven.module.model.named_parameters()
    return {name for name, parameter in named if not parameter.requires_grad and "seeds" not in name}


def seed_commands() -> dict[int, BoundaryCommand]:
    """A seed that trains, blends, and is part of the host in the end."""
    stages = {8: SEED_STAGE_TRAINING, 14: SEED_STAGE_BLENDING, 26: SEED_STAGE_PROBATIONARY}
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=14, duration_steps=8)
    return {
        step: ReconcileSeeds((SeedState(seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="s", alpha=alpha),))
        for step, stage in stages.items()
    }


def copied(driven: DrivenLane) -> StateImage:
    """The state now, in memory of its own."""
    image = driven.snapshots.state.copy()
    image.seal()
    return image


FIRST, LAST = {"0.weight", "0.bias"}, {"3.weight", "3.bias"}


@pytest.mark.parametrize("job", ["Counted", "ByEpoch"])
@pytest.mark.parametrize("seeds", [False, True])
def test_a_rollback_to_before_a_layer_was_unfrozen_freezes_it_again(job: str, seeds: bool) -> None:
    """The repeated steps, also those around the changes of a seed, are bit-equal to those of a run without rollback."""
    commands = seed_commands() if seeds else {}
    straight, driven = lane(job), lane(job)
    straight.train_to(40, commands)
    driven.train_to(6, commands)
    early = copied(driven)
    driven.train_to(12, commands)
    driven.snapshot()
    driven.train_to(22, commands)
    assert not frozen(driven) & FIRST
    restored = driven.restore(12)
    assert restored.state_digest == restored.expected_digest
    assert frozen(driven) == FIRST
    driven.train_to(30, commands)
    driven.restore(6, early)
    assert frozen(driven) == FIRST
    driven.train_to(40, commands)
    assert driven.losses == straight.losses
    assert driven.digest == straight.digest


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("at", [12, 18, 30])
def test_a_resumed_run_trains_the_layers_that_the_run_trained(at: int, seeds: bool) -> None:
    """Its process has built the model anew, and the job does not unfreeze a second time."""
    commands = seed_commands() if seeds else {}
    straight = lane("Counted")
    straight.train_to(at, commands)
    image, before = copied(straight), frozen(straight)
    later = lane("Counted")
    assert frozen(later) == FIRST
    restored = later.snapshots.restore_image(image, decided=())
    assert restored.state_digest == restored.expected_digest
    assert frozen(later) == before == {12: FIRST, 18: set(), 30: LAST}[at]
    assert {id(p) for p in later.module.parameters} == {
        id(p) for group in later.module.optimizer.param_groups for p in group["params"] if p.requires_grad
    }
    for run in (straight, later):
        run.train_to(40, commands)
    assert later.digest == straight.digest


def test_what_the_job_builds_differently_holds_in_a_resumed_run() -> None:
    """A user stops a run, has another layer trained from the start, and goes on; later restores keep it so."""
    first = lane("Counted")
    first.train_to(12)
    later = lane("Edited")
    restored = later.snapshots.restore_image(copied(first), decided=())
    assert restored.state_digest == restored.expected_digest
    assert not frozen(later)
    first.train_to(22)
    later = lane("Edited")
    restored = later.snapshots.restore_image(copied(first), decided=())
    assert restored.state_digest == restored.expected_digest
    assert frozen(later) == LAST
    later.snapshot()
    digest = later.digest
    later.train_to(26)
    assert later.restore(22).state_digest == digest
    assert frozen(later) == LAST


def test_a_checkpoint_without_the_flags_leaves_them_as_they_are() -> None:
    """As those of earlier versions."""
    driven = lane("Counted")
    driven.train_to(12)
    image = copied(driven)
    values = json.loads(image.values)
    del values["parts"]["requires_grad"]
    old = StateImage(image.position, image.specs, image.buffers, canonical_json(values))
    old.seal()
    driven.train_to(22)
    restored = driven.restore(12, old)
    assert restored.state_digest == restored.expected_digest
    assert frozen(driven) == LAST
    assert driven.module.global_step == 12


def test_an_abandoned_restore_leaves_the_flags_as_they_are() -> None:
    """The parts of the state are put back before tensors change."""
    driven = lane("Counted")
    driven.train_to(12)
    image = copied(driven)
    driven.train_to(22)
    digest = driven.digest
    with pytest.raises(RestoreAbandonedError):
        driven.snapshots.restore_image(image, lambda: True)
    assert driven.digest == digest
    assert frozen(driven) == LAST


def test_a_job_that_counts_passes_itself_is_not_frozen_for_ever() -> None:
    """Its own count does not go back: the layer is trained again from the step on at which the run went back."""
    settings = TrainingSettings(job="support.user_jobs:Unfreezing", device="cpu", threads=1)
    driven = DrivenLane(build(Settings(training=settings)))
    driven.train_to(10)
    driven.snapshot()
    driven.train_to(20)
    driven.restore(10)
    driven.train_to(14)
    driven.restore(10)  # what is due stays due
    driven.train_to(20)
    assert frozen(driven) == FIRST
    held = driven.module.model[0].weight.detach().clone()  # type: ignore[index]
    driven.train_to(21)
    assert not frozen(driven)
    assert not torch.equal(driven.module.model[0].weight, held)  # type: ignore[index]
    assert len(driven.module.parameters) == 4
    driven.restore(10)
    image = copied(driven)
    fresh = DrivenLane(build(Settings(training=settings)))
    fresh.snapshots.restore_image(image, decided=())  # nothing is due in a new process
    assert frozen(fresh) == FIRST


def test_the_first_look_undoes_what_its_pass_freezes_and_says_so() -> None:
    """As it undoes everything else; a job without a state may do this only once."""
    built = build(Settings(training=TrainingSettings(job=f"{HERE}:First", device="cpu", threads=1)))
    driven = DrivenLane(built)
    assert frozen(driven) == LAST
    assert len(driven.module.parameters) == 2
    (note,) = [note for note in built.ready.notes if "freezes or unfreezes" in note]
    assert "'0.weight'" in note


def test_a_job_with_its_count_in_its_state_freezes_in_the_first_pass_of_the_run() -> None:
    """There is nothing to say about it."""
    built = build(Settings(training=TrainingSettings(job=f"{HERE}:Remembering", device="cpu", threads=1)))
    driven = DrivenLane(built)
    assert frozen(driven) == LAST
    assert not built.ready.notes
    driven.train_to(1)
    assert frozen(driven) == FIRST
