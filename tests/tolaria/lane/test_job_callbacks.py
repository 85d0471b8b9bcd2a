"""Callbacks of a job: what they are told, what becomes of their state, and of those that raise."""

from __future__ import annotations

import math
from typing import cast

import pytest

from support.lane_driver import RunningLane, built, running
from support.practice_jobs import Called
from tolaria.errors import BrokenJobError
from tolaria.images import Lease
from tolaria.lane.messages import CaptureImage, EpochDone, ImageCaptured, LaneEnded, Restore, RunEpoch

JOB = "support.practice_jobs:Called"


def captured(run: RunningLane) -> Lease:
    """The state now."""
    result = run.done(run.send(CaptureImage(beside=True))).result
    assert isinstance(result, ImageCaptured)
    return run.lane.images.take(result.image_id)


@pytest.fixture(scope="module")
def told() -> tuple[Called, list[str]]:
    """A job whose run was rolled back after its second epoch to the end of the first, and the digests of epoch 2."""
    lane = built(JOB, deterministic=True, options={"nan_calls": [4]})
    job, digests = cast("Called", lane.module.job), []
    with running(lane) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        first = captured(run)
        for turn in (2, 3):
            run.send(RunEpoch(turn))
            run.wait_for(EpochDone, number=turn)
            with captured(run) as image:
                digests.append(image.seal().total)
            if turn == 2:
                assert run.done(run.send(Restore(0, math.inf, run.lane.images.put(first)))).failure is None
    return job, digests


def test_every_hook_is_called_in_its_place(told: tuple[Called, list[str]]) -> None:
    """With the step and the epoch; the context knows them, too. Seven of eight steps of the first epoch are taken."""
    seen = told[0].recorder.seen
    assert [entry for entry in seen if entry[0] != "step"] == [
        ("begin", 0, 0),
        ("evaluate", 1, ["accuracy", "loss"]),
        ("epoch", 1, seen[9][2]),
        ("evaluate", 2, ["accuracy", "loss"]),
        ("epoch", 2, seen[19][2]),
        ("rollback", 15, 7),
        ("evaluate", 2, ["accuracy", "loss"]),
        ("epoch", 2, seen[30][2]),
        ("end", 15, {"host": 0.01}),
    ]
    assert [entry[1:] for entry in seen if entry[0] == "step"] == [
        (step, step) for step in [*range(1, 16), *range(8, 16)]
    ]
    assert told[0].plain.steps == 23


def test_state_is_that_of_the_training(told: tuple[Called, list[str]]) -> None:
    """A rollback restores it, by the digest; what on_rollback changes in it is undone, without state stays."""
    job, digests = told
    assert digests[0] == digests[1]
    assert job.recorder.counts == {"begun": 1, "steps": 15, "epochs": 2, "evaluations": 2, "rollbacks": 0}


def test_another_process_goes_on_from_the_state() -> None:
    """on_train_begin is called there too, and what it changes in the state is undone, and in the random numbers."""
    digests = []
    first = built(JOB, deterministic=True)
    with running(first) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        image = captured(run)
        run.send(RunEpoch(2))
        run.wait_for(EpochDone, number=2)
        with captured(run) as end:
            digests.append(end.seal().total)
    later = built(JOB, deterministic=True)
    with image as state:
        later.resume(state)
    with running(later) as run:
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        with captured(run) as end:
            digests.append(end.seal().total)
    job = cast("Called", later.module.job)
    assert job.recorder.seen[0] == ("begin", 8, 1)
    assert job.recorder.counts["begun"] == 1
    assert digests[0] == digests[1]


def test_one_that_raises_ends_the_lane_with_its_name_and_place() -> None:
    """As all code of the job's."""
    with running(built(JOB, options={"raises": 3})) as run:
        run.send(RunEpoch(1))
        failure = run.wait_for(LaneEnded).failure
    assert failure is not None
    text = str(failure)
    assert "the callback Recorder: on_step_end() raised ValueError: cannot log step 3 (practice_jobs.py, line" in text


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ("Misspelled", "Misspelled.on_step_ended is not called: there are on_train_begin, on_step_end"),
        ("text", r"callbacks\(\) must return a list of callbacks, got a str"),
        ("number", "a int has no method that is called"),
        ("half", "Half has only one of state_dict and load_state_dict"),
        ("raising", r"callbacks\(\) raised OSError: no such file"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: str, words: str) -> None:
    """At the start, with what there is."""
    with pytest.raises(BrokenJobError, match=words):
        built(JOB, options={"callbacks": callbacks})


def test_the_context_knows_the_run() -> None:
    """Before anything is built, the name; then the length of the run and the model."""
    lane = built(JOB, run_name="night", epochs=3)
    context = cast("Called", lane.module.job).context
    lane.name_run("abc")
    assert (context.run_id, context.run_name, context.rank, context.world_size) == ("abc", "night", 0, 1)
    assert (context.step, context.epoch, context.steps_per_epoch, context.total_steps) == (0, 0, 8, 24)
    assert context.run.model is lane.module.model
    assert context.state_dir.name == "state"
