"""Runs that are counted in steps, on streams and tables: positions, ends, restores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from support.lane_driver import DrivenLane, built, running
from tolaria.errors import BrokenJobError, ConfigurationError, StateMismatchError
from tolaria.lane.messages import EpochDone, RunEpoch

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own

STREAM = "support.data_jobs:StreamJob"
EVERY = 7
"""Steps in an epoch; a pass over 22 samples has six batches of four."""


def counted(stream: str, *, every: int = EVERY, steps: int = 60, accumulate: int = 1, **options: Any) -> DrivenLane:
    """A driven lane of a run that is counted in steps."""
    torch.set_num_threads(1)
    given = {"stream": stream, "samples": 22, **options}
    return DrivenLane(
        built(STREAM, deterministic=True, steps=steps, evaluate_every_steps=every, accumulate=accumulate, options=given)
    )


@pytest.mark.parametrize(
    ("stream", "accumulate"), [("loader", 1), ("loader", 3), ("dataset", 1), ("none", 1), ("table", 1)]
)
def test_every_position_is_restored_bit_for_bit(stream: str, accumulate: int) -> None:
    """Wherever a run goes back to, at ends of passes and of epochs too, it ends in the same state."""
    last = 10
    straight = counted(stream, accumulate=accumulate, noise=True)
    straight.train_to(last)
    expected = straight.digest
    back = counted(stream, accumulate=accumulate, noise=True)
    back.train_to(1)
    for step in range(1, 9):
        with back.capture() as image:
            back.train_to(step + 1)
            back.restore(step, image)
            back.train_to(step + 1)
    back.train_to(last)
    assert back.digest == expected
    assert back.module.progress.number == 2


def test_an_epoch_is_a_number_of_steps_whatever_a_pass_has() -> None:
    """Epochs have seven steps, the last one what is left; the lane trains no step beyond the run's."""
    lane = built(STREAM, steps=16, evaluate_every_steps=EVERY, options={"samples": 22})
    with running(lane) as run:
        for number in range(1, 4):
            run.send(RunEpoch(number))
            run.wait_for(EpochDone, number=number)
        ended = [epoch.global_step for epoch in run.all_of(EpochDone)]
    assert ended == [7, 14, 16]


@pytest.mark.parametrize("stream", ["loader", "dataset", "none"])
def test_a_stream_without_end_is_read_once(stream: str) -> None:
    """A thousand steps are an epoch unless the settings say otherwise; no sample comes twice."""
    lane = DrivenLane(built(STREAM, steps=5000, options={"stream": stream, "batch": 2}))
    assert lane.module.steps_per_epoch == 1000
    lane.train_to(20)
    data: Any = lane.module.job
    assert data.dataset.at == 40


def test_data_without_a_length_need_an_end() -> None:
    """Without steps the message names both ways to give the run a length."""
    with pytest.raises(BrokenJobError, match=r"no length: set training\.steps.*batches_per_epoch"):
        built(STREAM)


def test_positions_of_runs_that_are_counted_otherwise_are_refused() -> None:
    """A state of epochs does not fit a run with evaluate_every_steps, nor the other way round; nothing changes."""
    by_steps = counted("table")
    by_epochs = DrivenLane(built(STREAM, options={"stream": "table"}))
    for lane, other in ((by_steps, by_epochs), (by_epochs, by_steps)):
        other.train_to(3)
        before = lane.digest
        with other.capture() as image, pytest.raises(StateMismatchError, match=r"training\.evaluate_every_steps"):
            lane.restore(3, image)
        assert lane.digest == before


def test_the_length_of_epochs_may_change_between_processes() -> None:
    """A state goes on in epochs of another length."""
    one, other = counted("loader"), counted("loader", every=3)
    one.train_to(5)
    with one.capture() as image:
        other.restore(5, image)
    other.train_to(9)
    assert other.module.progress.number == 3
    assert other.module.progress.batches == 1


def test_a_job_may_leave_out_the_evaluation() -> None:
    """Then there are no figures; the best checkpoint needs a metric of training, which the message says."""
    job = "support.data_jobs:Unevaluated"
    training: dict[str, Any] = {"steps": 3, "evaluate_every_steps": 3}
    lane = built(job, **training)
    assert not lane.ready.evaluates
    with running(lane) as run:
        run.send(RunEpoch(1))
        assert run.wait_for(EpochDone).evaluation.figures() == {}
    for best in ("accuracy", "loss", "mae:min"):
        with pytest.raises(ConfigurationError, match=r"checkpoint\.best is .*training/loss:min"):
            built(job, sections={"checkpoint": {"best": best}}, **training)
    assert built(job, sections={"checkpoint": {"best": "training/loss:min"}}, **training).ready.evaluates is False


def test_evaluate_every_steps_needs_steps() -> None:
    """The message names both settings."""
    with pytest.raises(ValidationError, match=r"training\.evaluate_every_steps needs training\.steps"):
        built(STREAM, evaluate_every_steps=5, options={"stream": "table"})


def test_a_stream_without_state_says_what_resuming_costs() -> None:
    """One with state says nothing."""
    (note,) = built(STREAM, steps=5, options={"stream": "none"}).notes
    assert "reads the epoch again up to it (without a length: all that was read before)" in note
    for stream in ("loader", "dataset"):
        assert built(STREAM, steps=5, options={"stream": stream}).notes == ()


def test_more_steps_go_on_with_the_epoch_in_which_the_run_had_ended() -> None:
    """So that evaluations stay at multiples: the rest of the epoch comes first."""
    lane = built(STREAM, steps=10, evaluate_every_steps=EVERY, options={"samples": 22})
    with running(lane) as run:
        for number in (1, 2):
            run.send(RunEpoch(number))
        run.wait_for(EpochDone, number=2)
        place: Any = run.module.cursor.state_dict()
    assert place["index"] == 3
    more = DrivenLane(built(STREAM, steps=20, evaluate_every_steps=EVERY, options={"samples": 22}))
    more.module.cursor.load_state_dict(place)
    more.module.begin_epoch()
    assert [more.module.next_batch() is not None for _ in range(5)] == [True] * 4 + [False]
