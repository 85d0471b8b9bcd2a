from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from pydantic import JsonValue
from torch import nn

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.jobs import TugOfWarJob
from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.config import GradientsSettings, RollbackSettings, Settings, TrainingSettings
from tolaria.errors import LossShapeError
from tolaria.jobs import HOST, Batch
from tolaria.training.fences import Reconcile, carry_out
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import train_step


def rig(job: str, accumulate: int = 1, options: Mapping[str, JsonValue] | None = None, **gradients: object) -> Rig:
    """A rig in its first epoch."""
    made = build_rig(
        Settings(
            training=TrainingSettings(
                job=f"support.jobs:{job}", device="cpu", accumulate=accumulate, options=dict(options or {})
            ),
            gradients=GradientsSettings(**gradients),  # type: ignore[arg-type]
        )
    )
    made.cursor.begin_epoch(1)
    return made


class Dashboard(FakePeers):
    """Peers that look at /metrics at every boundary, as a dashboard would."""

    def __init__(self) -> None:
        super().__init__()
        self.run: RunUnderTest | None = None
        self.conflicts: list[float] = []

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """Note what the metric says."""
        assert self.run is not None
        self.conflicts.append(self.run.metrics.registry.get_sample_value("tolaria.grad_agg.conflicts") or 0.0)
        return await super().evaluate_epoch(state)


async def tug_of_war(mode: str, rate: float) -> tuple[RunUnderTest, Dashboard, list[float]]:
    """Two tasks over two shared weights for 320 updates; the run, what its peers saw, and the tasks' last losses."""
    peers = Dashboard()
    run = new_run(peers, job="TugOfWarJob", epochs=40, sections={"gradients": {"mode": mode}}, options={"rate": rate})
    peers.run = run
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    return run, peers, [task.item() for task in TugOfWarJob.tasks(run.rig.model)]


@pytest.mark.anyio
async def test_tasks_that_conflict_are_seen_and_both_do_better_than_by_the_sum() -> None:
    """Conflicts show in /metrics and in the state for Tamiyo; with PCGrad both tasks end below 0.8 x the sum's."""
    _, _, summed = await tug_of_war("sum", 0.003)
    # The merge is a weighted mean of three rows (the host's is zero), a third of their sum: the rate makes up for it.
    run, peers, projected = await tug_of_war("seed", 0.009)
    assert max(peers.conflicts) > 0
    assert max(state.training_metrics["grad_conflict_rate"] for state in peers.states) > 0
    assert run.metrics.registry.get_sample_value("tolaria.grad_agg.microbatches_total") == 320
    assert all(ours < 0.8 * theirs for ours, theirs in zip(projected, summed, strict=True))


def gradient(made: Rig) -> torch.Tensor:
    """What a step has put into `.grad`."""
    return torch.cat([p.grad.flatten() for p in made.parameters if p.grad is not None])


def test_one_loss_is_plain_backpropagation() -> None:
    """With the host alone a step's gradient is that of `backward`, and no rows are made."""
    made, plain = rig("TinyJob"), rig("TinyJob")
    train_step(made, lambda: True)
    batch = plain.cursor.next_batch()
    assert batch is not None
    plain.model.train()
    plain.job.losses(plain.model, batch)["host"].backward()  # type: ignore[index]
    assert torch.equal(gradient(made), gradient(plain))
    assert made.merger.finish_epoch() is None


@pytest.mark.parametrize(("mode", "merges"), [("seed", False), ("microbatch", True), ("sum", False)])
def test_microbatches_are_merged_where_the_mode_says_so(mode: str, merges: bool) -> None:
    """PCGrad across microbatches needs their rows; the other modes have one source and add up."""
    made = rig("TinyJob", accumulate=4, mode=mode)
    report = train_step(made, lambda: True)
    assert report is not None
    assert not report.void
    gathered = made.merger.finish_epoch()
    assert (gathered is not None) == merges


def test_losses_by_sample_are_split_among_host_and_seeds() -> None:
    """The dataloader's triplet: half of the samples are the blending seed's, which gets a row and a share."""
    made = rig("SeedIdsJob", attribution="dataloader")
    alpha = AlphaSchedule(start=0.5, end=0.5, begin_step=0, duration_steps=1)
    seed = SeedState(seed_id="a", stage=SEED_STAGE_BLENDING, blueprint_id="residual_mlp", slot="middle", alpha=alpha)
    assert carry_out(made, SnapshotKeeper(made, RollbackSettings()), 1, Reconcile((seed,))).error is None
    for _ in range(5):
        report = train_step(made, lambda: True)
        assert report is not None
        assert not report.void
        made.growth.advance(made.global_step)
    gathered = made.merger.finish_epoch()
    assert gathered is not None
    (told,) = gathered.seeds
    assert told.seed_id == "a"
    assert told.mask_fraction == 1.0
    assert 0 < told.share < 1
    assert told.params == sum(p.numel() for _, p in made.growth.topology.training_parameters("a"))


def test_samples_of_unknown_seeds_are_the_hosts() -> None:
    """Before the seed is there its samples train the host, by plain backpropagation."""
    made = rig("SeedIdsJob")
    report = train_step(made, lambda: True)
    assert report is not None
    assert not report.void
    assert made.merger.finish_epoch() is None


def test_a_merged_step_repeats_bit_by_bit() -> None:
    """The same run and step give the same order of projections, whatever the global RNG does."""

    def after_some() -> torch.Tensor:
        made = rig("TugOfWarJob", options={"rate": 0.003})
        for _ in range(6):
            torch.rand(3)
            train_step(made, lambda: True)
        return torch.cat([p.detach().flatten() for p in made.parameters])

    assert torch.equal(after_some(), after_some())


class Drifting(TugOfWarJob):
    """Names another source in every second microbatch."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        self.seen += 1
        along, across = self.tasks(model)
        return {HOST: along, ("aux" if self.seen % 2 else "bux"): across}


@pytest.mark.parametrize("mode", ["seed", "sum"])
def test_sources_that_change_within_an_update_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is dropped in silence: the job is told which sources it named, and which before."""
    monkeypatch.setattr("support.jobs.TugOfWarJob", Drifting)
    made = rig("TugOfWarJob", accumulate=2, mode=mode, options={"rate": 0.1})
    with pytest.raises(LossShapeError, match=r"bux.*began with|aux.*began with"):
        train_step(made, lambda: True)


@pytest.mark.parametrize("attribution", ["off", "dataloader"])
def test_samples_for_an_isolated_seed_leave_the_host_alone(attribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is all a training seed's: its own parameters get a gradient, the host's get none."""
    monkeypatch.setattr("support.jobs._WithSeedIds.owner", staticmethod(lambda _place: "a"))
    made = rig("SeedIdsJob", attribution=attribution)
    seed = SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp", slot="middle")
    assert carry_out(made, SnapshotKeeper(made, RollbackSettings()), 1, Reconcile((seed,))).error is None
    host = [p.detach().clone() for n, p in made.model.named_parameters() if ".seeds." not in n]
    report = train_step(made, lambda: True)
    assert report is not None
    after = [p for n, p in made.model.named_parameters() if ".seeds." not in n]
    assert all(torch.equal(a, b) for a, b in zip(host, after, strict=True))
    assert any(p.grad is not None and p.grad.any() for _, p in made.growth.topology.training_parameters("a"))
