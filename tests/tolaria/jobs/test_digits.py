from __future__ import annotations

import torch

from tolaria.jobs import HOST, JobContext, TrainingJob
from tolaria.jobs.digits import digits


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
    loss = job.losses(model, batch)[HOST]
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    assert all(p.grad is not None for p in model.parameters())
    (validation,) = job.validation_batches()
    assert validation.samples == 360
    with torch.no_grad():
        result = job.evaluate(model.eval(), validation)
    assert result.samples == 360
    assert 0 <= result.accuracy <= 1
