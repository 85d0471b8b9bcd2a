from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from support.lane_driver import new_module, proceed
from tolaria.errors import LossShapeError
from tolaria.jobs import HOST, Batch, PerSampleLosses, TrainingJob
from tolaria.lane.job_output import checked_losses
from tolaria.lane.profiling import Region
from tolaria.lane.step import StepAbandonedError, train_step

WEIGHT = nn.Parameter(torch.tensor(2.0))


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of a model's parameters."""
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_is_the_plain_loop_bit_for_bit() -> None:
    """Steps change the parameters exactly as the textbook loop over the same batches does."""
    module = new_module()
    job, model = module.job, copy.deepcopy(module.model)
    optimizer = job.build_optimizer(model)
    cursor = job.training_data()
    cursor.begin_epoch(1)
    while (batch := cursor.next_batch()) is not None:
        optimizer.zero_grad()
        checked_losses(job, model, batch, ())["host"].backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimizer.step()
    steps = []
    while (step := train_step(module, proceed)) is not None:
        steps.append(step)
    assert equal(weights(module.model), weights(model))
    assert [step.global_step for step in steps] == list(range(1, 9))
    assert {step.samples for step in steps} == {8}
    assert [step.batches for step in steps] == [range(place, place + 1) for place in range(8)]
    assert all(step.duration_s >= step.input_wait_s >= 0 for step in steps)


def test_accumulated_microbatches_equal_one_large_batch() -> None:
    """Three microbatches of 8 move the parameters as one batch of 24 does; the rest of an epoch is a smaller step."""
    module = new_module(accumulate=3)
    module.model[1].eval()  # type: ignore[index] # batch statistics do differ
    model = copy.deepcopy(module.model)
    optimizer, cursor = module.job.build_optimizer(model), module.job.training_data()
    cursor.begin_epoch(1)
    first = [cursor.next_batch() for _ in range(3)]
    x = torch.cat([b.payload[0] for b in first if b])
    y = torch.cat([b.payload[1] for b in first if b])
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    optimizer.step()
    step = train_step(module, proceed)
    assert step is not None
    assert step.samples == 24
    for ours, theirs in zip(weights(module.model), weights(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert module.steps_per_epoch == 3
    assert [s.samples for s in [train_step(module, proceed), train_step(module, proceed)] if s] == [24, 16]
    assert train_step(module, proceed) is None


def test_a_step_that_is_not_finite_changes_no_parameter() -> None:
    """A NaN loss skips the step: parameters, momentum and the step count are unchanged, the batch is consumed."""
    module = new_module(options={"poison_from": 3})
    train_step(module, proceed)
    train_step(module, proceed)
    before, momentum = weights(module.model), copy.deepcopy(module.optimizer.state_dict())
    step = train_step(module, proceed)
    assert step is not None
    assert step.skipped
    assert math.isnan(step.loss)
    assert step.global_step == 2
    assert equal(weights(module.model), before)
    assert str(module.optimizer.state_dict()) == str(momentum)
    assert (module.progress.steps, module.progress.skipped_steps, module.progress.batches) == (2, 1, 3)
    following = train_step(module, proceed)
    assert following is not None
    assert not following.skipped


def test_a_step_marks_its_parts() -> None:
    """Parts are marked in order, separately for each microbatch; one that is left out has no backward part."""
    module = new_module(accumulate=2, options={"poison_from": 3, "poison_steps": 2})
    marked: list[str] = []

    @contextmanager
    def mark(name: Region) -> Iterator[None]:
        marked.append(name)
        yield
        marked.append(f"/{name}")

    passes = ["input", "/input", "forward", "/forward", "backward", "/backward"] * 2
    train_step(module, proceed, mark)
    assert marked == [*passes, "merge", "/merge", "optimizer", "/optimizer"]
    marked.clear()
    train_step(module, proceed, mark)
    assert marked == [*["input", "/input", "forward", "/forward"] * 2]


def test_an_abandoned_step_changes_no_parameter() -> None:
    """Abandoned between two microbatches, the step leaves everything as it was."""
    module = new_module(accumulate=2)
    before = weights(module.model)
    with pytest.raises(StepAbandonedError):
        train_step(module, lambda: False)
    assert all(p.grad is None for p in module.model.parameters())
    assert equal(weights(module.model), before)
    assert module.global_step == 0


def test_data_is_fetched_when_it_is_needed() -> None:
    """Between two microbatches the second one has not been fetched; an abandoned step starts again from the first."""
    module = new_module(accumulate=4)
    fetched = []

    def abandon() -> bool:
        fetched.append(module.cursor.state_dict()["index"])
        return False

    random = torch.get_rng_state()
    with pytest.raises(StepAbandonedError):
        train_step(module, abandon)
    assert fetched == [1]
    assert (module.cursor.state_dict()["index"], module.progress.batches) == (0, 0)
    assert torch.equal(torch.get_rng_state(), random)


def test_large_gradients_are_clipped_to_the_norm() -> None:
    """With clip_norm, plain SGD moves the parameters by the norm times the learning rate."""
    module = new_module(clip_norm=0.01)
    module.optimizer.param_groups[0].update(momentum=0.0)
    before = weights(module.model)
    step = train_step(module, proceed)
    assert step is not None
    assert step.gradient_norm > 0.01
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(module.model), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01 * 0.05, rel=1e-3)


def test_accumulation_is_weighted_by_samples() -> None:
    """Microbatches of 8, 8 and 1 give the gradient of the 17 samples together, not a mean of three means."""
    module = new_module(accumulate=3, options={"samples": 17})
    module.model[1].eval()  # type: ignore[index] # batch statistics do differ
    model = copy.deepcopy(module.model)
    x, y = module.job.x, module.job.y  # type: ignore[attr-defined]
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    step = train_step(module, proceed)
    assert step is not None
    assert step.samples == 17
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_skipped_step_leaves_buffers_unchanged() -> None:
    """A batch of NaNs reaches the running statistics; when the step is skipped they are restored."""
    module = new_module()
    train_step(module, proceed)
    before = [b.clone() for b in module.model.buffers()]
    module.job.x.fill_(float("nan"))  # type: ignore[attr-defined]
    step = train_step(module, proceed)
    assert step is not None
    assert step.skipped
    assert equal(before, list(module.model.buffers()))


def test_loss_and_norm_are_numbers_of_the_gradients_precision() -> None:
    """Also where the loss has another: the numbers of a step are those that one tensor of all of them would hold."""
    module = new_module()
    losses, seen = module.job.losses, list[Tensor]()

    def in_double(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        seen.append(cast("dict[str, Tensor]", losses(model, batch))[HOST].double() / 3)
        return {HOST: seen[-1]}

    module.job.losses = in_double  # type: ignore[method-assign]
    step = train_step(module, proceed)
    assert step is not None
    gradients = [p.grad for p in module.parameters if p.grad is not None]
    numbers = torch.stack([seen[0].detach().float(), *torch._foreach_norm(gradients)]).tolist()  # noqa: SLF001 - see step.py
    assert (step.loss, step.gradient_norm) == (numbers[0], math.hypot(*numbers[1:]))
    assert step.loss != seen[0].item()


def test_parameters_outside_the_optimizer_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head-only optimizer the body's gradients neither accumulate over steps nor enter the norm."""
    monkeypatch.setattr(
        "support.jobs.TinyJob.build_optimizer", lambda _self, model: torch.optim.SGD(model[4].parameters(), lr=0.0)
    )
    module = new_module()
    for _ in range(3):
        step = train_step(module, proceed)
        assert step is not None
        head = torch.cat([p.grad.flatten() for p in module.model[4].parameters() if p.grad is not None])  # type: ignore[index]
        assert step.gradient_norm == pytest.approx(head.norm().item())
    body = next(module.model.parameters())
    assert body.grad is not None
    module.cursor.begin_epoch(1)
    module.model.eval()
    one = train_step(module, proceed)
    first = body.grad.clone()
    module.cursor.begin_epoch(1)
    again = train_step(module, proceed)
    assert one is not None
    assert again is not None
    torch.testing.assert_close(body.grad, first)


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("VectorLossJob", r"'host' must be a scalar, got shape \(8, 1\)"),
        ("NoHostLossJob", r"with the source 'host', got \['other'\]"),
        ("DetachedLossJob", "carries no graph"),
    ],
)
def test_an_invalid_loss_is_found_when_the_lane_is_built(job: str, words: str) -> None:
    """The first forward pass of the build checks the losses."""
    with pytest.raises(LossShapeError, match=words):
        new_module(job)


class GivenLosses:
    """A job whose losses are given by the test."""

    def __init__(self, losses: object) -> None:
        self._losses = losses

    def losses(self, model: nn.Module, batch: Batch) -> object:
        return self._losses


def checked(losses: object, *, seed_ids: list[str] | None = None, seeds: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The checked losses of a job that returns `losses`."""
    batch = Batch(None, 4, seed_ids)
    return dict(checked_losses(cast("TrainingJob", GivenLosses(losses)), nn.Identity(), batch, seeds))


def test_valid_losses_pass_unchanged() -> None:
    """The same tensors are returned for any source names; a loss that is not finite is not checked here."""
    losses = {HOST: WEIGHT * 3, "aux": WEIGHT * math.nan}
    found = checked(losses)
    assert found.keys() == losses.keys()
    assert all(found[source] is losses[source] for source in losses)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (WEIGHT * 3, "must return a mapping with the source 'host', got a Tensor"),
        ({"aux": WEIGHT * 3}, r"must return a mapping with the source 'host', got \['aux'\]"),
        ({}, r"got \[\]"),
        ({HOST: 3.0}, "source 'host' must be a tensor, got a float"),
        ({HOST: WEIGHT * 3, "aux": (WEIGHT * 3).reshape(1)}, r"source 'aux' must be a scalar, got shape \(1,\)"),
        ({HOST: (WEIGHT * 3).detach()}, "source 'host' carries no graph"),
    ],
)
def test_invalid_losses_are_rejected_by_source(losses: object, message: str) -> None:
    """The message says what is wrong with which loss."""
    with pytest.raises(LossShapeError, match=message):
        checked(losses)


def test_per_sample_losses_are_split_by_seed() -> None:
    """Losses are shares of the whole batch; samples of seeds that are not training count as the host's."""
    values = WEIGHT * torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = checked(PerSampleLosses(values), seed_ids=["", "a", "b", "a"], seeds=("a",))
    assert {source: loss.item() for source, loss in found.items()} == {HOST: 2.0, "a": 3.0}
    assert sum(found.values()).requires_grad  # type: ignore[union-attr] # there are two


@pytest.mark.parametrize(
    ("values", "seed_ids", "message"),
    [
        (WEIGHT * torch.ones(4), None, "for a batch without seed_ids"),
        (torch.ones(4), ["", "", "", ""], "carry no graph"),
    ],
)
def test_per_sample_losses_need_ids_and_a_graph(values: Tensor, seed_ids: list[str] | None, message: str) -> None:
    """Losses that cannot be split or differentiated are rejected."""
    with pytest.raises(LossShapeError, match=message):
        checked(PerSampleLosses(values), seed_ids=seed_ids)
