from __future__ import annotations

import json
import math

import pytest

from tolaria.values.evaluation import Evaluation
from tolaria.values.training import EpochProgress


def test_progress_counts_steps_and_ignores_the_loss_of_skipped_ones() -> None:
    """A skipped step counts its samples and itself; the mean loss is over the other steps."""
    progress = EpochProgress().begun(3)
    assert (progress.number, progress.over, math.isnan(progress.loss)) == (3, False, True)
    progress = progress.after_batch().after_step(2.0, 8, skipped=False)
    progress = progress.after_batch().after_step(math.nan, 8, skipped=True)
    progress = progress.after_batch().after_step(4.0, 4, skipped=False).ended()
    assert progress == EpochProgress(3, over=True, batches=3, steps=2, skipped_steps=1, samples=20, loss_sum=6.0)
    assert progress.loss == 3.0


def test_a_new_epoch_starts_from_zero() -> None:
    """`begun` keeps nothing of the epoch before."""
    last = EpochProgress(1, over=True, batches=8, steps=7, skipped_steps=1, samples=64, loss_sum=3.5)
    assert last.begun(2) == EpochProgress(2, over=False)


def test_progress_survives_json_under_the_keys_of_the_saved_state() -> None:
    """The keys are those of earlier versions; a missing one raises KeyError."""
    progress = EpochProgress(4, over=False, batches=9, steps=7, skipped_steps=1, samples=64, loss_sum=3.5)
    saved = json.loads(json.dumps(progress.to_json()))
    assert list(saved) == ["number", "over", "batches", "steps", "void_steps", "samples", "loss_sum"]
    assert EpochProgress.from_json(saved) == progress
    del saved["loss_sum"]
    with pytest.raises(KeyError, match="loss_sum"):
        EpochProgress.from_json(saved)


def test_evaluations_add_up() -> None:
    """Sums are added; means are over all samples and defined without any."""
    total = Evaluation(6.0, 3, 4) + Evaluation(2.0, 1, 4)
    assert (total, total.loss, total.accuracy) == (Evaluation(8.0, 4, 8), 1.0, 0.5)
    empty = Evaluation(0.0, 0, 0)
    assert (math.isnan(empty.loss), empty.accuracy) == (True, 0.0)
