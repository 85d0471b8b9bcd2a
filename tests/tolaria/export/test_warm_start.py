from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from support.exported import Trained, outputs, trained
from tolaria.checkpoint.directory import CHECKPOINTS
from tolaria.config import Settings, TrainingSettings
from tolaria.errors import ConfigurationError
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.order import RestorePlan


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A transformer with tied weights that has been trained without seeds."""
    return trained(tmp_path_factory.mktemp("plain") / "state", "support.export_jobs:TokensJob")


def new_lane(init_from: Path, job: str = "support.export_jobs:TokensJob") -> BuiltLane:
    """A built lane of a new run."""
    training = TrainingSettings(job=job, device="cpu", threads=1, seed=5, init_from=str(init_from))
    return build(Settings(training=training))


def model_of(lane: BuiltLane) -> nn.Module:
    """The model of a lane."""
    return lane.module.model


def test_a_new_run_starts_with_the_values_of_an_export_or_a_checkpoint(plain: Trained, tmp_path: Path) -> None:
    """Outputs are those of the trained model; the optimizer, the place in the data and the step are new."""
    plain.export(tmp_path / "out")
    places = (tmp_path / "out", plain.directory, plain.directory / CHECKPOINTS / plain.checkpoint_id)
    for place in places:
        lane = new_lane(place)
        assert not torch.equal(outputs(plain.job, model_of(lane)), outputs(plain.job, plain.model))
        lane.start_from(RestorePlan(), None)
        assert torch.equal(outputs(plain.job, model_of(lane)), outputs(plain.job, plain.model))
        assert "the model starts with the values of" in lane.ready.notes[-1]
        assert (lane.module.global_step, lane.module.progress.number, dict(lane.module.optimizer.state)) == (0, 0, {})


def test_a_resumed_run_has_its_own_values(plain: Trained, tmp_path: Path) -> None:
    """What it was first given may be gone by then."""
    lane = new_lane(tmp_path / "gone")
    image = lane.snapshots.state.copy()
    image.seal()
    lane.start_from(RestorePlan(), image)
    assert not any("the model starts" in note for note in lane.ready.notes)


def test_what_does_not_fit_is_named(plain: Trained, gpt: Trained, tmp_path: Path) -> None:
    """Another model, seeds that a new run cannot take over, changed bytes, and what is no model at all."""
    with pytest.raises(ConfigurationError, match=r"training\.init_from: .* does not fit the model: it lacks 0\.weight"):
        new_lane(plain.directory, "support.export_jobs:ImagesJob").begin_run()
    with pytest.raises(ConfigurationError, match=r"training\.init_from: .* has seeds \(seed-0\)"):
        new_lane(gpt.directory).begin_run()
    plain.export(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for place, message in ((tmp_path / "out", "is not what was written"), (tmp_path / "gone", "is neither an export")):
        with pytest.raises(ConfigurationError, match=rf"training\.init_from: .*{message}"):
            new_lane(place).begin_run()
