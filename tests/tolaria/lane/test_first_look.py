"""What the first look at a job makes work, and what it refuses, with the method and the field."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.lane_driver import DrivenLane
from support.user_jobs import Line
from tolaria.config import FastPathSettings, Settings, TrainingSettings
from tolaria.errors import JobError
from tolaria.jobs import HOST, Batch, Evaluation, JobContext, TensorCursor
from tolaria.lane.build import build
from tolaria.lane.job_output import checked_evaluation

HERE = __name__

CHANGES: dict[str, Any] = {}
"""What `changed` gives to its job, method by method."""


def changed(context: JobContext) -> Line:
    """The linear job with the methods of `CHANGES`."""
    job: Line = type("Job", (Line,), dict(CHANGES))(context)
    return job


@pytest.fixture(autouse=True)
def _no_changes() -> Iterator[None]:
    torch.set_num_threads(1)
    CHANGES.clear()
    yield
    CHANGES.clear()


def lane(**sections: Any) -> DrivenLane:
    """A driven lane of the changed job."""
    training = TrainingSettings(job=f"{HERE}:changed", device="cpu", threads=1)
    return DrivenLane(build(Settings(training=training, **sections)))


def trains() -> None:
    """It trains, and a rollback is exact."""
    driven = lane()
    driven.train_to(2)
    driven.snapshot()
    driven.train_to(4)
    losses = dict(driven.losses)
    restored = driven.restore(2)
    assert restored.state_digest == restored.expected_digest
    driven.train_to(4)
    assert driven.losses == losses


class Cursor(TensorCursor):
    """A cursor with one more field in its state, and with batches that the test makes."""

    field: Any = 0
    batch: Callable[[Batch], Batch] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "field": self.field}

    def next_batch(self) -> Batch | None:
        found = super().next_batch()
        return found if found is None or self.batch is None else self.batch(found)


def cursor(field: Any = 0, batch: Callable[[Batch], Any] | None = None) -> Callable[[Line], Cursor]:
    """The method `training_data` of a job with such a cursor."""

    def training_data(job: Line) -> Cursor:
        made = Cursor((job.x, job.y), batch_size=8, seed=job.seed)
        made.field, made.batch = field, batch
        return made

    return training_data


def optimizer_with(value: Any) -> Callable[[Line, nn.Module], torch.optim.Optimizer]:
    """The method `build_optimizer` of a job whose optimizer has such a value in its state after its first step."""

    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["odd"] = value

    return lambda _, model: Odd(model.parameters(), lr=0.01)


def model_with(**buffers: Tensor) -> Callable[[Line], nn.Module]:
    """The method `build_model` of a job whose model has such buffers."""

    def build_model(job: Line) -> nn.Module:
        model: nn.Module = Line.build_model(job)  # type: ignore[no-untyped-call]
        for name, tensor in buffers.items():
            model.register_buffer(name, tensor.clone())
        return model

    return build_model


def two_losses(job: Line, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Losses of two sources, whose gradients are merged."""
    x, y = batch.payload
    return {HOST: functional.mse_loss(model(x), y), "aux": functional.l1_loss(model(x), y)}


class Bag(nn.Module):
    """A linear layer behind an embedding, with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(8, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(x + self.table(torch.arange(len(x)) % 8))
        return made


class Complex(nn.Module):
    """A model with a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.ones(4, 1, dtype=torch.complex64)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(x) + (x.to(torch.complex64) @ self.filter).real
        return made


class Assigning(nn.Module):
    """Assigns its buffers anew in every forward pass, one of them for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.mean: Tensor
        self.last: Tensor | None
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.last = x[0].clone()
        made: Tensor = self.out(x - self.mean)
        return made


def lazy(_job: Line) -> nn.Module:
    """A model whose shapes follow from its input."""
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(1))


def lazy_and_unused(_job: Line) -> nn.Module:
    """A model with a lazy layer that no forward pass reaches."""
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].register_module("spare", nn.LazyLinear(3))
    return model


def empty_first() -> Callable[[Batch], Batch]:
    """Every other batch has no row, the first one too."""
    turns = iter(range(10**6))
    return lambda b: Batch(tuple(t[:0] for t in b.payload), 0) if next(turns) % 2 == 0 else b


WORKS: list[tuple[str, dict[str, Any]]] = [
    ("numpy samples", {"training_data": cursor(batch=lambda b: Batch(b.payload, np.int64(b.samples)))}),  # type: ignore[arg-type]
    ("a numpy integer in the cursor", {"training_data": cursor(np.int64(3))}),
    ("a numpy float in the cursor", {"training_data": cursor(np.float32(0.5))}),
    ("a number in a tensor in the cursor", {"training_data": cursor(torch.tensor(3))}),
    ("a tensor in the cursor", {"training_data": cursor(torch.arange(3))}),
    ("a numpy float in the optimizer", {"build_optimizer": optimizer_with(np.float64(2.0))}),
    ("a buffer of unsigned shorts", {"build_model": model_with(a=torch.ones(3, dtype=torch.uint16))}),
    ("a buffer of unsigned longs", {"build_model": model_with(a=torch.ones(3, dtype=torch.uint64))}),
    ("a complex buffer", {"build_model": model_with(a=torch.ones(3, dtype=torch.complex64))}),
    ("batches without rows", {"training_data": cursor(batch=empty_first())}),
    ("lazy modules", {"build_model": lazy, "build_optimizer": lambda _, m: torch.optim.Adagrad(m.parameters())}),
    ("a complex parameter", {"build_model": lambda _: Complex()}),
]  # fmt: skip


@pytest.mark.parametrize("changes", [c for _, c in WORKS], ids=[name for name, _ in WORKS])
def test_what_can_be_converted_exactly_works(changes: dict[str, Any]) -> None:
    """It trains, and rolls back exactly."""
    CHANGES.update(changes)
    trains()


def once(job: Line) -> Any:
    """The validation batches of a job that made one generator of them."""
    if not hasattr(job, "kept"):
        vars(job)["kept"] = (b for b in Line.validation_batches(job))  # type: ignore[no-untyped-call]
    return vars(job)["kept"]


def unloadable(_cursor: object, state: Mapping[str, int]) -> None:
    """Loads only the position before the first batch."""
    if state["index"]:
        raise KeyError("offset")


def cursor_that_forgets(job: Line) -> Cursor:
    """A cursor that cannot return to its place."""
    kind = type("Forgetful", (Cursor,), {"load_state_dict": unloadable})
    made: Cursor = kind((job.x, job.y), batch_size=8, seed=job.seed)
    return made


class Decaying(nn.Module):
    """Shrinks its weight in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.out.weight.mul_(0.99)
        made: Tensor = self.out(x)
        return made


class MaxNorm(nn.Module):
    """Bounds the norms of its weight's rows in every forward pass, as models of EEG data do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data = torch.renorm(self.first.weight.data, p=2, dim=0, maxnorm=0.5)
        made: Tensor = self.out(torch.relu(self.first(x)))
        return made


class Late(nn.Module):
    """Makes a layer, a buffer, or its weight anew, in the first forward pass."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.made, self.first = made, nn.Linear(4, 1)
        self.head: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made == "layer" and self.head is None:
            self.head = nn.Linear(4, 1)
        elif self.made == "buffer" and not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0))
        elif self.made == "weight":
            self.first.weight = nn.Parameter(self.first.weight.detach().clone())
        made: Tensor = self.first(x) if self.head is None else self.head(x)
        return made


def kept_optimizer(job: Any, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that the job keeps, to use it itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    job.optimizer = optimizer
    return optimizer


def own_update(job: Any, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """The loop of a user who does not know yet that Tolaria has one."""
    job.optimizer.zero_grad()
    losses: Mapping[str, Tensor] = Line.losses(job, model, batch)  # type: ignore[no-untyped-call]
    losses[HOST].backward()  # type: ignore[no-untyped-call]
    job.optimizer.step()
    return {HOST: losses[HOST].detach()}


def own_backward(job: Any, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Backpropagates beside Tolaria."""
    losses: Mapping[str, Tensor] = Line.losses(job, model, batch)  # type: ignore[no-untyped-call]
    losses[HOST].backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return losses


def own_clipping(job: Any, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Clips gradients that are not there yet."""
    losses: Mapping[str, Tensor] = Line.losses(job, model, batch)  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return losses


def two_optimizers(job: Any, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the last layer; the job keeps another one, of the first."""
    first, *_, last = model.children()
    job.optimizer = torch.optim.SGD(first.parameters(), lr=0.01)
    return torch.optim.SGD(last.parameters(), lr=0.01)


def adversary(job: Any, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Takes a step of the kept optimizer before the loss."""
    x, y = batch.payload
    job.optimizer.zero_grad()
    first = [parameter for group in job.optimizer.param_groups for parameter in group["params"]]
    torch.autograd.backward(functional.mse_loss(model(x), y), inputs=first)
    job.optimizer.step()
    losses: Mapping[str, Tensor] = Line.losses(job, model, batch)  # type: ignore[no-untyped-call]
    return losses


def cleared(job: Any, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Attacks its own input before the loss, and clears the gradients of that."""
    x, y = batch.payload
    functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    losses: Mapping[str, Tensor] = Line.losses(job, model, batch)  # type: ignore[no-untyped-call]
    return losses


def trained_by_evaluation(job: Any, model: nn.Module, batch: Batch) -> Evaluation:
    """Takes a step in the evaluation."""
    job.optimizer.step()
    return Evaluation(0.0, 0, batch.samples)


def late(made: str) -> Callable[[Line], nn.Module]:
    """The method `build_model` of a job with such a model, behind a layer."""
    return lambda _: nn.Sequential(nn.Linear(4, 4), Late(made))


def loss(made: Callable[[Tensor], Any]) -> Callable[[Line, nn.Module, Batch], Mapping[str, Any]]:
    """The method `losses` of a job that returns something made of its loss."""
    return lambda job, model, batch: {HOST: made(Line.losses(job, model, batch)[HOST])}  # type: ignore[no-untyped-call]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training_data": cursor({"a", "b"})}, r"training_data: state_dict\(\) field 'field': a set cannot be kept"),
    ({"training_data": cursor(batch=lambda b: b.payload)}, r"next_batch\(\) must return a Batch, got a tuple"),
    ({"training_data": cursor(batch=lambda b: Batch(b.payload, 2.5))}, r"Batch.samples must be a whole"),  # type: ignore[arg-type]
    ({"training_data": cursor_that_forgets}, r"training_data: load_state_dict\(\) raised KeyError: 'offset'"),
    ({"build_optimizer": optimizer_with(object())}, r"the optimizer's state 'odd' of parameter '0.weight': a object"),
    ({"build_model": model_with(a=torch.ones(2, dtype=torch.complex128))}, r"buffer 'a': dtype torch.complex128"),
    ({"build_model": lambda _: Bag()}, r"parameter 'table.weight' gets a sparse gradient.*sparse=False"),
    ({"build_model": lambda _: Complex(), "losses": two_losses}, r"parameter 'filter', which is torch.complex64"),
    ({"build_model": lazy_and_unused}, r"'0.spare.weight' of its model is lazy"),
    ({"build_model": lambda _: nn.Linear(4, 1, device="meta")}, r"build_model\(\): 'weight'.* is a meta tensor"),
    ({"validation_batches": once}, r"validation_batches\(\) returns the same iterator each time"),
    ({"evaluate": lambda *_: torch.ones(2)}, r"evaluate\(\) must return an Evaluation"),
    ({"evaluate": lambda *_: Evaluation(1.0, 9, 8)}, r"evaluate\(\): Evaluation.correct is 9, more than .*samples.* 8"),
    ({"evaluate": lambda *_: Evaluation(1.0, 0, -8)}, r"evaluate\(\): Evaluation.samples must be a whole number of at"),
    ({"training_data": cursor(batch=lambda b: Batch(b.payload, -8))}, r"next_batch\(\): Batch.samples .* got -8"),
    ({"build_optimizer": kept_optimizer, "losses": own_update}, r"losses\(\) calls step\(\) of the optimizer"),
    ({"build_optimizer": kept_optimizer, "evaluate": trained_by_evaluation}, r"evaluate\(\) calls step\(\) of"),
    ({"losses": own_backward}, r"losses\(\) changes the gradients of parameters, as backward"),
    ({"losses": own_clipping}, r"losses\(\) changes the gradients.*clip by training.clip_norm"),
    ({"losses": loss(lambda one: float(one.detach()))}, r"losses\(\): the loss of source 'host' must be a tensor"),
    ({"losses": loss(lambda one: one.detach())}, r"losses\(\): the loss of source 'host' carries no graph"),
    ({"losses": loss(lambda one: one.repeat(2))}, r"losses\(\): the loss of source 'host' must be a scalar"),
    ({"build_model": lambda _: Decaying()}, r"evaluate\(\): parameter 'out.weight' changes with every pass"),
    ({"build_model": late("layer")}, r"creates parameter '1.head.weight'.*create '1.head' in __init__, .*LazyLinear"),
    ({"build_model": late("buffer")}, r"losses\(\): a pass creates buffer '1.mean'"),
    ({"build_model": late("weight")}, r"losses\(\): a pass replaces parameter '1.first.weight'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_fail_later_is_refused_at_the_start(changes: dict[str, Any], message: str) -> None:
    """The message names the method and the field, in one line."""
    CHANGES.update(changes)
    with pytest.raises(JobError, match=message) as caught:
        lane()
    assert "\n" not in str(caught.value)


def test_gradients_that_losses_clears_are_missed_only_with_several_microbatches() -> None:
    """With one microbatch nothing is lost, and it trains as without; with two the first one's would be."""
    lanes = []
    for methods in ({}, {"losses": cleared}):
        CHANGES.clear()
        CHANGES.update(methods)
        lanes.append(lane())
        lanes[-1].train_to(4)
    assert lanes[0].losses == lanes[1].losses
    training = TrainingSettings(job=f"{HERE}:changed", device="cpu", threads=1, accumulate=2)
    with pytest.raises(JobError, match=r"losses\(\) clears gradients.*training.accumulate"):
        build(Settings(training=training))


def test_what_is_probably_not_meant_is_noted_at_the_start() -> None:
    """A second optimizer that the job steps itself, and a first loss that is not finite; sound jobs have no notes."""
    jobs: dict[str, dict[str, Any]] = {
        "sound": {},
        "adversary": {"build_optimizer": two_optimizers, "losses": adversary},
        "infinite": {"losses": loss(lambda one: one * torch.inf)},
    }
    built = {}
    for name, methods in jobs.items():
        CHANGES.clear()
        CHANGES.update(methods)
        training = TrainingSettings(job=f"{HERE}:changed", device="cpu", threads=1)
        built[name] = build(Settings(training=training)).ready.notes
    assert built["sound"] == ()
    assert [note.split(":")[0] for note in built["adversary"]] == ["losses() steps another optimizer, SGD"]
    assert built["infinite"] == ("losses(): the loss of the first batch, or its gradient, is not finite",)


def test_an_overflow_of_the_first_loss_scale_is_not_noted() -> None:
    """With float16 the scale is lowered in the first steps; the gradient itself is finite."""
    CHANGES["losses"] = loss(lambda one: one * 1e4)
    training = TrainingSettings(job=f"{HERE}:changed", device="cpu", threads=1)
    assert build(Settings(training=training, fastpaths=FastPathSettings(amp="float16"))).ready.notes == ()


def test_a_projection_in_the_forward_pass_is_exact() -> None:
    """It trains as in a bare loop, and rolls back exactly: a second pass over the same parameters changes nothing."""
    CHANGES["build_model"] = lambda _: MaxNorm()
    trains()
    driven = lane(fastpaths={"fused": "off"})
    driven.train_to(8)
    torch.manual_seed(0)
    model, job = MaxNorm(), Line(JobContext(0, torch.device("cpu")))  # type: ignore[no-untyped-call]
    data, optimizer = job.training_data(), job.build_optimizer(model)  # type: ignore[no-untyped-call]
    data.begin_epoch(1)
    while (batch := data.next_batch()) is not None:
        optimizer.zero_grad()
        job.losses(model, batch)[HOST].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for one, other in zip(driven.module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss_sum", [torch.tensor(2.5), np.float32(2.5), 2.5])
def test_numbers_of_an_evaluation_may_be_tensors(loss_sum: object) -> None:
    """They are converted exactly; a tensor of several elements is refused."""
    given = Evaluation(loss_sum, torch.tensor(3), np.int64(4))  # type: ignore[arg-type]
    found = checked_evaluation(given)
    assert found == Evaluation(2.5, 3, 4)
    assert [type(value) for value in (found.loss_sum, found.correct, found.samples)] == [float, int, int]
    with pytest.raises(JobError, match=r"Evaluation.loss_sum must be a number, got a tensor of shape \(2,\)"):
        checked_evaluation(Evaluation(torch.ones(2), 0, 1))  # type: ignore[arg-type]


def test_the_first_look_leaves_no_trace() -> None:
    """Parameters, buffers that are assigned anew, optimizer, generators and data are those of a run without it."""
    CHANGES["build_model"] = lambda _: Assigning()
    CHANGES["build_optimizer"] = lambda _, model: torch.optim.Adam(model.parameters(), lr=0.1)
    module = lane().module
    drawn = torch.rand(3)
    torch.manual_seed(0)
    model = Assigning()
    assert torch.equal(drawn, torch.rand(3))
    assert all(
        torch.equal(one, other) for one, other in zip(module.model.parameters(), model.parameters(), strict=True)
    )
    assert dict(module.optimizer.state) == {}
    assert (module.global_step, module.progress.number, module.cursor.state_dict()["index"]) == (0, 0, 0)
    assert {name: buffer.tolist() for name, buffer in module.model.named_buffers()} == {"mean": [0.0] * 4}


def test_the_first_look_leaves_no_worker() -> None:
    """The workers of a DataLoader that it started have ended."""
    before = set(multiprocessing.active_children())
    training = TrainingSettings(job="support.user_jobs:Loader", device="cpu", options={"workers": 1, "samples": 16})
    module = build(Settings(training=training)).module
    gc.collect()
    assert set(multiprocessing.active_children()) == before
    assert module.global_step == 0
