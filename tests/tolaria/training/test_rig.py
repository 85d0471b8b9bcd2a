from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tolaria.config import OptimizerSettings, Settings, TrainingSettings
from tolaria.errors import BrokenJobError, ConfigurationError, EmptyDatasetError
from tolaria.jobs import Batch
from tolaria.training.device import choose_device, limit_threads
from tolaria.training.rig import build_rig, on_device, seed_everything, to_device


def settings(job: str, **fields: object) -> Settings:
    """Settings for a job on the processor."""
    return Settings(training=TrainingSettings(job=job, device="cpu", **fields))  # type: ignore[arg-type]


def test_the_first_look_leaves_no_trace() -> None:
    """RNGs, buffers and the data's place are as if the forward pass had not been tried."""
    made = build_rig(settings("support.jobs:TinyJob", seed=3, options={"dropout": 0.5}))
    after = torch.rand(4), np.random.rand(2), random.random()  # noqa: NPY002, S311 - the global RNGs are tested
    seed_everything(3)
    made.job.build_model()
    expected = torch.rand(4), np.random.rand(2), random.random()  # noqa: NPY002, S311
    assert torch.equal(after[0], expected[0])
    assert (after[1] == expected[1]).all()
    assert after[2] == expected[2]
    assert made.cursor.state_dict() == made.job.training_data().state_dict()
    assert made.model[1].num_batches_tracked.item() == 0  # type: ignore[index]


def test_the_same_seed_gives_the_same_model() -> None:
    """Seeding happens before the model is built; another seed gives another model."""

    def first_weight(seed: int) -> torch.Tensor:
        return next(build_rig(settings("support.jobs:TinyJob", seed=seed)).model.parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_an_empty_dataset_is_told() -> None:
    """No batch, no training: an error of its own, naming the job."""
    with pytest.raises(EmptyDatasetError, match=r"support\.jobs:TinyJob.*holds no batch"):
        build_rig(settings("support.jobs:TinyJob", options={"samples": 0}))


@pytest.mark.parametrize(
    ("method", "made", "words"),
    [
        ("build_model", 3, r"build_model\(\) must return a Module, got a int"),
        ("build_optimizer", "sgd", r"build_optimizer\(\) must return a Optimizer, got a str"),
        ("training_data", [1, 2], r"training_data\(\) must return a BatchCursor, got a list"),
        ("build_model", ValueError("no weights"), r"build_model\(\) raised ValueError: no weights"),
        ("losses", KeyError("labels"), r"losses\(\) raised KeyError: 'labels'"),
        ("evaluate", 3.0, r"evaluate\(\) must return a Evaluation, got a float"),
        ("evaluate", KeyError("y"), r"evaluate\(\) raised KeyError"),
        ("validation_batches", OSError("gone"), r"validation_batches\(\) raised OSError: gone"),
    ],
)
def test_a_method_that_fails_or_lies_is_named(
    method: str, made: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method's mistakes are told with the method's name."""

    def spoilt(*_args: object) -> object:
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(f"support.jobs.TinyJob.{method}", spoilt)
    with pytest.raises(BrokenJobError, match=words):
        build_rig(settings("support.jobs:TinyJob"))


def test_no_validation_data_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot be evaluated is refused at start."""
    monkeypatch.setattr("support.jobs.TinyJob.validation_batches", lambda _self: [])
    with pytest.raises(EmptyDatasetError, match="validation data"):
        build_rig(settings("support.jobs:TinyJob"))


def test_a_frozen_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without anything to train is a mistake."""
    monkeypatch.setattr("support.jobs.TinyJob.build_model", lambda _self: torch.nn.Linear(4, 1).requires_grad_(False))
    with pytest.raises(BrokenJobError, match="no parameter that can be trained"):
        build_rig(settings("support.jobs:TinyJob"))


def test_a_missing_device_is_a_configuration_error() -> None:
    """Asking for a GPU that is not there says how many there are."""
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has more than 7 CUDA devices")
    with pytest.raises(ConfigurationError, match="cuda:7"):
        choose_device("cuda:7")
    assert choose_device("cpu") == torch.device("cpu")


def test_threads_leave_a_core_for_the_event_loop() -> None:
    """0 is one fewer than the process may use; a number is a number."""
    before = torch.get_num_threads()
    assert limit_threads(3) == torch.get_num_threads() == 3
    assert limit_threads(0) == torch.get_num_threads() >= 1
    torch.set_num_threads(before)


def test_payloads_of_every_shape_move() -> None:
    """Tensors in tuples, lists and dicts move, the rest stays; on the CPU nothing is copied."""
    meta = torch.device("meta")
    moved = to_device({"x": (torch.ones(2), [torch.ones(3)]), "name": "a"}, meta)
    assert moved["x"][0].device == moved["x"][1][0].device == meta
    assert moved["name"] == "a"
    batch = Batch(torch.ones(2), 2)
    assert on_device(batch, torch.device("cpu")) is batch
    assert on_device(batch, meta).payload.device == meta


def test_determinism_is_asked_of_torch() -> None:
    """training.deterministic makes torch refuse kernels that do not repeat."""
    try:
        build_rig(settings("support.jobs:TinyJob", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(mode=False)


class NoRate(torch.optim.Optimizer):
    """An optimizer that has no learning rate."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"momentum": 0.9})  # type: ignore[arg-type]


def test_an_optimizer_without_a_rate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """There would be nothing to govern: the start ends with the optimizer's name."""
    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", lambda _self, model: NoRate(model.parameters()))
    with pytest.raises(BrokenJobError, match=r"NoRate.*has no lr"):
        build_rig(settings("support.jobs:TinyJob"))


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_a_rate_that_is_none_is_told(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative or NaN learning rate of the job's optimizer is a mistake, told before anything is served."""

    def optimizer(_self: object, model: torch.nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        made.param_groups[0]["lr"] = rate
        return made

    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", optimizer)
    with pytest.raises((BrokenJobError, ConfigurationError), match="lr"):
        build_rig(settings("support.jobs:TinyJob"))


def test_a_warm_up_longer_than_the_run_is_a_configuration_error() -> None:
    """16 updates and a warm-up of 100 are impossible together, which is known once the data is."""
    wanted = settings("support.jobs:TinyJob", epochs=2).model_copy(
        update={"optimizer": OptimizerSettings(warmup_steps=100)}
    )
    with pytest.raises(ConfigurationError, match=r"warmup_steps.*100 is longer than the run of 16 steps"):
        build_rig(wanted)


def test_a_job_that_calls_exit_while_it_is_built_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.exit in a job's method is told with the method, not obeyed."""

    def leave(_self: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr("support.jobs.TinyJob.build_model", leave)
    with pytest.raises(BrokenJobError, match=r"build_model\(\) raised SystemExit: 7"):
        build_rig(settings("support.jobs:TinyJob"))
