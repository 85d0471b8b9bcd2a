from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from leyline.v1.admin_service_pb2 import PauseTrainingRequest, PauseTrainingResponse
from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import AdminActionRow
from tolaria.rpc.requests import RequestLedger
from tolaria.training.progress import Progress
from tolaria.training.recovery.answers import JournaledAnswers

pytestmark = pytest.mark.anyio


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """A fresh state directory."""
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        yield storage


class HangingJournal:
    """Holds the journal as a disk that hangs does, until it is let go."""

    def __init__(self, storage: Storage) -> None:
        self._lock = storage.journal._lock
        self._held, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._lock:
            self._held.set()
            self._over.wait(30)

    def hang(self) -> None:
        """From now on."""
        self._thread.start()
        self._held.wait(30)

    def let_go(self) -> None:
        """It works again."""
        self._over.set()
        self._thread.join()


def answers_of(archive: AsyncJournal) -> JournaledAnswers:
    """Of a run that has just begun."""
    return JournaledAnswers(archive, Progress("run", "job", "test", 1, 1, 0.0))


async def test_a_journal_that_hangs_holds_up_nothing_and_keeps_the_answer_later(storage: Storage) -> None:
    """The request is carried out and answered; its answer is known at once, and in the journal once that works."""
    journal, archive = HangingJournal(storage), AsyncJournal(storage.journal, "run")
    ledger, asked = RequestLedger(10, answers_of(archive)), PauseTrainingRequest(request_id="a", reason="why")
    begun_s: list[float] = []

    async def carry_out() -> PauseTrainingResponse:
        begun_s.append(time.monotonic())
        return PauseTrainingResponse(global_step=7)

    await anyio.to_thread.run_sync(journal.hang)
    try:
        with anyio.fail_after(5):
            answer = await ledger.once("PauseTraining", asked, carry_out)
            assert await answers_of(archive).find("a") == ("PauseTraining", answer.SerializeToString())
            assert await ledger.once("PauseTraining", asked, carry_out) == answer
    finally:
        await anyio.to_thread.run_sync(journal.let_go)
    assert len(begun_s) == 1
    assert await archive.flush(5.0) == 0
    (row,) = await anyio.to_thread.run_sync(storage.journal.rows, AdminActionRow)
    assert (row.request_id, row.reason) == ("a", "why")


async def test_an_answer_noted_for_later_does_not_take_the_place_of_the_first(storage: Storage) -> None:
    """Neither of one that waits too, nor of one that is in the journal already."""
    archive = AsyncJournal(storage.journal, "run")

    def row(request_id: str, answer: bytes) -> AdminActionRow:
        return AdminActionRow(request_id, 1, "run", "PauseTraining", "test", 1, answer)

    await archive.answer_once(row("a", b"first"))
    for late in (row("a", b"second"), row("b", b"first"), row("b", b"second")):
        archive.note(late)
    assert await archive.flush(5.0) == 0
    rows = await anyio.to_thread.run_sync(storage.journal.rows, AdminActionRow)
    assert [(kept.request_id, kept.answer) for kept in rows] == [("a", b"first"), ("b", b"first")]
