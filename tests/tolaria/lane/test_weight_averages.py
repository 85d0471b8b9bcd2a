"""The moving average of the weights: torch's, followed through seeds, rollbacks and skipped steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.lane_driver import DrivenLane, built, driven, running
from tolaria.config import EmaSettings
from tolaria.errors import StateMismatchError
from tolaria.lane.messages import CaptureImage, EpochDone, ImageCaptured, ReconcileSeeds, RunEpoch

LINE = "support.user_jobs:Line"
IMAGES = "support.export_jobs:ImagesJob"


def averaged(job: str = LINE, decay: float = 0.9, buffers: str = "copy", **options: Any) -> DrivenLane:
    """A driven lane whose weights are averaged."""
    settings = EmaSettings.model_validate({"decay": decay, "buffers": buffers})
    return driven(job, sections={"ema": settings}, **options)


def averages_of(lane: DrivenLane) -> Mapping[str, Tensor]:
    """Copies of the averages by name."""
    assert lane.module.averages is not None
    return {name: tensor.clone() for name, tensor in lane.module.averages.state_dict()["tensors"].items()}


def wish(*stages: int) -> ReconcileSeeds:
    """The wish for a seed in that stage, or for none."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=4, duration_steps=4)
    return ReconcileSeeds(
        tuple(
            SeedState(seed_id="a", stage=stage, blueprint_id="residual_mlp", slot="s", alpha=alpha)  # type: ignore[arg-type]
            for stage in stages
        )
    )


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_it_is_torchs_average_to_the_last_bit(buffers: str) -> None:
    """Beside the same training, of a network with batch statistics: of weights, and of its buffers if asked for."""
    lane = averaged(IMAGES, buffers=buffers)
    make: Any = get_ema_multi_avg_fn
    theirs = AveragedModel(lane.module.model, multi_avg_fn=make(0.9), use_buffers=buffers == "average")
    for step in range(1, 8):
        lane.train_to(step)
        theirs.update_parameters(lane.module.model)
        assert lane.module.averages is not None
        with lane.module.averages.in_model():
            for (name, ours), (_, other) in zip(
                [*lane.module.model.named_parameters(), *lane.module.model.named_buffers()],
                [*theirs.module.named_parameters(), *theirs.module.named_buffers()],
                strict=True,
            ):
                assert torch.equal(ours, other) or not ours.is_floating_point(), name


def test_a_rollback_and_another_process_continue_it() -> None:
    """Bit for bit, by the digest that covers it."""
    lane = averaged()
    lane.train_to(5)
    with lane.capture() as image:
        lane.train_to(20)
        end, averages = lane.digest, averages_of(lane)
        assert lane.restore(5).state_digest == image.seal().total
        lane.train_to(20)
        assert lane.digest == end
        other = averaged()
        other.restore(5, image)
        other.train_to(20)
    assert other.digest == end
    assert all(torch.equal(tensor, averages[name]) for name, tensor in averages_of(other).items())


def test_a_skipped_step_does_not_move_it() -> None:
    """It is an average over updates."""
    lane = averaged(nan_calls=[4])
    lane.train_to(2)
    before = averages_of(lane)
    module = lane.module
    from tolaria.lane.step import train_step

    step = train_step(module, lambda: True)
    assert step is not None
    assert step.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in averages_of(lane).items())


def test_it_follows_seeds() -> None:
    """The average of a seed begins with its values at the graft, goes with it, and begins anew with the next one."""
    lane = averaged()
    lane.train_to(4, {2: wish(SEED_STAGE_TRAINING)})
    own = {name for name in averages_of(lane) if ".seeds.a." in name}
    assert own
    with lane.capture() as image:
        lane.train_to(12, {4: wish(SEED_STAGE_BLENDING)})
        end = lane.digest
        lane.execute(wish())
        lane.module.refresh()
        lane.train_to(130)  # faded out and removed
        assert not {name for name in averages_of(lane) if ".seeds.a." in name}
        assert lane.execute(wish(SEED_STAGE_TRAINING)).failure is None
        live = dict(lane.module.model.named_parameters())
        assert all(torch.equal(live[name], tensor) for name, tensor in averages_of(lane).items() if name in own)
        lane.restore(4, image)
        lane.train_to(12, {4: wish(SEED_STAGE_BLENDING)})
    assert lane.digest == end


def test_a_parameter_that_is_trained_later_joins() -> None:
    """With its values then; one that is frozen stays. What is never trained costs no memory and is the model's own."""
    lane = averaged("support.practice_jobs:Frozen")
    assert sorted(averages_of(lane)) == ["3.bias", "3.weight"]
    lane.train_to(3)
    first = dict(lane.module.model.named_parameters())["0.weight"].requires_grad_(True)
    lane.module.look_up_parameters()
    assert torch.equal(averages_of(lane)["0.weight"], first)
    first.requires_grad_(False)
    lane.module.look_up_parameters()
    assert sorted(averages_of(lane)) == ["0.weight", "3.bias", "3.weight"]


def test_it_is_evaluated_beside_the_model_which_it_leaves_alone() -> None:
    """The state after an epoch is that without the second evaluation."""
    digests, figures = [], []
    for evaluate in (False, True):
        settings = EmaSettings(decay=0.9, evaluate=evaluate)
        with running(built(LINE, sections={"ema": settings}, deterministic=True)) as run:
            run.send(RunEpoch(1))
            figures.append(run.wait_for(EpochDone).evaluation.figures())
            captured = run.done(run.send(CaptureImage())).result
            assert isinstance(captured, ImageCaptured)
            with run.lane.images.take(captured.image_id) as image:
                digests.append(image.seal().total)
    assert digests[0] == digests[1]
    assert figures[1] == figures[0] | {name: figures[1][name] for name in ("ema/loss", "ema/accuracy")}
    assert figures[1]["ema/loss"] > figures[1]["loss"]


def test_a_state_without_an_average_begins_one_with_its_weights() -> None:
    """As of a run that is resumed with ema.decay set."""
    plain, lane = driven(LINE), averaged()
    plain.train_to(6)
    lane.train_to(3)
    with plain.capture() as image:
        lane.restore(6, image)
    live = dict(lane.module.model.named_parameters())
    assert all(torch.equal(live[name], tensor) for name, tensor in averages_of(lane).items())
    lane.train_to(9)
    plain.train_to(9)
    assert plain.losses[9] == lane.losses[9]


def test_a_state_with_an_average_needs_one() -> None:
    """It would be lost unnoticed."""
    lane, plain = averaged(), driven(LINE)
    lane.train_to(2)
    with lane.capture() as image, pytest.raises(StateMismatchError, match="ema"):
        plain.restore(2, image)
