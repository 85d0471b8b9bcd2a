from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from leyline.v1.enums_pb2 import (
    SEED_STAGE_BLENDING,
    SEED_STAGE_CULLED,
    SEED_STAGE_FOSSILIZED,
    SEED_STAGE_GERMINATED,
    SEED_STAGE_PROBATIONARY,
    SEED_STAGE_SHADOWING,
    SEED_STAGE_TRAINING,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.jobs import ConflictingTasksJob, SeedIdsJob, SlotJob, TinyJob
from support.lane_driver import new_module, proceed
from tolaria.errors import LossShapeError, UnmergeableParameterError
from tolaria.gradients import row_dtype
from tolaria.jobs import HOST, Batch, Evaluation, JobContext
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
    conflicts, projected = tug_of_war("seed", 0.003)
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


class EqualSamplesJob(SeedIdsJob):
    """All samples are equal, so that the gradients of host and seed do not conflict."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.x = self.x[:1].repeat(len(self.x), 1)
        self.y = self.y[:1].repeat(len(self.y), 1)


def of_host(module: TrainModule) -> list[torch.Tensor]:
    """The parameters of the host."""
    return [parameter for name, parameter in module.model.named_parameters() if ".seeds." not in name]


def seed_a(stage: SeedLifecycleStage.ValueType, alpha: float = 1.0) -> SeedState:
    """Seed `a` in this stage, with a constant alpha. Its branch adds zero until it is trained."""
    schedule = AlphaSchedule(start=alpha, end=alpha, begin_step=0, duration_steps=1)
    return SeedState(
        seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="middle", alpha=schedule, attribution=0.7
    )


LIVES = {
    "germinated": [seed_a(SEED_STAGE_GERMINATED)],
    "training": [seed_a(SEED_STAGE_TRAINING)],
    "blending at 0": [seed_a(SEED_STAGE_BLENDING, 0.0)],
    "blending at 0.3": [seed_a(SEED_STAGE_BLENDING, 0.3)],
    "shadowing": [seed_a(SEED_STAGE_SHADOWING)],
    "probationary": [seed_a(SEED_STAGE_PROBATIONARY)],
    "fossilized": [seed_a(SEED_STAGE_PROBATIONARY), seed_a(SEED_STAGE_FOSSILIZED)],
    "culled at 0": [seed_a(SEED_STAGE_TRAINING), seed_a(SEED_STAGE_CULLED)],
    "culled at 0.5": [seed_a(SEED_STAGE_BLENDING, 0.5), seed_a(SEED_STAGE_CULLED)],
}


def updates(accumulate: int, attribution: str, isolation: bool, life: Sequence[SeedState]) -> list[torch.Tensor]:
    """The host's first update beside a seed that has gone through these states."""
    sections = {"gradients": {"attribution": attribution}, "seeds": {"isolation": isolation}}
    module = new_module("SeedIdsJob", sections=sections, accumulate=accumulate)
    for state in life:
        reconcile(module, state)
    before = [parameter.detach().clone() for parameter in of_host(module)]
    step = train_step(module, proceed)
    assert step is not None
    assert not step.skipped
    return [after.detach() - was for after, was in zip(of_host(module), before, strict=True)]


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_stage_of_a_seed_changes_the_update_of_the_host(
    life: list[SeedState], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples are the seed's; at every stage the host is updated by the gradient of all of them."""
    monkeypatch.setattr("support.jobs.SeedIdsJob", EqualSamplesJob)
    plain = updates(accumulate, "off", True, [])
    assert any(update.any() for update in plain)
    for attribution, isolation in [("off", True), ("off", False), ("dataloader", True), ("kasmina", False)]:
        grown = updates(accumulate, attribution, isolation, life)
        torch.testing.assert_close(grown, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("attribution", ["off", "dataloader"])
def test_a_batch_of_an_isolated_seed_trains_the_host_as_before(
    attribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that are all a training seed's train its own parameters, and the host as if there were no seed."""
    monkeypatch.setattr("support.jobs._WithSeedIds.owner", staticmethod(lambda _place: "a"))
    module, plain = (gradient_module("SeedIdsJob", attribution=attribution) for _ in range(2))
    reconcile(module, seed_a(SEED_STAGE_TRAINING))
    for each in (module, plain):
        assert train_step(each, proceed) is not None
    torch.testing.assert_close(of_host(module), of_host(plain))
    assert any(p.grad is not None and p.grad.any() for _, p in module.seeds.topology.training_parameters("a"))


class LossBySeedJob(SlotJob):
    """Gives seed `a`, while it is in the model, twice the host's loss."""

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        loss = super().losses(model, batch)[HOST]
        grafted = any(".seeds.a." in name for name, _ in model.named_parameters())
        return {HOST: loss, "a": 2 * loss} if grafted else {HOST: loss}


def gradients_of_seed_losses(
    state: SeedState | None,
    monkeypatch: pytest.MonkeyPatch,
    *,
    isolation: bool = True,
    accumulate: int = 1,
    mode: str = "seed",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first gradient of the host and of the last layer of seed `a` in that state."""
    monkeypatch.setattr("support.jobs.SlotJob", LossBySeedJob)
    sections = {"gradients": {"mode": mode}, "seeds": {"isolation": isolation}}
    module = new_module("SlotJob", sections=sections, accumulate=accumulate)
    if state is not None:
        reconcile(module, state)
    assert train_step(module, proceed) is not None
    own = [p.grad for name, p in module.model.named_parameters() if ".seeds." in name and p.grad is not None]
    host = torch.cat([p.grad.flatten() for p in of_host(module) if p.grad is not None])
    return host, own[-1] if own else torch.zeros(0)


@pytest.mark.parametrize(
    ("state", "isolation", "weight"),
    [
        (seed_a(SEED_STAGE_GERMINATED), True, 0.0),
        (seed_a(SEED_STAGE_GERMINATED), False, 0.01),
        (seed_a(SEED_STAGE_TRAINING), True, 0.0),
        (seed_a(SEED_STAGE_TRAINING), False, 0.1),
        (seed_a(SEED_STAGE_BLENDING, 0.25), True, 0.25),
        (seed_a(SEED_STAGE_SHADOWING), True, 0.5),
        (seed_a(SEED_STAGE_PROBATIONARY), True, 1.0),
    ],
)
def test_losses_by_source_add_up_by_weight(
    state: SeedState, isolation: bool, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's loss always counts fully, a seed's with the weight of its stage."""
    plain, _ = gradients_of_seed_losses(None, monkeypatch)
    merged, _ = gradients_of_seed_losses(state, monkeypatch, isolation=isolation)
    torch.testing.assert_close(merged, (1 + 2 * weight) * plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "accumulate"), [("seed", 1), ("seed", 2), ("sum", 1), ("microbatch", 1), ("microbatch", 2)]
)
def test_an_isolated_loss_trains_its_seed_alone(mode: str, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every mode the seed's loss reaches its own parameters, unweighted, and not the host."""
    plain, _ = gradients_of_seed_losses(None, monkeypatch, mode=mode, accumulate=accumulate)
    host, own = gradients_of_seed_losses(seed_a(SEED_STAGE_TRAINING), monkeypatch, mode=mode, accumulate=accumulate)
    torch.testing.assert_close(host, plain, rtol=1e-4, atol=1e-7)
    _, full = gradients_of_seed_losses(seed_a(SEED_STAGE_PROBATIONARY), monkeypatch, accumulate=accumulate)
    assert own.any()
    torch.testing.assert_close(own, full, rtol=1e-4, atol=1e-7)


class TasksJob(TinyJob):
    """Two tasks over a sparse embedding, a transposed weight and a layer in bfloat16; some can be frozen."""

    def build_model(self) -> nn.Module:
        model = nn.ModuleDict({"table": nn.Embedding(8, 4, sparse=True), "low": nn.Linear(4, 4)})
        model["low"].to(torch.bfloat16)
        model["turned"] = nn.Linear(4, 4, bias=False)
        model["turned"].weight = nn.Parameter(torch.randn(4, 4).t())
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        assert isinstance(model, nn.ModuleDict)
        rows = model["table"](torch.arange(batch.samples) % 4)
        turned = model["turned"](rows)
        half = model["low"](turned.bfloat16())
        return {HOST: turned.square().mean(), "other": half.float().square().mean()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        return Evaluation(float(self.losses(model, batch)[HOST]), 0, 1)


def merged_tasks(monkeypatch: pytest.MonkeyPatch, frozen: str = "") -> tuple[TrainModule, dict[str, torch.Tensor]]:
    """A module of the tasks with its first gradient, merged directly, and the gradients of a plain backward pass."""
    monkeypatch.setattr("support.jobs.TinyJob", TasksJob)
    module = gradient_module("TinyJob")
    named = dict(module.model.named_parameters())
    batch = module.cursor.next_batch()
    assert batch is not None
    for name, parameter in named.items():
        parameter.requires_grad_(name != frozen)
    losses = module.job.losses(module.model, batch)
    assert isinstance(losses, Mapping)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    plain = {name: p.grad.to_dense().clone() for name, p in named.items() if p.grad is not None}
    merge(module, batch)
    return module, plain


def merge(module: TrainModule, batch: Batch) -> None:
    """Merges the gradients of one batch."""
    module.model.zero_grad()
    module.merger.begin(0, 1)
    losses = module.job.losses(module.model, batch)
    assert isinstance(losses, Mapping)
    module.merger.prepare(losses, batch)
    module.merger.add(losses, batch, share=1.0, scaler=None)
    module.merger.finish()


def test_sparse_mixed_and_transposed_parameters_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient has the dtype and memory layout of its parameter, and the value of the sum of the losses."""
    module, plain = merged_tasks(monkeypatch)
    for name, parameter in module.model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.dtype, parameter.grad.stride()) == (parameter.dtype, parameter.stride())
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-2, atol=1e-6)


def test_parameters_can_be_frozen_and_unfrozen_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen parameter gets no gradient, and gets one again once it is trained again."""
    module, _ = merged_tasks(monkeypatch, "turned.weight")
    named = dict(module.model.named_parameters())
    assert named["turned.weight"].grad is None
    named["turned.weight"].requires_grad_(True)
    batch = module.cursor.next_batch()
    assert batch is not None
    merge(module, batch)
    assert named["turned.weight"].grad is not None


def test_a_parameter_that_cannot_be_merged_is_named() -> None:
    """The error names the parameter, and the setting that does without merging."""
    given = [("a", torch.zeros(1)), ("spectrum.weight", torch.zeros(2, dtype=torch.complex64))]
    with pytest.raises(UnmergeableParameterError, match=r"'spectrum\.weight', which is torch\.complex64.*mode = sum"):
        row_dtype(given)
    assert row_dtype([("a", torch.zeros(1)), ("b", torch.zeros(1).half())]) == torch.float32
