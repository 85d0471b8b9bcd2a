from __future__ import annotations

import torch

from tolaria.jobs import HOST, Evaluation, JobContext, TrainingJob
from tolaria.jobs.digits import digits


def test_the_job_has_real_images_and_a_host_that_fits_them() -> None:
    """1437 images train, 360 other ones validate, and the host gives a loss that can be trained on."""
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


def test_evaluations_add_up() -> None:
    """Sums are added, means are taken at the end."""
    total = Evaluation(6.0, 1, 2) + Evaluation(2.0, 1, 2)
    assert (total.loss, total.accuracy) == (2.0, 0.5)
    assert Evaluation(0.0, 0, 0).accuracy == 0
