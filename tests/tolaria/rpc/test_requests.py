from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from leyline.v1.admin_service_pb2 import PauseTrainingRequest, PauseTrainingResponse
from support.admin import MemoryJournal
from tolaria.errors import InvalidFieldError, JournalUnavailableError, StillUnderwayError, WrongStateError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.database import Journal
from tolaria.journal.rows import AdminActionRow
from tolaria.rpc.requests import RequestLedger
from tolaria.run.status import RunStatus

pytestmark = pytest.mark.anyio


class Operation:
    """Counts how often it was carried out; each answer is a different one."""

    def __init__(self) -> None:
        self.times = 0
        self.proceed = anyio.Event()
        self.error: Exception | None = None

    async def now(self) -> PauseTrainingResponse:
        """Takes effect at once."""
        self.times += 1
        if self.error is not None:
            raise self.error
        return PauseTrainingResponse(global_step=self.times)

    async def later(self) -> PauseTrainingResponse:
        """Takes effect once the test lets it proceed."""
        await self.proceed.wait()
        return await self.now()


class Ledger:
    """A ledger whose requests are all for the same method, unless the test names another."""

    def __init__(self, ledger: RequestLedger) -> None:
        self._ledger = ledger

    async def once(
        self,
        request: PauseTrainingRequest,
        operation: Callable[[], Awaitable[PauseTrainingResponse]],
        *,
        method: str = "PauseTraining",
        timeout_s: float = 60.0,
    ) -> PauseTrainingResponse:
        """Returns the answer of a request."""
        return await self._ledger.once(method, request, operation, timeout_s=timeout_s, late="it was not done")


@asynccontextmanager
async def open_ledger(journal: AsyncJournal | None = None, *, capacity: int = 10) -> AsyncIterator[Ledger]:
    """Yields the ledger of one process; its journal is in memory by default."""
    status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0, global_step=7)
    async with anyio.create_task_group() as tasks:
        yield Ledger(RequestLedger(capacity, journal or MemoryJournal(), status, tasks))
        tasks.cancel_scope.cancel()


def request(request_id: str = "a", reason: str = "why") -> PauseTrainingRequest:
    """Returns a request that is valid unless its id or reason is not."""
    return PauseTrainingRequest(request_id=request_id, reason=reason)


@pytest.mark.parametrize(
    ("field", "invalid"),
    [
        ("request_id", request(request_id="")),
        ("request_id", request(request_id="  ")),
        ("request_id", request(request_id="x" * 129)),
        ("reason", request(reason="")),
        ("reason", request(reason="x" * 1025)),
    ],
)
async def test_common_fields_are_checked(field: str, invalid: PauseTrainingRequest) -> None:
    """A request whose id or reason is missing or too long is refused with the field's name; nothing happens."""
    operation = Operation()
    async with open_ledger() as ledger:
        with pytest.raises(InvalidFieldError) as caught:
            await ledger.once(invalid, operation.now)
    assert caught.value.field == field
    assert operation.times == 0


async def test_a_repeat_gets_the_first_answer() -> None:
    """A request is carried out once; another id is another request."""
    operation = Operation()
    async with open_ledger() as ledger:
        answers = [await ledger.once(request(i), operation.now) for i in ("a", "a", "b", "a")]
    assert [answer.global_step for answer in answers] == [1, 1, 2, 1]


async def test_an_answer_of_an_earlier_process_that_was_not_found_in_time_is_sent() -> None:
    """The operation runs again, but the caller gets the answer that the journal has."""
    first = PauseTrainingResponse(global_step=99).SerializeToString()
    journal = MemoryJournal()

    async def now() -> PauseTrainingResponse:
        journal.answers["a"] = AdminActionRow("a", 1, "run", "PauseTraining", "why", 99, first)
        return PauseTrainingResponse(global_step=1)

    async with open_ledger(journal) as ledger:
        answers = [await ledger.once(request(), now) for _ in range(2)]
    assert [answer.global_step for answer in answers] == [99, 99]


async def test_a_field_of_a_newer_client_refuses_the_request() -> None:
    """Ignored, it would change something else than was asked. The field is named, and nothing is carried out."""
    operation = Operation()
    newer = PauseTrainingRequest.FromString(request().SerializeToString() + b"\xfa\x3f\x01x")
    async with open_ledger() as ledger:
        with pytest.raises(InvalidFieldError, match=r"field 1023 of PauseTrainingRequest.*is newer than the service"):
            await ledger.once(newer, operation.now)
        await ledger.once(request(), operation.now)
    assert operation.times == 1


async def test_a_repeat_gets_the_first_error() -> None:
    """A refused request is not tried again."""
    operation = Operation()
    operation.error = WrongStateError("ended")
    async with open_ledger() as ledger:
        for _ in range(2):
            with pytest.raises(WrongStateError, match="ended"):
                await ledger.once(request(), operation.now)
    assert operation.times == 1


async def test_an_id_belongs_to_its_request() -> None:
    """The same id with another reason or for another method is an error."""
    operation = Operation()
    async with open_ledger() as ledger:
        await ledger.once(request(), operation.now)
        for method, other in (("PauseTraining", request(reason="other")), ("ResumeTraining", request())):
            with pytest.raises(InvalidFieldError, match="request_id: was used for another request"):
                await ledger.once(other, operation.now, method=method)


async def test_simultaneous_repeats_wait_for_one_operation() -> None:
    """Twenty calls at once are carried out once."""
    operation, answers = Operation(), list[int]()
    async with open_ledger() as ledger:

        async def ask() -> None:
            answers.append((await ledger.once(request(), operation.later)).global_step)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
            await anyio.lowlevel.checkpoint()
            operation.proceed.set()
    assert answers == [1] * 20


async def test_an_operation_goes_on_when_its_caller_is_cancelled() -> None:
    """A repeat waits for the same operation."""
    operation, repeated = Operation(), Operation()
    async with open_ledger() as ledger:
        with anyio.move_on_after(0.01):
            await ledger.once(request(), operation.later)
        operation.proceed.set()
        assert (await ledger.once(request(), repeated.now)).global_step == 1
    assert (operation.times, repeated.times) == (1, 0)


async def test_a_caller_stops_waiting_after_the_timeout() -> None:
    """The error says what has not happened; the operation goes on, and a repeat gets its answer."""
    operation = Operation()
    async with open_ledger() as ledger:
        with pytest.raises(StillUnderwayError, match=r"it was not done within 0 s; the request"):
            await ledger.once(request(), operation.later, timeout_s=0.01)
        operation.proceed.set()
        assert (await ledger.once(request(), operation.later)).global_step == 1
    assert operation.times == 1


async def test_the_memory_is_bounded() -> None:
    """The ledger remembers the newest ids; older ones are looked up in the journal."""
    operation, journal = Operation(), MemoryJournal()
    async with open_ledger(journal, capacity=3) as ledger:
        for number in range(5):
            await ledger.once(request(str(number)), operation.now)
        assert (await ledger.once(request("4"), operation.now)).global_step == 5
        assert (await ledger.once(request("0"), operation.now)).global_step == 1
        journal.answers.clear()
        assert (await ledger.once(request("1"), operation.now)).global_step == 6


async def test_a_repeat_after_a_restart_gets_the_first_answer() -> None:
    """The journal has the answers of earlier processes; under another method such an id is an error."""
    operation, answers = Operation(), dict[str, AdminActionRow]()
    async with open_ledger(MemoryJournal(answers)) as ledger:
        first = await ledger.once(request(), operation.now)
    async with open_ledger(MemoryJournal(answers)) as ledger:
        assert await ledger.once(request(), operation.now) == first
    async with open_ledger(MemoryJournal(answers)) as ledger:
        with pytest.raises(InvalidFieldError, match="another request"):
            await ledger.once(request(), operation.now, method="ResumeTraining")
    assert operation.times == 1


async def test_the_row_of_an_answer() -> None:
    """The journal gets the method, the reason, the step and the serialized answer."""
    answers: dict[str, AdminActionRow] = {}
    async with open_ledger(MemoryJournal(answers)) as ledger:
        answer = await ledger.once(request(), Operation().now)
    row = answers["a"]
    assert (row.run_id, row.method, row.reason, row.global_step) == ("run", "PauseTraining", "why", 7)
    assert PauseTrainingResponse.FromString(row.answer) == answer


async def test_a_journal_that_hangs_delays_neither_the_effect_nor_the_answer() -> None:
    """The answer is remembered in memory, and given to the journal again later."""
    operation, journal = Operation(), MemoryJournal()
    journal.hangs = True
    async with open_ledger(journal) as ledger:
        with anyio.fail_after(180):
            first = await ledger.once(request(), operation.now)
            assert await ledger.once(request(), operation.now) == first
    assert operation.times == 1
    assert [row.request_id for row in journal.noted if isinstance(row, AdminActionRow)] == ["a"]


async def test_a_journal_that_fails_delays_neither_the_effect_nor_the_answer() -> None:
    """An id that cannot be looked up counts as new."""
    operation, journal = Operation(), MemoryJournal()
    journal.error = JournalUnavailableError("the disk is full")
    async with open_ledger(journal) as ledger:
        assert (await ledger.once(request(), operation.now)).global_step == 1
    assert len(journal.noted) == 1


class BlockingJournal(Journal):
    """A journal on disk whose calls block while `gate` is not set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()

    def find(self, *args: object) -> object:  # type: ignore[override]
        assert self.gate.wait(180)
        return super().find(*args)  # type: ignore[arg-type]

    def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        assert self.gate.wait(180)
        return super().answer_once(row)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[BlockingJournal]:
    """An empty journal on disk."""
    with BlockingJournal(tmp_path / "journal.sqlite3") as journal:
        yield journal


async def test_an_answer_is_in_the_journal_once_the_disk_responds(journal: BlockingJournal) -> None:
    """While the disk hangs the request is carried out and answered, and its answer is found."""
    operation, rows = Operation(), AsyncJournal(journal, "run")
    journal.gate.clear()
    try:
        with anyio.fail_after(180):
            async with open_ledger(rows) as ledger:
                answer = await ledger.once(request(), operation.now)
                assert await ledger.once(request(), operation.now) == answer
            found = await rows.find_answer("a")
    finally:
        journal.gate.set()
    assert found is not None
    assert found.answer == answer.SerializeToString()
    assert operation.times == 1
    assert await rows.flush(5.0) == 0
    (row,) = await anyio.to_thread.run_sync(journal.rows, AdminActionRow)
    assert (row.request_id, row.reason) == ("a", "why")


async def test_a_queued_answer_does_not_replace_the_first_one(journal: BlockingJournal) -> None:
    """Neither an answer that is queued too, nor one that is in the journal already."""
    rows = AsyncJournal(journal, "run")

    def row(request_id: str, answer: bytes) -> AdminActionRow:
        return AdminActionRow(request_id, 1, "run", "PauseTraining", "test", 1, answer)

    await rows.answer_once(row("a", b"first"))
    for late in (row("a", b"second"), row("b", b"first"), row("b", b"second")):
        rows.note(late)
    assert await rows.flush(5.0) == 0
    found = await anyio.to_thread.run_sync(journal.rows, AdminActionRow)
    assert [(kept.request_id, kept.answer) for kept in found] == [("a", b"first"), ("b", b"first")]


async def test_a_repeat_is_known() -> None:
    """By its id, method and content; only it does nothing."""
    status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0, global_step=7)
    async with anyio.create_task_group() as tasks:
        ledger = RequestLedger(10, MemoryJournal(), status, tasks)
        assert not ledger.knows("PauseTraining", request())
        await ledger.once("PauseTraining", request(), Operation().now, timeout_s=60.0, late="late")
        assert ledger.knows("PauseTraining", request())
        assert not ledger.knows("ResumeTraining", request())
        assert not ledger.knows("PauseTraining", request(reason="another"))
        assert not ledger.knows("PauseTraining", request("b"))
