from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.jobs import ConflictingTasksJob
from support.lane_driver import new_module, proceed
from tolaria.errors import LossShapeError
from tolaria.jobs import HOST, Batch
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule


def gradient_module(job: str, accumulate: int = 1, rate: float = 0.003, **gradients: object) -> TrainModule:
    """A module in its first epoch, with these settings of gradients."""
    return new_module(job, sections={"gradients": gradients}, accumulate=accumulate, options={"rate": rate})


def reconcile(module: TrainModule, *desired: SeedState) -> None:
    """Reconciles at a step boundary, without refusals."""
    assert module.seeds.reconcile(desired, module.global_step).refusals == ()
    module.refresh()


def gradient(module: TrainModule) -> torch.Tensor:
    """The gradient of the last step."""
    return torch.cat([p.grad.flatten() for p in module.parameters if p.grad is not None])


def tug_of_war(mode: str, rate: float) -> tuple[float, list[float]]:
    """Two tasks over two shared weights for 320 steps: the highest conflict ratio, and the tasks' last losses."""
    module = gradient_module("ConflictingTasksJob", rate=rate, mode=mode)
    conflicts = 0.0
    for _ in range(40):
        module.begin_epoch()
        while train_step(module, proceed) is not None:
            pass
        module.progress = module.progress.ended()
        if (metrics := module.merger.finish_epoch()) is not None:
            conflicts = max(conflicts, metrics.conflict_ratio)
    return conflicts, [task.item() for task in ConflictingTasksJob.tasks(module.model)]


def test_projection_helps_conflicting_tasks() -> None:
    """Conflicts are measured, and with PCGrad both tasks end below 0.8 times the loss of summed gradients."""
    _, summed = tug_of_war("sum", 0.003)
    # The merge is a weighted mean of three rows (the host's is zero), a third of their sum: the rate makes up for it.
    conflicts, projected = tug_of_war("seed", 0.009)
    assert conflicts > 0
    assert all(ours < 0.8 * theirs for ours, theirs in zip(projected, summed, strict=True))


def test_one_loss_is_plain_backpropagation() -> None:
    """With the host alone the gradient is that of `backward`, and no rows are made."""
    module, plain = gradient_module("TinyJob"), gradient_module("TinyJob")
    train_step(module, proceed)
    batch = plain.cursor.next_batch()
    assert batch is not None
    plain.model.train()
    plain.job.losses(plain.model, batch)["host"].backward()  # type: ignore[index]
    assert torch.equal(gradient(module), gradient(plain))
    assert module.merger.finish_epoch() is None


@pytest.mark.parametrize(("mode", "merges"), [("seed", False), ("microbatch", True), ("sum", False)])
def test_the_mode_decides_whether_microbatches_are_merged(mode: str, merges: bool) -> None:
    """PCGrad across microbatches needs their rows; the other modes have one source and add up."""
    module = gradient_module("TinyJob", accumulate=4, mode=mode)
    step = train_step(module, proceed)
    assert step is not None
    assert not step.skipped
    assert (module.merger.finish_epoch() is not None) == merges


def test_per_sample_losses_are_split_among_host_and_seeds() -> None:
    """Half of the samples are the blending seed's, which gets a row and a share of the teacher's gradient."""
    module = gradient_module("SeedIdsJob", attribution="dataloader")
    alpha = AlphaSchedule(start=0.5, end=0.5, begin_step=0, duration_steps=1)
    reconcile(
        module,
        SeedState(seed_id="a", stage=SEED_STAGE_BLENDING, blueprint_id="residual_mlp", slot="middle", alpha=alpha),
    )
    for _ in range(5):
        step = train_step(module, proceed)
        assert step is not None
        assert not step.skipped
        module.seeds.advance(module.global_step)
    metrics = module.merger.finish_epoch()
    assert metrics is not None
    (seed,) = metrics.seeds
    assert seed.seed_id == "a"
    assert seed.mask_fraction == 1.0
    assert 0 < seed.share < 1
    assert seed.params == sum(p.numel() for _, p in module.seeds.topology.training_parameters("a"))


def test_samples_of_unknown_seeds_train_the_host() -> None:
    """Before the seed is grafted its samples train the host, by plain backpropagation."""
    module = gradient_module("SeedIdsJob")
    step = train_step(module, proceed)
    assert step is not None
    assert not step.skipped
    assert module.merger.finish_epoch() is None


def test_a_merged_step_repeats_bit_by_bit() -> None:
    """The order of projections depends on run seed and step, and not on the global generator."""

    def after_some() -> torch.Tensor:
        module = gradient_module("ConflictingTasksJob")
        for _ in range(6):
            torch.rand(3)
            train_step(module, proceed)
        return torch.cat([p.detach().flatten() for p in module.parameters])

    assert torch.equal(after_some(), after_some())


class ChangingSourcesJob(ConflictingTasksJob):
    """Names another source in every second microbatch."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        self.seen += 1
        along, across = self.tasks(model)
        return {HOST: along, ("aux" if self.seen % 2 else "bux"): across}


@pytest.mark.parametrize("mode", ["seed", "sum"])
def test_sources_must_not_change_within_a_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is dropped silently: the error names both sets of sources."""
    monkeypatch.setattr("support.jobs.ConflictingTasksJob", ChangingSourcesJob)
    module = gradient_module("ConflictingTasksJob", accumulate=2, mode=mode)
    with pytest.raises(LossShapeError, match=r"bux.*began with|aux.*began with"):
        train_step(module, proceed)


@pytest.mark.parametrize("attribution", ["off", "dataloader"])
def test_samples_of_an_isolated_seed_do_not_affect_the_host(attribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is all a training seed's gives gradients to its own parameters and none to the host's."""
    monkeypatch.setattr("support.jobs._WithSeedIds.owner", staticmethod(lambda _place: "a"))
    module = gradient_module("SeedIdsJob", attribution=attribution)
    reconcile(module, SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, blueprint_id="residual_mlp", slot="middle"))
    host = [p.detach().clone() for n, p in module.model.named_parameters() if ".seeds." not in n]
    step = train_step(module, proceed)
    assert step is not None
    after = [p for n, p in module.model.named_parameters() if ".seeds." not in n]
    assert all(torch.equal(a, b) for a, b in zip(host, after, strict=True))
    assert any(p.grad is not None and p.grad.any() for _, p in module.seeds.topology.training_parameters("a"))
