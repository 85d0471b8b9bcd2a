"""Jobs with a DataLoader or with state, rolled back and resumed at any place: as if they had never left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from support.lane_driver import DrivenLane, proceed
from tolaria.config import Settings, TrainingSettings
from tolaria.errors import BrokenJobError, StateMismatchError
from tolaria.images import StateImage
from tolaria.jobs import JobContext, build_job
from tolaria.lane.build import build
from tolaria.lane.step import StepAbandonedError, train_step

LOADER = {"noise": 1, "samples": 40, "batch": 4}
JOBS = [
    ("Loader", LOADER),
    ("Loader", LOADER | {"workers": 2}),
    ("Loader", LOADER | {"workers": 2, "persistent": True}),
    ("Average", {"samples": 40, "batch": 4}),
]
EVERY_JOB = pytest.mark.parametrize(("job", "options"), JOBS, ids=["loader", "workers", "persistent", "state"])


@contextmanager
def lane(job: str, options: dict[str, object], accumulate: int = 1) -> Iterator[DrivenLane]:
    """A lane of one of the users' jobs; its workers end with the block."""
    torch.set_num_threads(1)
    training = TrainingSettings.model_validate(
        {
            "job": f"support.user_jobs:{job}", "options": options, "device": "cpu", "threads": 1,
            "deterministic": True, "accumulate": accumulate,
        }
    )  # fmt: skip
    driven = DrivenLane(build(Settings(training=training)))
    try:
        yield driven
    finally:
        driven.module.close_data()


@EVERY_JOB
def test_a_rollback_and_a_resume_in_an_epoch_leave_no_trace(job: str, options: dict[str, object]) -> None:
    """Losses and final digest equal those of a run that never left, in the same process and in a new one."""
    with lane(job, options) as straight:
        straight.train_to(24)
        expected = straight.digest
    with lane(job, options) as left:
        left.train_to(13)
        left.snapshot()
        image = left.snapshots.state.copy()
        left.train_to(17)
        back = left.restore(13)
        assert back.state_digest == back.expected_digest
        left.train_to(24)
        assert left.losses == straight.losses
        assert left.digest == expected
    with lane(job, options) as resumed:
        back = resumed.snapshots.restore_image(image)
        assert back.state_digest == back.expected_digest
        resumed.train_to(24)
        assert resumed.losses == {step: loss for step, loss in straight.losses.items() if step > 13}
        assert resumed.digest == expected


@EVERY_JOB
def test_a_step_abandoned_between_microbatches_starts_again(job: str, options: dict[str, object]) -> None:
    """Data, generators and the job's state are those before its first microbatch."""
    with lane(job, options, accumulate=3) as straight:
        straight.train_to(6)
        expected = straight.digest
    with lane(job, options, accumulate=3) as left:
        left.train_to(2)
        calls = iter([True, False])
        with pytest.raises(StepAbandonedError):
            train_step(left.module, lambda: next(calls))
        left.train_to(6)
        assert left.losses == straight.losses
        assert left.digest == expected


def test_the_state_of_a_job_is_covered_by_the_digest() -> None:
    """Its tensors and its other values."""
    with lane("Average", {}) as driven:
        job = driven.module.job
        driven.train_to(2)
        before = driven.digest
        job.average["0.bias"][0] += 1  # type: ignore[attr-defined]
        changed = driven.digest
        job.average["0.bias"][0] -= 1  # type: ignore[attr-defined]
        job.calls += 1  # type: ignore[attr-defined]
        assert len({before, changed, driven.digest}) == 3


def test_a_restored_state_belongs_to_the_job() -> None:
    """A job that keeps the tensors that it gets changes neither the snapshot nor its own copy in the next restore."""
    with lane("Average", {}) as driven:
        driven.train_to(3)
        driven.snapshot()
        for _ in range(2):
            driven.train_to(9)
            back = driven.restore(3)
            assert back.state_digest == back.expected_digest


def without_job(image: StateImage) -> StateImage:
    """The image as a version would have captured it that knows no state of jobs, with data of unknown length."""
    values = json.loads(image.values)
    del values["parts"]["job"]
    del values["parts"]["cursor"]["samples"]
    specs = tuple(spec for spec in image.specs if not spec.name.startswith("parts/job/"))
    buffers = {spec.name: image.buffers[spec.name] for spec in specs}
    text = json.dumps(values, separators=(",", ":"), sort_keys=True).encode()
    return StateImage(image.position, specs, buffers, text)


def test_a_checkpoint_from_before_the_job_had_state_is_restored() -> None:
    """The rest is restored and proven; the job keeps its state."""
    with lane("Average", {}) as driven:
        driven.train_to(3)
        image = without_job(driven.snapshots.state.copy())
        driven.train_to(5)
        calls = driven.module.job.calls  # type: ignore[attr-defined]
        back = driven.snapshots.restore_image(image)
        assert back.state_digest == back.expected_digest
        assert (driven.module.global_step, driven.module.job.calls) == (3, calls)  # type: ignore[attr-defined]
        assert train_step(driven.module, proceed) is not None


def test_a_checkpoint_of_a_job_with_state_is_refused_without_it() -> None:
    """The state would be lost."""
    with lane("Average", {}) as stateful, lane("Line", {}) as plain:
        image = stateful.snapshots.state.copy()
        with pytest.raises(StateMismatchError, match="parts/job: in the image only"):
            plain.snapshots.restore_image(image)


@pytest.mark.parametrize(("change", "lengths"), [(48, "samples 40; this cursor has 48"), (36, "has 36")])
@pytest.mark.parametrize("job", ["Loader", "Line"])
def test_a_data_set_of_another_length_is_refused(job: str, change: int, lengths: str) -> None:
    """With both lengths, and without a change of the live state."""
    with lane(job, {"samples": 40}) as before, lane(job, {"samples": change}) as after:
        before.train_to(2)
        digest = after.digest
        with pytest.raises(StateMismatchError, match=lengths):
            after.snapshots.restore_image(before.snapshots.state.copy())
        assert after.digest == digest


def test_half_a_state_is_refused() -> None:
    """A job needs both methods."""
    context = JobContext(0, torch.device("cpu"))
    with pytest.raises(BrokenJobError, match="state_dict and load_state_dict need each other"):
        build_job("support.jobs:HalfStateJob", context)
