from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from support.lane_driver import NoHeartbeat, built, driven
from tolaria.errors import BrokenJobError, ConfigurationError, EmptyDatasetError, StateMismatchError
from tolaria.lane.device import seed_everything
from tolaria.values.training import EpochProgress, Position


def test_the_first_forward_pass_has_no_lasting_effect() -> None:
    """Generators, buffers and the cursor are as if the forward pass had not been tried."""
    module = built(seed=3, options={"dropout": 0.5}).module
    after = torch.rand(4), np.random.rand(2), random.random()  # noqa: NPY002 - the global generators are tested
    seed_everything(3)
    module.job.build_model()
    expected = torch.rand(4), np.random.rand(2), random.random()  # noqa: NPY002
    assert torch.equal(after[0], expected[0])
    assert (after[1] == expected[1]).all()
    assert after[2] == expected[2]
    assert module.cursor.state_dict() == module.job.training_data().state_dict()
    assert module.model[1].num_batches_tracked.item() == 0  # type: ignore[index]


def test_the_same_seed_gives_the_same_model() -> None:
    """Generators are seeded before the model is built; another seed gives another model."""

    def first_weight(seed: int) -> torch.Tensor:
        return next(built(seed=seed).module.model.parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_an_empty_dataset_is_an_error() -> None:
    """Training data without a batch is reported with the job's name."""
    with pytest.raises(EmptyDatasetError, match=r"support\.jobs:TinyJob.*holds no batch"):
        built(options={"samples": 0})


@pytest.mark.parametrize(
    ("method", "made", "words"),
    [
        ("build_model", 3, r"build_model\(\) must return a Module, got a int"),
        ("build_optimizer", "sgd", r"build_optimizer\(\) must return a Optimizer, got a str"),
        ("training_data", [1, 2], r"training_data\(\) must return a BatchCursor, got a list"),
        ("build_model", ValueError("no weights"), r"build_model\(\) raised ValueError: no weights"),
        ("build_model", SystemExit(7), r"build_model\(\) raised SystemExit: 7"),
        ("losses", KeyError("labels"), r"losses\(\) raised KeyError: 'labels'"),
        ("evaluate", 3.0, r"evaluate\(\) must return an Evaluation, got a float"),
        ("evaluate", KeyError("y"), r"evaluate\(\) raised KeyError"),
        ("validation_batches", OSError("gone"), r"validation_batches\(\) raised OSError: gone"),
    ],
)
def test_a_failing_method_of_the_job_is_named(
    method: str, made: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the method, and what it raised or returned; sys.exit does not end the process."""

    def broken(*_args: object) -> object:
        if isinstance(made, BaseException):
            raise made
        return made

    monkeypatch.setattr(f"support.jobs.TinyJob.{method}", broken)
    with pytest.raises(BrokenJobError, match=words):
        built()


def test_missing_validation_data_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot be evaluated is rejected when the lane is built."""
    monkeypatch.setattr("support.jobs.TinyJob.validation_batches", lambda _self: [])
    with pytest.raises(EmptyDatasetError, match="validation data"):
        built()


def test_a_frozen_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without trainable parameters is rejected."""
    monkeypatch.setattr("support.jobs.TinyJob.build_model", lambda _self: torch.nn.Linear(4, 1).requires_grad_(False))
    with pytest.raises(BrokenJobError, match="no parameter that can be trained"):
        built()


class ExtraStateModel(torch.nn.Linear):
    """A model with state that is neither parameter nor buffer."""

    def get_extra_state(self) -> object:
        return {}


def test_a_model_with_extra_state_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """State that cannot be captured is found when the lane is built."""
    monkeypatch.setattr("support.jobs.TinyJob.build_model", lambda _self: ExtraStateModel(4, 1))
    with pytest.raises(BrokenJobError, match=r"cannot be rolled back.*extra state"):
        built()


def test_deterministic_runs_use_deterministic_kernels() -> None:
    """training.deterministic makes torch reject kernels that are not reproducible."""
    try:
        built(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(mode=False)


class NoLearningRate(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"momentum": 0.9})  # type: ignore[arg-type]


def test_an_optimizer_without_a_learning_rate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the optimizer."""
    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", lambda _self, model: NoLearningRate(model.parameters()))
    with pytest.raises(BrokenJobError, match=r"NoLearningRate.*has no lr"):
        built()


def test_an_optimizer_that_needs_closures_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """LBFGS evaluates the loss several times in a step, which merged gradients do not allow."""
    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", lambda _self, m: torch.optim.LBFGS(m.parameters()))
    with pytest.raises(BrokenJobError, match="LBFGS evaluates the loss several times"):
        built()


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_an_invalid_learning_rate_is_an_error(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative or NaN learning rate of the job's optimizer is rejected."""

    def optimizer(_self: object, model: torch.nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        made.param_groups[0]["lr"] = rate
        return made

    monkeypatch.setattr("support.jobs.TinyJob.build_optimizer", optimizer)
    with pytest.raises((BrokenJobError, ConfigurationError), match="lr"):
        built()


def test_a_warm_up_longer_than_the_run_is_a_configuration_error() -> None:
    """16 steps and a warm-up of 100 do not fit; the number of steps is known once the data is."""
    with pytest.raises(ConfigurationError, match=r"warmup_steps.*100 is longer than the run of 16 steps"):
        built(epochs=2, sections={"optimizer": {"warmup_steps": 100}})


def test_ready_describes_what_was_built() -> None:
    """Position, steps per epoch, fast paths and learning rates, before the first step."""
    ready = built().ready
    assert (ready.position, ready.progress, ready.steps_per_epoch) == (Position(0, 0), EpochProgress(), 8)
    assert (ready.device, ready.torch_version) == ("cpu", str(torch.__version__))
    assert ready.fast_paths["fused"] == "fused"
    assert ready.fast_paths["amp"] == "off: not wanted"
    assert ready.fast_paths_running == ("fused",)
    assert ready.learning_rates == {"host": 0.05}
    assert (ready.adjustments, ready.seeds, ready.fast_path_failures) == ((), (), ())


def test_resume_continues_where_an_image_was_captured(tmp_path: Path) -> None:
    """After `resume` the build reports the image's position, before its thread is started."""
    earlier = driven("SlotJob")
    earlier.train_to(11)
    with earlier.capture() as image:
        later = built("SlotJob", deterministic=True, options={"optimizer": "SGD"})
        restored = later.resume(image)
        assert restored.state_digest == restored.expected_digest == image.seal().total
    assert later.ready.position == Position(11, 2)
    assert later.ready.progress.batches == 3
    assert later.lane(NoHeartbeat(), tmp_path).close(0.1)  # it was never started


def test_an_image_that_does_not_fit_leaves_the_build_unchanged() -> None:
    """The image of another optimizer is rejected."""
    adam = driven(optimizer="Adam")
    adam.train_to(3)
    sgd = built("RandomisedJob", options={"optimizer": "SGD"})
    with adam.capture() as image, pytest.raises(StateMismatchError, match="optimizer"):
        sgd.resume(image)
    assert sgd.ready.position == Position(0, 0)
