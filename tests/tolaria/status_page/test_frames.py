from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from leyline.v1 import enums_pb2 as enums
from leyline.v1.seeds_pb2 import SeedState
from support.runs import FakePeers, new_run
from tolaria.images import SnapshotInfo
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.lane.messages import StepDone
from tolaria.status_page.curves import Curve
from tolaria.status_page.frames import FRAMES_MAX, Frames
from tolaria.status_page.sections import ROWS_MAX, JournalRows, Sections
from tolaria.values.training import Position, RankInfo

MARKUP = "<script>alert(1)</script>"
BLOCKED_S = 0.005
pytestmark = pytest.mark.anyio


class Page:
    """Frames of a few sections, and what a viewer makes of them."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sections: dict[str, Any] = {"state": {"step": 0}, "run": {"name": MARKUP}}
        self.curves = {"loss": Curve()}
        builders = {"state": lambda: self.sections["state"], "run": lambda: self.sections["run"]}
        self.frames = Frames(builders, self.curves, clock=lambda: self.now_s)

    async def tick(self, step: int) -> None:
        """A second passes in which a step is done."""
        self.now_s += 1.0
        self.sections["state"] = {"step": step}
        self.curves["loss"].add(step, step / 2)
        await self.frames.refresh()


def events(sent: bytes) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, id and data of each event."""
    found = []
    for block in sent.decode().strip().split("\n\n"):
        kind, number, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append((kind, number, json.loads(data)))
    return found


async def test_a_frame_has_what_has_changed() -> None:
    """Sections that have not are not sent again; of a curve only new points are."""
    page = Page()
    await page.tick(1)
    await page.tick(2)
    seen = page.frames.number
    await page.tick(3)
    ((kind, _, data),) = events(page.frames.after(seen))
    assert kind == "update"
    assert data == {
        "state": {"step": 3},
        "curves": {"loss": {"at": 1, "points": [[2, 2, 1, 1, 1], [3, 3, 1.5, 1.5, 1.5]]}},
    }
    page.now_s += 1.0
    await page.frames.refresh()
    assert page.frames.after(page.frames.number) == b""


async def test_frames_come_once_a_second_at_most_but_at_once_if_asked() -> None:
    """However often viewers ask."""
    page = Page()
    await page.tick(1)
    for _ in range(10):
        page.now_s += 0.09
        page.sections["state"] = {"step": page.now_s}
        await page.frames.refresh()
    assert page.frames.number == 1
    await page.frames.refresh(at_once=True)
    assert page.frames.number == 2


async def test_a_viewer_that_comes_back_gets_what_it_missed_or_everything() -> None:
    """By Last-Event-ID; too old ones, those of another process, later ones and nonsense get a full frame."""
    page = Page()
    await page.tick(1)
    last_id = events(page.frames.full())[0][1]
    await page.tick(2)
    await page.tick(3)
    missed = events(page.frames.after(page.frames.number_of(last_id)))
    assert [(kind, data["state"]["step"]) for kind, _, data in missed] == [("update", 2), ("update", 3)]
    process = last_id.partition(".")[0]
    for other in (
        "",
        "x",
        f"{process}.",
        f"{process}.-1",
        f"{process}.99",
        "feedfacecafe.1",
        f"{process}.{'9' * 40}",
        f"{process}.²",
    ):
        ((kind, _, data),) = events(page.frames.after(page.frames.number_of(other)))
        assert (kind, data["state"]["step"], len(data["curves"]["loss"]["points"])) == ("full", 3, 3)
    for step in range(4, 5 + FRAMES_MAX):
        await page.tick(step)
    assert events(page.frames.after(page.frames.number_of(last_id)))[0][0] == "full"


async def test_a_curve_that_begins_later_is_sent() -> None:
    """As a metric of the job does."""
    page = Page()
    await page.tick(1)
    page.curves["step/accuracy"] = Curve()
    page.curves["step/accuracy"].add(1, 0.5)
    await page.tick(2)
    assert "step/accuracy" in events(page.frames.after(1))[0][2]["curves"]


# -- a real run's sections -------------------------------------------------------------------------------------------


def crowded() -> tuple[Sections, Any]:
    """The sections of a run with as much of everything as there can be, and its parts."""
    run = new_run(FakePeers(), run_name=MARKUP, tags={f"tag{n}": "v" * 100 for n in range(20)}, epochs=9)
    status, history = run.core.status, run.core.history
    status.ranks = tuple(RankInfo(rank, f"host-{rank}", rank, "cuda:0", rank // 8) for rank in range(2000))
    long = "x" * 1000
    names = [f"{MARKUP}{number}" for number in range(200)]
    for at in range(40):
        stage = enums.SEED_STAGE_TRAINING if at % 2 else enums.SEED_STAGE_BLENDING
        status.global_step = at
        history.on_seeds(
            [SeedState(seed_id=name, stage=stage, slot=long, metrics={"alpha": 0.5}) for name in names[:64]]
        )
    status.logged = {f"metric.{number}": float(number) for number in range(64)}
    step = StepDone(1, 1, 1.0, 1.0, 8, 0.01, 0.0, 0.0, logged=status.logged)
    for number in range(1, 2000):
        history.on_step(replace(step, global_step=number, loss=math.sin(number)))
    info = SnapshotInfo(Position(1, 1), 5, "d", 1)
    status.snapshots = tuple(replace(info, position=Position(number, 1)) for number in range(16))
    sections = Sections(run.core.page)
    sections.rows = JournalRows(
        tuple(Incident(name, "rollback", 1, 5, long, {"outcome": MARKUP, "origin": long}) for name in names),
        tuple(CheckpointRow(name, 1, "run", 5, 1, 100, "d", None) for name in names),
    )
    return sections, run


async def test_a_viewer_that_leaves_while_a_frame_is_rendered_costs_the_others_nothing() -> None:
    """The points of curves that were encoded for that frame are in it, or in the next one."""
    page = Page()
    page.curves["accuracy"] = Curve()
    await page.tick(1)
    page.curves["loss"].add(2, 0.5)
    for turns in range(1, 6):
        page.now_s += 1.0
        page.curves["accuracy"].add(turns + 2, 0.25)
        with anyio.CancelScope() as leaving:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(page.frames.refresh)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                leaving.cancel()
    page.now_s += 1.0
    await page.frames.refresh()
    known: dict[str, list[Any]] = {}
    for _, _, data in events(page.frames.after(0)):
        for name, change in data["curves"].items():
            known[name] = known.get(name, [])[: change["at"]] + change["points"]
            assert len(known[name]) == change["at"] + len(change["points"]), "points are missing"
    assert [len(points) for points in known.values()] == [len(page.curves[name].points) for name in known]


async def test_sections_are_bounded_and_say_how_much_there_is() -> None:
    """Ranks, restore points, incidents; long texts are cut; markup is a text like any other."""
    sections, _ = await anyio.to_thread.run_sync(crowded)
    found: Any = {name: build() for name, build in sections.builders.items()}
    found["seeds"] = list(found["seeds"])
    assert (len(found["ranks"]["rows"]), found["ranks"]["total"]) == (ROWS_MAX, 2000)
    assert (len(found["points"]["rows"]), found["points"]["total"]) == (ROWS_MAX, 216)
    assert len(found["incidents"]["rows"]) == ROWS_MAX
    assert len(found["incidents"]["rows"][0]["reason"]) == 300
    assert found["run"]["name"] == MARKUP
    assert found["seeds"][0]["id"] == f"{MARKUP}0"
    assert found["state"]["loss"] is None
    json.dumps(found, allow_nan=False)


async def test_rendering_does_not_block_the_event_loop() -> None:
    """Not for 5 ms, with as much of everything as there can be.

    No section, no change of curves, no frame; the median of ten tries, since machines are busy.
    """
    sections, run = await anyio.to_thread.run_sync(crowded)
    history = run.core.history
    frames = Frames(sections.builders, history.curves)
    step = StepDone(2000, 1, 1.0, 1.0, 8, 0.01, 0.0, 0.0, logged=dict(run.core.status.logged))
    longest: list[float] = []
    for number in range(2000, 2010):
        history.on_step(replace(step, global_step=number))
        run.core.status.global_step = number
        longest.append(await longest_turn(partial(frames.refresh, at_once=True)))
        longest.append(await longest_turn(partial(as_task, frames.full)))
    assert sorted(longest)[len(longest) // 2] < BLOCKED_S, longest
    assert frames.number == 10


async def as_task(call: Callable[[], object]) -> None:
    """Calls it."""
    call()


async def longest_turn(task: Callable[[], Awaitable[None]]) -> float:
    """Returns the longest CPU time, in seconds, for which a task keeps the event loop from other work."""
    turns: list[float] = []

    async def other_work() -> None:
        before_s = time.thread_time()
        while True:
            await anyio.lowlevel.checkpoint()
            now_s = time.thread_time()
            turns.append(now_s - before_s)
            before_s = now_s

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other_work)
        await anyio.lowlevel.checkpoint()
        await task()
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    return max(turns)
