"""What is not finite is left out and changes nothing: whole steps, microbatches of several, isolated seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_TRAINING
from support.jobs import MeanJob
from support.lane_driver import driven, new_module, proceed, seed
from tolaria.jobs import HOST, Batch
from tolaria.lane.buffers import SavedBuffers
from tolaria.lane.messages import ReconcileSeeds, StepDone
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule

HEALTH = {"health": {"skips_max": 3}}


def taken(module: TrainModule) -> StepDone:
    """Takes one step."""
    step = train_step(module, proceed)
    assert step is not None
    return step


def weights(module: TrainModule) -> list[Tensor]:
    """Returns copies of parameters and buffers."""
    return [tensor.detach().clone() for tensor in (*module.model.parameters(), *module.model.buffers())]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all tensors are bit-equal."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Explosive(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def exploding(loss: Tensor) -> Tensor:
    """Returns the loss, with an infinite gradient."""
    made: Tensor = Explosive.apply(loss)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return made


class Spoiling:
    """Wraps the losses of a job: spoils those whose place in the epoch is listed, however often they are computed."""

    def __init__(self, module: TrainModule, *places: int, gradient: bool = False) -> None:
        self.module, self.places, self.gradient, self.calls = module, places, gradient, 0
        self.losses = module.job.losses
        setattr(module.job, "losses", self)  # noqa: B010 - a method of the protocol

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        self.calls += 1
        losses = dict(self.losses(model, batch))  # type: ignore[arg-type] # TinyJob's are a mapping
        good = self.module.last_good
        tried = good is not None and torch.equal(good.payload[0], batch.payload[0])
        if self.module.progress.batches - 1 in self.places and not tried:
            losses[HOST] = exploding(losses[HOST]) if self.gradient else losses[HOST] * float("nan")
        return losses


@pytest.mark.parametrize("gradient", [False, True])
def test_a_skipped_step_changes_nothing(gradient: bool) -> None:
    """Neither parameters nor buffers nor the step count; its data are consumed, and the next step is a good one."""
    module = new_module()
    Spoiling(module, 2, gradient=gradient)
    taken(module), taken(module)
    before = weights(module)
    step = taken(module)
    assert (step.skipped, step.global_step, step.judged, step.batches) == (True, 2, None, range(2, 3))
    assert equal(weights(module), before)
    assert not taken(module).skipped
    assert (module.global_step, module.progress.batches) == (3, 4)


@pytest.mark.parametrize("gradient", [False, True])
def test_only_the_microbatches_that_are_not_finite_are_left_out(gradient: bool) -> None:
    """The update is that of the others, with their samples as weights; also for running statistics."""
    module, bare = new_module(accumulate=4), new_module(accumulate=4)
    Spoiling(module, 1, 2, gradient=gradient)
    step = taken(module)
    assert (step.skipped, step.left_out, step.samples, step.global_step) == (False, (1, 2), 32, 1)
    bare.clear_gradients()
    batches = [bare.next_batch() for _ in range(4)]
    losses = [bare.job.losses(bare.model, batches[n])[HOST] for n in (0, 3)]  # type: ignore[arg-type,index]
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    bare.optimizer.step()
    for ours, theirs in zip(weights(module), weights(bare), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert step.loss == pytest.approx(torch.stack(losses).mean().item())


def test_an_update_without_a_finite_microbatch_is_skipped() -> None:
    """And its data are consumed."""
    module = new_module(accumulate=4)
    Spoiling(module, 0, 1, 2, 3)
    before = weights(module)
    step = taken(module)
    assert (step.skipped, step.left_out, step.batches) == (True, (), range(4))
    assert equal(weights(module), before)
    following = taken(module)
    assert (following.skipped, following.batches) == (False, range(4, 8))


def test_merged_microbatches_leave_out_what_is_not_finite() -> None:
    """PCGrad's rows get no gradient that is not finite."""
    module = new_module(accumulate=4, sections={"gradients": {"mode": "microbatch"}})
    Spoiling(module, 1, gradient=True)
    step = taken(module)
    assert (step.skipped, step.left_out) == (False, (1,))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_left_out_does_not_change_the_state_of_the_job(accumulate: int) -> None:
    """One NaN would stay in a running mean for ever; nor does the check of the parameters change it."""
    poison = {"poison_from": 2, "poison_steps": 1}
    module = new_module("MeanJob", accumulate=accumulate, options=poison, sections={"health": {"skips_max": 1}})
    mean = module.job
    assert isinstance(mean, MeanJob)
    mean.seen, count = 0, mean.count  # the model was tried when it was built
    steps = [taken(module) for _ in range(4 // accumulate)]
    assert [step.skipped for step in steps] == ([False, False, True, False] if accumulate == 1 else [False])
    assert mean.count == count + 3
    assert math.isfinite(mean.total.item())


@pytest.mark.parametrize(("accumulate", "place"), [(1, 1), (4, 1)])
def test_what_cannot_be_undone_is_reported_once(accumulate: int, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a skipped step, and of a microbatch that is left out."""
    module = new_module(accumulate=accumulate)
    Spoiling(module, place)
    if accumulate == 1:
        taken(module)
    with monkeypatch.context() as patch:
        patch.setattr(SavedBuffers, "restore", lambda _: False)
        step = taken(module)
    assert (step.skipped, step.parameters_finite) == (accumulate == 1, False)
    assert taken(module).parameters_finite is None


def test_a_large_buffer_that_never_changed_before_cannot_be_restored() -> None:
    """The update of the other microbatches is made, and the step says that the state is ill. It happens once."""
    module = new_module(accumulate=4)
    bank = torch.zeros(50_000)
    module.model.register_buffer("bank", bank)
    module.refresh()
    spoiling = Spoiling(module, 1, 5)
    plain = spoiling.losses

    def losses(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        if module.progress.batches - 1 in spoiling.places:
            bank.fill_(math.nan)
        return dict(plain(model, batch))  # type: ignore[arg-type] # TinyJob's are a mapping

    spoiling.losses = losses
    step = taken(module)
    assert (step.skipped, step.left_out, step.parameters_finite) == (False, (1,), False)
    assert bool(bank.isnan().all())
    bank.zero_()  # as a rollback does
    step = taken(module)
    assert (step.left_out, step.parameters_finite) == ((5,), None)
    assert not bool(bank.any())


def test_an_error_between_two_steps_does_not_undo_the_last_one() -> None:
    """As that of a seed in an evaluation: the buffers are those after the step."""
    module = new_module("RandomisedJob", options={"optimizer": "SGD"})
    taken(module)
    before = weights(module)
    module.abandon_step()
    assert equal(weights(module), before)
    assert all(parameter.grad is None for parameter in module.parameters)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 3), (2, 2)])
def test_the_metrics_of_an_epoch_count_each_applied_step_once(accumulate: int, steps: int) -> None:
    """Neither a skipped step nor the first pass of one that is taken again."""
    module = new_module(accumulate=accumulate)
    plain = module.job.losses

    def losses(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = dict(plain(model, batch))[HOST]  # type: ignore[arg-type] # TinyJob's are a mapping
        return {HOST: loss, "task": loss * 3}

    module.job.losses = losses  # type: ignore[method-assign] # as a job may be
    Spoiling(module, 1, gradient=True)
    for _ in range(4 // accumulate):
        taken(module)
    metrics = module.merger.finish_epoch()
    assert metrics is not None
    assert metrics.steps == steps
    assert all(math.isfinite(source.norm) for source in metrics.sources)


# -- float16 ---------------------------------------------------------------------------------------------------------


def scaled(places: tuple[int, ...], *, gradient: bool, accumulate: int, scale: float = 16.0) -> TrainModule:
    """Returns a module with float16 and its loss scale, whose batches at these places are spoiled."""
    module = new_module(accumulate=accumulate, sections={"fastpaths": {"amp": "float16"}})
    module.fast_paths.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    Spoiling(module, *places, gradient=gradient)
    return module


@pytest.mark.parametrize("accumulate", [1, 4])
def test_bad_data_do_not_lower_the_loss_scale_of_float16(accumulate: int) -> None:
    """Thirty of them would lower it to less than one, and training would stand still for a day."""
    module = scaled((1, 2, 3, 4), gradient=False, accumulate=accumulate)
    assert module.fast_paths.scaler is not None
    steps = [taken(module) for _ in range(8 // accumulate)]
    assert [step.rescaled for step in steps] == [False] * len(steps)
    assert sum(step.skipped for step in steps) == (4 if accumulate == 1 else 0)
    assert module.fast_paths.scaler.get_scale() == 16.0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_overflow_lowers_the_loss_scale_and_is_not_counted(accumulate: int) -> None:
    """Until the scale is 1: then the gradient itself is not finite, and is skipped."""
    module = scaled((1,), gradient=True, accumulate=accumulate)
    assert module.fast_paths.scaler is not None
    steps = [taken(module) for _ in range(8 // accumulate)]
    assert sum(step.rescaled for step in steps) == 1
    assert module.fast_paths.scaler.get_scale() == 8.0
    assert module.skip_streak == 0
    module = scaled((1,), gradient=True, accumulate=accumulate, scale=1.0)
    assert module.fast_paths.scaler is not None
    steps = [taken(module) for _ in range(8 // accumulate)]
    assert [(step.skipped, step.left_out) for step in steps if step.skipped or step.left_out] == (
        [(True, ())] if accumulate == 1 else [(False, (1,))]
    )
    assert module.fast_paths.scaler.get_scale() == 1.0


# -- data or parameters ----------------------------------------------------------------------------------------------


def test_after_some_skipped_steps_the_last_good_batch_is_tried() -> None:
    """Its loss is finite: the data are ill. The check changes nothing, and is repeated after as many again."""
    module = new_module(sections=HEALTH)
    spoiling = Spoiling(module, *range(1, 8))
    taken(module)
    before, rng = weights(module), torch.get_rng_state()
    steps = [taken(module) for _ in range(7)]
    assert [step.parameters_finite for step in steps] == [None, None, True, None, None, True, None]
    assert spoiling.calls == 8 + 2
    assert equal(weights(module), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in module.parameters)


def test_ill_parameters_are_found() -> None:
    """Also before the first good step, when there is no batch to try."""
    module = new_module(sections=HEALTH)
    taken(module)
    with torch.no_grad():
        module.parameters[0].fill_(float("inf"))
    assert [taken(module).parameters_finite for _ in range(3)] == [None, None, False]
    fresh = new_module(sections=HEALTH)
    Spoiling(fresh, *range(8))
    assert [taken(fresh).parameters_finite for _ in range(3)] == [None, None, True]


def test_a_restore_ends_the_streak() -> None:
    """The restored state has no history of skipped steps."""
    run = driven(sections=HEALTH)
    run.train_to(2)
    run.snapshot()
    run.module.skip_streak = 2
    run.restore(2)
    assert run.module.skip_streak == 0


# -- seeds and sources -----------------------------------------------------------------------------------------------


def test_the_gradients_of_a_sick_isolated_seed_are_dropped() -> None:
    """The host goes on, and the event names the seed."""
    run = driven("SlotJob")
    run.train_to(1)
    run.execute(ReconcileSeeds(seed(SEED_STAGE_TRAINING)))
    (isolated,) = run.module.isolated_seeds
    with torch.no_grad():
        for _, parameter in run.module.seeds.topology.training_parameters(isolated):
            parameter.fill_(float("nan"))
    host = [p.detach().clone() for p in run.module.clip_groups[0]]
    step = taken(run.module)
    assert (step.skipped, step.dropped_seeds) == (False, (isolated,))
    assert math.isfinite(step.loss)
    assert not equal(host, [p.detach() for p in run.module.clip_groups[0]])


def test_judged_is_the_mean_loss_of_the_sources_that_are_not_seeds() -> None:
    """A task counts, a seed does not."""
    module = new_module()
    plain = module.job.losses

    def losses(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        loss = dict(plain(model, batch))[HOST]  # type: ignore[arg-type] # TinyJob's are a mapping
        return {HOST: loss, "task": loss * 3}

    module.job.losses = losses  # type: ignore[method-assign] # as a job may be
    step = taken(module)
    assert step.judged == pytest.approx(step.loss / 2)
    module.job.losses = plain  # type: ignore[method-assign]
    step = taken(module)
    assert step.judged == step.loss


def test_the_window_of_losses_is_part_of_the_state() -> None:
    """A restore brings back that of the point, bit by bit."""
    run = driven()
    run.train_to(3)
    run.snapshot()
    then = run.module.losses.state_dict()
    run.train_to(6)
    assert run.module.losses.state_dict() != then
    restored = run.restore(3)
    assert run.module.losses.state_dict() == then
    assert restored.state_digest == restored.expected_digest
    assert '"count": 3' in restored.losses


def test_a_job_announces_a_changed_task() -> None:
    """The window is empty before the first loss of it, and the event precedes that step."""
    module = new_module()
    taken(module), taken(module)
    module.job.context.new_regime("harder pictures")  # type: ignore[attr-defined] # TinyJob keeps its context
    taken(module)
    assert module.losses.state_dict()["count"] == 3
    assert not module.losses.full
    (begun,) = module.regimes_begun
    assert (begun.reason, begun.announced) == ("harder pictures", True)


class Scaling(Spoiling):
    """Spoils the listed places by losses that are extreme, and counts the passes with the last good batch."""

    tried = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        losses = dict(self.losses(model, batch))  # type: ignore[arg-type] # TinyJob's are a mapping
        good = self.module.last_good
        if good is not None and torch.equal(good.payload[0], batch.payload[0]):
            self.tried += 1
        elif self.module.progress.batches - 1 in self.places:
            losses[HOST] = losses[HOST] * 1e6
        return losses


def trained(module: TrainModule, *, epochs: int = 8) -> int:
    """Takes the steps of some epochs, and begins the next one; returns how many batches have been read."""
    for epoch in range(2, epochs + 2):
        while train_step(module, proceed) is not None:
            pass
        module.cursor.begin_epoch(epoch)
    return module.progress.batches


def test_extreme_losses_in_a_row_are_skipped_while_the_parameters_are_sound() -> None:
    """The last good batch tells, in a pass that changes nothing; one fewer than `health.skips_max` in a row."""
    module = new_module(sections=HEALTH)
    read = trained(module)
    scaling = Scaling(module, read + 2, read + 3, read + 4)
    taken(module), taken(module)
    before = weights(module)
    assert [taken(module).skipped for _ in range(2)] == [True, True]
    assert equal(weights(module), before)
    assert [taken(module).skipped for _ in range(2)] == [False, False]
    assert scaling.tried == 1


def test_ill_parameters_are_not_hidden_by_skipped_steps() -> None:
    """If the last good batch has a high loss too, the step is taken, and health sees its loss."""
    module = new_module(sections=HEALTH)
    trained(module)
    scaling = Scaling(module)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1e4)
    assert [taken(module).skipped for _ in range(2)] == [True, False]
    assert scaling.tried == 1
