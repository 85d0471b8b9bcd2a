"""Drives a rig step by step as the lane does, on the test's own thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, SEED_STAGE_BLENDING, SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.config import RollbackSettings, Settings, TrainingSettings
from tolaria.images.image import StateImage
from tolaria.rollback.orders import RestoreOrder
from tolaria.training.fences import FenceCommand, FenceReport, Restore, carry_out
from tolaria.training.recovery.keeper import Restored, SnapshotKeeper
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import train_step


@dataclass(slots=True)
class Driven:
    """A rig with its keeper; `losses` by global step, the last time that it was done."""

    rig: Rig
    keeper: SnapshotKeeper
    losses: dict[int, float] = field(default_factory=dict)

    def to(self, global_step: int, commands: Mapping[int, FenceCommand] | None = None) -> None:
        """Train until so many updates are done; `commands` are carried out at the fence after theirs."""
        rig, commands = self.rig, commands or {}
        while rig.global_step < global_step:
            rig.begin_epoch()
            if (command := commands.get(rig.global_step)) is not None:
                assert self.do(command).error is None
            report = train_step(rig, lambda: True)
            if report is None:
                rig.epoch.over = True
                continue
            self.losses[report.global_step] = report.loss
            if rig.growth.advance(rig.global_step) is not None:
                rig.grew()

    def do(self, command: FenceCommand) -> FenceReport:
        """Carry a command out, now."""
        return carry_out(self.rig, self.keeper, 1, command)

    def go_back(self, step: int, image: StateImage | None = None) -> Restored:
        """To the snapshot of that step, or to an image."""
        report = self.do(Restore(order(step), image))
        if report.error is not None:
            raise report.error
        assert isinstance(report.result, Restored)
        return report.result

    @property
    def digest(self) -> str:
        """Of the live state."""
        return self.keeper._state.fingerprint().total


def order(step: int) -> RestoreOrder:
    """Without a deadline."""
    return RestoreOrder("r", ROLLBACK_TIER_FAST, step, 1e12, lambda: False, lambda: False)


def driven(
    job: str = "RandomisedJob", *, rollback: RollbackSettings | None = None, accumulate: int = 1, **options: str
) -> Driven:
    """A new one; equal arguments make equal runs."""
    torch.set_num_threads(1)
    settings = Settings(
        training=TrainingSettings(
            job=f"support.jobs:{job}",
            device="cpu",
            threads=1,
            deterministic=True,
            accumulate=accumulate,
            options={"optimizer": "SGD", **options},
        )
    )
    rig = build_rig(settings)
    return Driven(rig, SnapshotKeeper(rig, rollback or RollbackSettings()))


def seed(
    stage: SeedLifecycleStage.ValueType = SEED_STAGE_BLENDING, *, begin: int = 0, steps: int = 8
) -> tuple[SeedState, ...]:
    """One residual MLP in this stage."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=begin, duration_steps=steps)
    return (SeedState(seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="middle", alpha=alpha),)
