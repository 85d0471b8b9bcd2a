from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import HardwareContext
from support.runs import FakePeers, RunUnderTest, new_run, running, train_to
from tolaria.lane.messages import EpochDone
from tolaria.rollback.protocol import Rollback
from tolaria.status_page.curves import GROUPS_MAX, CurveSet
from tolaria.status_page.history import PageHistory, last_common_step
from tolaria.status_page.seed_timeline import SEEDS_MAX, STAGES_MAX, SeedTimeline
from tolaria.values.evaluation import Evaluation
from tolaria.values.lineage import Lineage
from tolaria.values.training import Position

pytestmark = pytest.mark.anyio
AUTO, FULL = enums.ROLLBACK_TIER_UNSPECIFIED, enums.ROLLBACK_TIER_FULL


def stepped() -> RunUnderTest:
    """A run that makes a step for each pass that the test releases."""
    sections: dict[str, object] = {
        "rollback": {"automatic": False, "every_steps": 2, "fast_budget_s": 20.0, "full_budget_s": 30.0},
        "checkpoint": {"every_epochs": 10**6, "keep_superseded": 5},
    }
    return new_run(FakePeers(), job="GatedJob", sections=sections, epochs=10**6)


async def stop(run: RunUnderTest) -> None:
    """Ends the run, which may be within a step."""
    run.job.passes.release(100)
    await run.run.stop("enough")


def seed(seed_id: str, stage: enums.SeedLifecycleStage.ValueType, alpha: AlphaSchedule | None = None) -> SeedState:
    """A seed in the model."""
    return SeedState(seed_id=seed_id, stage=stage, slot="s", blueprint_id="b", alpha=alpha, metrics={"alpha": 0.0})


async def test_a_run_has_curves_and_a_rollback_cuts_them() -> None:
    """Losses of all steps; after a rollback those up to the restored step, a mark, and the new ones."""
    run = stepped()
    history = run.core.history
    async with running(run):
        await train_to(run, 9)
        assert [point.first for point in history.curves["loss"].points] == list(range(1, 10))
        done = await run.run.roll_back(Rollback(AUTO, 4, "look", "operator"))
        assert history.curves["loss"].points[-1].last == done.restored_step <= 4
        (mark,) = history.marks
        assert (mark.kind, mark.left_step, mark.restored_step) == ("rollback", 9, done.restored_step)
        assert mark.reason == "operator: look"
        await train_to(run, 6)
        assert [point.first for point in history.curves["loss"].points] == list(range(1, 7))
        await stop(run)


async def test_the_curves_of_earlier_processes_go_on_where_the_run_is_resumed() -> None:
    """What they have beyond that step is removed, and the charts begin with them."""
    run, earlier = new_run(FakePeers(), epochs=1), CurveSet()
    for step in range(3, 9):
        earlier.add("loss", step, 1.0)
    history = PageHistory(run.status, run.core.foundation.points, earlier=earlier)
    assert run.core.ready is not None
    history.on_ready(replace(run.core.ready, position=Position(6, 1)))
    assert [point.first for point in history.curves["loss"].points] == [3, 4, 5, 6]
    assert history.first_step == 2


async def test_an_epoch_without_an_evaluation_has_no_point() -> None:
    """The run goes on."""
    run = new_run(FakePeers(), epochs=3)
    history = run.core.history
    epoch = EpochDone(1, 8, Evaluation.of_sets({}), 1.0, 0.0, {}, 0.0, HardwareContext())
    history.on_epoch(epoch, show_layers=True)
    assert not history.curves["validation_loss"].points
    history.on_epoch(replace(epoch, evaluation=Evaluation(4.0, 1, 2)), show_layers=True)
    assert len(history.curves["validation_loss"].points) == 1


async def test_a_rollback_to_a_branch_that_was_left_removes_what_it_did_not_pass() -> None:
    """Steps of the attempt in between do not lead to the restored state."""
    run = stepped()
    history = run.core.history
    async with running(run):
        await train_to(run, 9)
        first = await run.run.roll_back(Rollback(AUTO, 4, "look", "operator"))
        await train_to(run, 7)
        back = Rollback(FULL, None, "undo", "operator", checkpoint_id=first.left_checkpoint_id)
        assert (await run.run.roll_back(back)).restored_step == 9
        assert history.curves["loss"].points[-1].last == first.restored_step
        await train_to(run, 10)
        steps = [point.first for point in history.curves["loss"].points]
        assert steps == [*range(1, first.restored_step + 1), 10]
        assert len(history.marks) == 2
        await stop(run)


@pytest.mark.parametrize(
    ("one", "other", "step", "common"),
    [
        (Lineage(), Lineage().back_to(50, 2), 50, 50),
        (Lineage().back_to(50, 2), Lineage(), 90, 50),
        (Lineage().back_to(50, 2), Lineage().back_to(30, 3), 30, 30),
        (Lineage().back_to(50, 2).back_to(70, 3), Lineage().back_to(50, 2), 80, 70),
        (Lineage(2), Lineage(1), 10, 0),
    ],
)
async def test_the_last_common_step(one: Lineage, other: Lineage, step: int, common: int) -> None:
    """Of a state and one that it went back to, directly or to another branch."""
    assert last_common_step(one, other, step) == common


async def test_the_rates_of_a_few_groups_have_curves() -> None:
    """A job may have any number of groups."""
    run = new_run(FakePeers(), epochs=1)
    run.core.history.on_learning_rates({f"host/{number}": 0.1 for number in range(50)})
    assert sum(name.startswith("rate/") for name in run.core.history.curves) == GROUPS_MAX
    await anyio.lowlevel.checkpoint()


# -- seeds -----------------------------------------------------------------------------------------------------------


async def test_the_stages_of_a_seed_are_spans_of_steps() -> None:
    """Repeated states begin none; a seed that is gone has an end; alpha follows its schedule."""
    timeline = SeedTimeline()
    ramp = AlphaSchedule(start=0.0, end=1.0, begin_step=20, duration_steps=10)
    timeline.update([seed("a", enums.SEED_STAGE_TRAINING)], 10)
    timeline.update([seed("a", enums.SEED_STAGE_TRAINING)], 15)
    timeline.update([seed("a", enums.SEED_STAGE_BLENDING, ramp)], 20)
    timeline.advance(25)
    track = timeline.tracks["a"]
    assert [(span.stage, span.begin, span.end) for span in track.spans] == [
        ("training", 10, 20),
        ("blending", 20, None),
    ]
    assert track.alpha.points[-1].mean == pytest.approx(0.5)
    timeline.update([], 30)
    assert track.spans[-1].end == 30
    assert track.state is None


async def test_a_rollback_takes_stages_back() -> None:
    """A seed that had not appeared by then is forgotten, one that had ended goes on."""
    timeline = SeedTimeline()
    timeline.update([seed("a", enums.SEED_STAGE_TRAINING)], 10)
    timeline.update([seed("a", enums.SEED_STAGE_BLENDING), seed("b", enums.SEED_STAGE_TRAINING)], 20)
    timeline.update([], 30)
    timeline.rewind(15)
    timeline.update([seed("a", enums.SEED_STAGE_TRAINING)], 15)
    assert list(timeline.tracks) == ["a"]
    assert [(span.stage, span.begin, span.end) for span in timeline.tracks["a"].spans] == [("training", 10, None)]


async def test_seeds_and_their_stages_are_bounded() -> None:
    """Those that have been gone for the longest time are forgotten first, whatever controllers do."""
    timeline = SeedTimeline()
    for number in range(3 * SEEDS_MAX):
        timeline.update(
            [seed("kept", enums.SEED_STAGE_TRAINING), seed(f"s{number}", enums.SEED_STAGE_TRAINING)], number
        )
    assert len(timeline.tracks) == SEEDS_MAX
    assert {"kept", f"s{3 * SEEDS_MAX - 1}"} <= timeline.tracks.keys()
    for number in range(3 * STAGES_MAX):
        stage = enums.SEED_STAGE_TRAINING if number % 2 else enums.SEED_STAGE_BLENDING
        timeline.update([seed("kept", stage)], 1000 + number)
    assert len(timeline.tracks["kept"].spans) == STAGES_MAX
    timeline.update([seed(f"new{number}", enums.SEED_STAGE_TRAINING) for number in range(3 * SEEDS_MAX)], 2000)
    assert len(timeline.tracks) == SEEDS_MAX
