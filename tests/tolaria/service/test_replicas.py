"""A replica becomes a checkpoint while the service runs: real machine, store and writer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.joining import SECRET, Meeting, meeting
from support.pods import free_port
from support.replicas import Holder, arrived, image_of
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import Settings, StateSettings
from tolaria.journal.rows import CheckpointRow, FaultRow
from tolaria.ranks.replicas import ReplicaPoint
from tolaria.run.resume import PreparedState, prepare_state
from tolaria.segments import share
from tolaria.service import replicas
from tolaria.service.replicas import adopt_at_start, adopt_meanwhile

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def met_with(
    directory: Path, *steps: int, run_id: str, proven: Callable[[int], bool] = lambda _: True
) -> AsyncIterator[tuple[Meeting, Holder]]:
    """A rendezvous that a machine with replicas of these steps of the run has joined."""
    holder = Holder()
    for step in steps:
        image = image_of(step)
        point = ReplicaPoint(run_id, image.seal().total, step, 1, proven=proven(step))
        holder.store.put(await in_thread(partial(arrived, share(image), point)))
    async with meeting(directory, nodes=2, replicas=1) as met, holder.joined(met):
        while not met.rendezvous.nodes:
            await anyio.sleep(0.005)
        yield met, holder


async def in_thread(ask: Callable[[], Any]) -> Any:
    """The answer to a question that blocks."""
    return await anyio.to_thread.run_sync(ask)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[PreparedState, CheckpointWriter]]:
    """A run with a checkpoint, and its writer."""
    with prepare_state(Settings(state=StateSettings(dir=str(tmp_path / "state")))) as prepared:
        prepared.storage.checkpoints.write(image_of(10))
        with CheckpointWriter(prepared.storage.checkpoints) as writer:
            yield prepared, writer


async def test_the_newest_intact_replica_becomes_a_checkpoint_if_it_is_newer(
    tmp_path: Path, stored: tuple[PreparedState, CheckpointWriter]
) -> None:
    """A damaged one is passed over; what is no newer than the checkpoint is left alone."""
    prepared, writer = stored
    journal, checkpoints = prepared.storage.journal, prepared.storage.checkpoints
    async with met_with(tmp_path, 5, 20, 30, run_id=prepared.run_id) as (met, holder):
        damaged = holder.store.segment(image_of(30).seal().total)
        assert damaged is not None
        damaged.memory[64:65] = bytes([damaged.memory[64] ^ 1])
        for _ in range(2):
            await adopt_meanwhile(met.rendezvous, prepared.storage, writer, prepared.run_id)
            rows = await in_thread(lambda: journal.rows(CheckpointRow))
            assert [(row.global_step, bool(row.proven)) for row in rows] == [(10, False), (20, True)]
    (fault,) = await in_thread(lambda: journal.rows(FaultRow))
    assert (fault.kind, fault.global_step) == ("replica_restored", 20)
    assert (await in_thread(checkpoints.load_newest)).image.verify() == image_of(20).verify()


@pytest.mark.parametrize("proven", [20, 10])
async def test_a_proven_replica_is_adopted_rather_than_a_newer_one(
    tmp_path: Path, stored: tuple[PreparedState, CheckpointWriter], proven: int
) -> None:
    """Since the service would not restore the newer one; without a proven one that is all there is."""
    prepared, writer = stored
    async with met_with(tmp_path, 20, 30, run_id=prepared.run_id, proven=lambda step: step <= proven) as (met, _):
        await adopt_meanwhile(met.rendezvous, prepared.storage, writer, prepared.run_id)
    rows = await in_thread(lambda: prepared.storage.journal.rows(CheckpointRow))
    assert [row.global_step for row in rows] == [10, 20 if proven == 20 else 30]


def test_a_start_goes_on_without_replicas_that_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of all machines and replicas together; a log line says so."""
    begun, ended = list[float](), list[float]()

    async def for_ever(*_: object, wait_s: float, **__: object) -> None:
        begun.append(wait_s)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(wait_s)

    monkeypatch.setattr(replicas, "find_replica", for_ever)
    monkeypatch.setattr(replicas, "ARRIVAL_S", 0.2)
    (tmp_path / "secret").write_bytes(SECRET)
    lane = {"mode": "torchrun", "nodes": "2", "rendezvous": f"127.0.0.1:{free_port()}", "join_wait_s": 0.1}
    sections = {"lane": {**lane, "secret_file": str(tmp_path / "secret")}, "rollback": {"replicas": 1}}
    settings = Settings.model_validate({**sections, "state": {"dir": str(tmp_path / "state")}})
    with (
        prepare_state(settings) as prepared,
        capture_logs() as logs,
        asyncio.Runner(loop_factory=asyncio.new_event_loop) as loop,
    ):
        adopt_at_start(settings, loop, prepared.storage, prepared.run_id)
    assert begun == ended == [0.1]
    assert [line["detail"] for line in logs if line["event"] == "replica_not_restored"] == [
        "it has not arrived within 0.3 s"
    ]
