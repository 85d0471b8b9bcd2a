from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from pydantic import JsonValue

from tolaria.errors import BrokenJobError
from tolaria.jobs import HOST, Batch, JobContext, PerSampleLosses, TrainingJob
from tolaria.jobs.digits import DigitsJob, digits


def test_the_data_is_what_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its file is read directly, which is quicker, or by its own function, where it keeps it elsewhere."""
    (direct,) = digits(JobContext(0, torch.device("cpu"))).validation_batches()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        (loaded,) = digits(JobContext(0, torch.device("cpu"))).validation_batches()
    for one, other in zip(direct.payload, loaded.payload, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_the_job_trains_and_evaluates_its_host() -> None:
    """Batches have images in 0 to 1, the loss is differentiable, and 360 images are evaluated."""
    job = digits(JobContext(0, torch.device("cpu")))
    assert isinstance(job, TrainingJob)
    model, cursor = job.build_model(), job.training_data()
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch is not None
    images = batch.payload[0]
    assert images.shape == (32, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() == 1
    losses = job.losses(model, batch)
    assert isinstance(losses, Mapping)
    losses[HOST].backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    assert all(p.grad is not None for p in model.parameters())
    (validation,) = job.validation_batches()
    assert validation.samples == 360
    with torch.no_grad():
        result = job.evaluate(model.eval(), validation)
    assert result.samples == 360
    assert 0 <= result.accuracy <= 1


def job_of(**options: JsonValue) -> DigitsJob:
    """The job with these options."""
    return digits(JobContext(0, torch.device("cpu"), options))


def epoch_of(job: DigitsJob, epoch: int) -> list[Batch]:
    """The batches of an epoch."""
    cursor, batches = job.training_data(), []
    cursor.begin_epoch(epoch)
    while (batch := cursor.next_batch()) is not None:
        batches.append(batch)
    return batches


def test_the_thumbnail_host_has_one_slot() -> None:
    """It is a linear classifier of 16 pixels."""
    job = job_of(host="thumbnail")
    model = job.build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 170
    losses = job.losses(model, epoch_of(job, 1)[0])
    assert isinstance(losses, Mapping)
    assert losses[HOST].shape == ()


def owners_in(job: DigitsJob, epoch: int) -> dict[tuple[float, ...], str]:
    """The owner of each image in an epoch."""
    owners: dict[tuple[float, ...], str] = {}
    for batch in epoch_of(job, epoch):
        images = map(tuple, batch.payload[0].flatten(1).tolist())
        owners |= dict(zip(images, batch.seed_ids or (), strict=True))
    return owners


def test_images_belong_in_turn_to_the_seeds() -> None:
    """Each seed has its share of the images, and all of them over as many epochs; losses are by image."""
    job = job_of(host="thumbnail", seed_sources=3)
    batches = epoch_of(job, 1)
    assert Counter(seed for batch in batches for seed in batch.seed_ids or ()) == {
        "seed-1": 479,
        "seed-2": 479,
        "seed-3": 479,
    }
    losses = job.losses(job.build_model(), batches[0])
    assert isinstance(losses, PerSampleLosses)
    assert losses.values.shape == (32,)
    by_epoch = [owners_in(job, epoch) for epoch in (1, 2, 3, 4)]
    assert by_epoch[0] == by_epoch[3]
    assert all({owners[image] for owners in by_epoch} == {"seed-1", "seed-2", "seed-3"} for image in by_epoch[0])
    assert epoch_of(job_of(), 1)[0].seed_ids is None


@pytest.mark.parametrize("kind", ["huge", "nan"])
def test_a_shard_is_corrupt_in_one_epoch(kind: str) -> None:
    """Two batches are corrupt in the chosen epoch, at the same places whenever they are read."""
    job = job_of(poison_epoch=2, poison=kind)
    for epoch, corrupt in [(1, []), (2, [20, 21]), (3, [])]:
        maxima = [float(batch.payload[0].max()) for batch in epoch_of(job, epoch)]
        assert [place for place, maximum in enumerate(maxima) if not maximum <= 1] == corrupt
    cursor = job.training_data()
    cursor.load_state_dict({"epoch": 2, "index": 21, "batch_size": 32, "seed": 0})
    batch = cursor.next_batch()
    assert batch is not None
    assert not batch.payload[0].max() <= 1


def test_wrong_options_are_named() -> None:
    """The error names the option."""
    with pytest.raises(BrokenJobError, match=r"training\.options\.host"):
        job_of(host="enormous")
