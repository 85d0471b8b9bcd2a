"""Checkpoints of models that have been trained with grown seeds, for tests of exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_FOSSILIZED, SEED_STAGE_GERMINATED
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.lane_driver import DrivenLane
from tolaria.checkpoint.directory import SETTINGS
from tolaria.checkpoint.format import Provenance
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import EmaSettings, Settings, TrainingSettings
from tolaria.export.card import ExportCard, Format
from tolaria.export.writing import ExportOrder, export_model
from tolaria.jobs import Batch, TrainingJob
from tolaria.lane.build import build
from tolaria.lane.messages import ReconcileSeeds
from tolaria.lane.model_description import describe
from tolaria.lane.weight_averages import WeightAverages
from tolaria.values.evaluation import Evaluation

Seed = tuple[str, str]
"""A blueprint and a slot."""


@dataclass(frozen=True)
class Trained:
    """A trained model, the job that built it, and the state directory with its checkpoint."""

    model: nn.Module
    job: TrainingJob
    directory: Path
    checkpoint_id: str
    name: str
    averages: WeightAverages | None = None

    def evaluation(self, model: nn.Module | None = None) -> Evaluation:
        """Evaluates the live model, or another one, as the lane does."""
        return evaluate(self.job, self.model if model is None else model)

    def export(
        self, target: Path, form: Format = "safetensors", *, checkpoint: str = "newest", fold: bool = False,
        shard_bytes: int = 10**9, values: Literal["model", "ema"] = "model",
    ) -> ExportCard:  # fmt: skip
        """Exports the checkpoint to `target`."""
        order = ExportOrder(
            self.directory, checkpoint, form, target, fold=fold, job=self.name, shard_bytes=shard_bytes, values=values
        )
        return export_model(order)


def evaluate(job: Any, model: nn.Module) -> Evaluation:
    """Evaluates a model as the lane does."""
    model.eval()
    with torch.no_grad():
        found = [job.evaluate(model, batch) for batch in job.validation_batches()]
    total: Evaluation = found[0]
    for each in found[1:]:
        total += each
    return total


def outputs(job: Any, model: nn.Module) -> torch.Tensor:
    """Returns the model's output for a validation batch."""
    batch: Batch = next(iter(job.validation_batches()))
    with torch.no_grad():
        made: torch.Tensor = model.eval()(*batch.payload[:1])
    return made


def trained(
    directory: Path,
    job: str,
    seeds: Sequence[Seed] = (),
    *,
    growing: Sequence[Seed] = (),
    growing_alpha: float = 1.0,
    described: bool = True,
    ema: float = 0.0,
) -> Trained:
    """Trains a few steps and writes a checkpoint.

    Each of `seeds` blends to alpha 0.5 and becomes part of the host; after them one of `growing` blends at a slot, and
    has an alpha between 0 and `growing_alpha`. Without `described`, the checkpoint is as one of an earlier version.
    """
    torch.set_num_threads(1)
    training = TrainingSettings(job=job, device="cpu", threads=1)
    lane = DrivenLane(build(Settings(training=training, ema=EmaSettings(decay=ema))))
    step = 1
    lane.train_to(step)
    grown: list[SeedState] = []
    for number, (blueprint, slot) in enumerate(seeds):
        alpha = AlphaSchedule(start=0.0, end=0.5, begin_step=step, duration_steps=2)
        state = SeedState(seed_id=f"seed-{number}", blueprint_id=blueprint, slot=slot, alpha=alpha)
        for stage in (SEED_STAGE_GERMINATED, SEED_STAGE_BLENDING, SEED_STAGE_FOSSILIZED):
            state.stage = stage
            changed = lane.execute(ReconcileSeeds((*grown, state))).result
            assert not getattr(changed, "refusals", ()), changed
            step += 3
            lane.train_to(step)
        grown.append(state)
    for number, (blueprint, slot) in enumerate(growing):
        alpha = AlphaSchedule(start=0.0, end=growing_alpha, begin_step=step, duration_steps=10)
        stage = SEED_STAGE_BLENDING
        grown.append(SeedState(seed_id=f"new-{number}", blueprint_id=blueprint, slot=slot, alpha=alpha, stage=stage))
        lane.execute(ReconcileSeeds(tuple(grown)))
        step += 3
        lane.train_to(step)
    storage = open_storage(directory, run_id="run", retention=Retention(3, "highest"))
    with lane.capture() as image:
        model = describe(lane.module.model) if described else ""
        provenance = Provenance(model=model, metrics={"loss": 1.5}, evaluated_step=step)
        row = storage.checkpoints.write(image, metric=0.5, provenance=provenance)
    storage.journal.close()
    return Trained(lane.module.model, lane.module.job, directory, row.checkpoint_id, job, lane.module.averages)


def record_settings(directory: Path, **sections: object) -> None:
    """Writes the record of the run's settings, as the service does."""
    (directory / SETTINGS).write_text(json.dumps({"run_id": "run", "settings": sections}))
