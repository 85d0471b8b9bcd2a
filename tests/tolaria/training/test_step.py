from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from support.jobs import TinyJob
from tolaria.config import Settings, TrainingSettings
from tolaria.errors import LossShapeError
from tolaria.training.losses import checked_losses
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import StepAbandonedError, train_step
from tolaria.values.profiling import Region


def rig(job: str = "TinyJob", **fields: object) -> Rig:
    """A rig at the begin of its first epoch."""
    made = build_rig(Settings(training=TrainingSettings(job=f"support.jobs:{job}", device="cpu", **fields)))  # type: ignore[arg-type]
    made.cursor.begin_epoch(1)
    made.model.train()
    return made


def always() -> bool:
    """Never told to stop."""
    return True


def weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of a model's parameters."""
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_is_the_plain_loop_bit_for_bit() -> None:
    """Steps change the parameters exactly as the textbook loop over the same batches does."""
    made = rig()
    job, model = made.job, copy.deepcopy(made.model)
    optimizer = job.build_optimizer(model)
    cursor = job.training_data()
    cursor.begin_epoch(1)
    while (batch := cursor.next_batch()) is not None:
        optimizer.zero_grad()
        checked_losses(job, model, batch, ())["host"].backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimizer.step()
    reports = []
    while (report := train_step(made, always)) is not None:
        reports.append(report)
    assert same(weights(made.model), weights(model))
    assert [r.global_step for r in reports] == list(range(1, 9))
    assert {r.samples for r in reports} == {8}
    assert all(r.duration_s >= r.input_wait_s >= 0 for r in reports)


def test_accumulated_microbatches_are_one_large_batch() -> None:
    """Two microbatches of 8 move the parameters as one batch of 16 does; the rest of an epoch is a smaller step."""
    made = rig(accumulate=3)
    made.model[1].eval()  # type: ignore[index] # batch statistics do differ
    model = copy.deepcopy(made.model)
    optimizer, cursor = made.job.build_optimizer(model), made.job.training_data()
    cursor.begin_epoch(1)
    first = [cursor.next_batch() for _ in range(3)]
    x = torch.cat([b.payload[0] for b in first if b])
    y = torch.cat([b.payload[1] for b in first if b])
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    optimizer.step()
    report = train_step(made, always)
    assert report is not None
    assert report.samples == 24
    for ours, theirs in zip(weights(made.model), weights(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert made.steps_per_epoch == 3
    assert [r.samples for r in [train_step(made, always), train_step(made, always)] if r] == [24, 16]
    assert train_step(made, always) is None


def test_a_step_that_is_not_finite_changes_no_parameter() -> None:
    """A NaN loss voids the step: parameters, momentum and the step count stay, the batch is behind."""
    made = rig(options={"poison_from": 3})
    train_step(made, always)
    train_step(made, always)
    before, momentum = weights(made.model), copy.deepcopy(made.optimizer.state_dict())
    report = train_step(made, always)
    assert report is not None
    assert report.void
    assert math.isnan(report.loss)
    assert report.global_step == 2
    assert same(weights(made.model), before)
    assert str(made.optimizer.state_dict()) == str(momentum)
    following = train_step(made, always)
    assert following is not None
    assert not following.void


def test_a_step_marks_its_parts() -> None:
    """In their order, each microbatch's apart; a void step has no part in which parameters change."""
    made = rig(accumulate=2, options={"poison_from": 3})
    marked: list[str] = []

    @contextmanager
    def mark(name: Region) -> Iterator[None]:
        marked.append(name)
        yield
        marked.append(f"/{name}")

    passes = ["forward", "/forward", "backward", "/backward"] * 2
    train_step(made, always, mark)
    assert marked == [*passes, "merge", "/merge", "optimizer", "/optimizer"]
    marked.clear()
    train_step(made, always, mark)
    assert marked == [*passes, "merge", "/merge"]


def test_a_step_given_up_changes_no_parameter() -> None:
    """Told to stop between two microbatches, the step leaves everything as it was."""
    made = rig(accumulate=2)
    before = weights(made.model)
    with pytest.raises(StepAbandonedError):
        train_step(made, lambda: False)
    assert all(p.grad is None for p in made.model.parameters())
    assert same(weights(made.model), before)
    assert made.global_step == 0


def test_large_gradients_are_clipped_to_the_norm() -> None:
    """With clip_norm the step of plain SGD is as long as the norm, times the learning rate, allows."""
    made = rig(clip_norm=0.01)
    made.optimizer.param_groups[0].update(momentum=0.0)
    before = weights(made.model)
    report = train_step(made, always)
    assert report is not None
    assert report.gradient_norm > 0.01
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(made.model), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01 * 0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("VectorLossJob", r"'host' must be a scalar, got shape \(8, 1\)"),
        ("NoHostLossJob", r"with the source 'host', got \['somebody'\]"),
        ("DetachedLossJob", "carries no graph"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_told_at_start(job: str, words: str) -> None:
    """The first look at a job finds losses of the wrong kind."""
    with pytest.raises(LossShapeError, match=words):
        rig(job)


class TensorLossJob(TinyJob):
    def losses(self, model: nn.Module, batch: object) -> object:  # type: ignore[override]
        return torch.tensor(1.0)


def test_losses_must_be_a_mapping() -> None:
    """A bare loss is refused with what was expected."""
    made = rig()
    job = TensorLossJob(made.job.context)  # type: ignore[attr-defined]
    with pytest.raises(LossShapeError, match="got a Tensor"):
        checked_losses(job, made.model, None, ())  # type: ignore[arg-type]


def test_accumulation_weighs_by_samples() -> None:
    """Microbatches of 8, 8 and 1 give the gradient of the 17 samples together, not a mean of three means."""
    made = rig(accumulate=3, options={"samples": 17})
    made.model[1].eval()  # type: ignore[index] # batch statistics do differ
    model = copy.deepcopy(made.model)
    x, y = made.job.x, made.job.y  # type: ignore[attr-defined]
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    report = train_step(made, always)
    assert report is not None
    assert report.samples == 17
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_void_step_leaves_no_trace_in_buffers() -> None:
    """A batch of NaNs reaches the running statistics; when the step is void they are as before."""
    made = rig()
    train_step(made, always)
    before = [b.clone() for b in made.model.buffers()]
    made.job.x.fill_(float("nan"))  # type: ignore[attr-defined]
    report = train_step(made, always)
    assert report is not None
    assert report.void
    assert same(before, list(made.model.buffers()))


def test_parameters_that_no_optimizer_holds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head-only optimizer: the body's gradients neither grow from step to step nor enter the norm."""
    monkeypatch.setattr(
        "support.jobs.TinyJob.build_optimizer", lambda _self, model: torch.optim.SGD(model[4].parameters(), lr=0.0)
    )
    made = rig()
    for _ in range(3):
        report = train_step(made, always)
        assert report is not None
        head = torch.cat([p.grad.flatten() for p in made.model[4].parameters() if p.grad is not None])  # type: ignore[index]
        assert report.gradient_norm == pytest.approx(head.norm().item())
    body = next(made.model.parameters())
    assert body.grad is not None
    made.cursor.begin_epoch(1)
    made.model.eval()
    one = train_step(made, always)
    first = body.grad.clone()
    made.cursor.begin_epoch(1)
    again = train_step(made, always)
    assert one is not None
    assert again is not None
    torch.testing.assert_close(body.grad, first)


def test_data_is_fetched_when_it_is_its_turn() -> None:
    """A pause between two microbatches finds the second one not fetched yet; given up, the update begins anew."""
    made = rig(accumulate=4)
    fetched = []

    def give_up() -> bool:
        fetched.append(made.cursor.state_dict()["index"])
        return False

    random = torch.get_rng_state()
    with pytest.raises(StepAbandonedError):
        train_step(made, give_up)
    assert fetched == [1]
    assert (made.cursor.state_dict()["index"], made.epoch.batches) == (0, 0)
    assert torch.equal(torch.get_rng_state(), random)
