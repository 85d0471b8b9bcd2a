"""Requests that change something: their common fields, and the ledger that answers a repeat as it answered first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol, TypeVar, cast

import anyio
import structlog
from anyio.abc import TaskGroup
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from leyline.v1 import admin_service_pb2
from tolaria import __version__
from tolaria.errors import InvalidFieldError, JournalError, StillUnderwayError, TolariaError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import AdminActionRow
from tolaria.run.status import RunStatus

REQUEST_ID_MAX: Final = 128
REASON_MAX: Final = 1024

FIND_S_MAX: Final = 0.05
"""Longest wait of a request for the answers of earlier processes, so that a halt takes effect within twice that time
even if the disk hangs. An id that cannot be looked up in time counts as new."""

KEEP_S_MAX: Final = 0.25  # longest wait for an answer to become durable

Answer = TypeVar("Answer", bound=Message)


class MutatingRequest(Protocol):
    """The common fields of requests that change something: an id, whose repeat gets the first answer, and a reason."""

    DESCRIPTOR: Descriptor
    request_id: str
    reason: str

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:  # noqa: N802 - protobuf's name
        """Returns the request's bytes."""


def check_request(request: MutatingRequest) -> None:
    """Raises InvalidFieldError when request_id or reason is missing or too long, or a field is unknown.

    A newer client has set a field that is unknown here: without it the request would change something else than asked.
    """
    unknown = UnknownFieldSet(cast(Message, request))
    if len(unknown):
        detail = f"is unknown to Tolaria {__version__}, which would ignore it: the client is newer than the service"
        raise InvalidFieldError(f"field {unknown[0].field_number} of {request.DESCRIPTOR.name}", detail)
    for name, value, longest in (
        ("request_id", request.request_id, REQUEST_ID_MAX),
        ("reason", request.reason, REASON_MAX),
    ):
        if not value.strip():
            raise InvalidFieldError(name, "must not be empty")
        if len(value) > longest:
            raise InvalidFieldError(name, f"must not be longer than {longest} characters")


@dataclass(slots=True)
class _Entry:
    """A request; either `answer` or `error` is set once it is `done`."""

    method: str
    content: bytes
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: Message | None = None
    error: TolariaError | None = None


class RequestLedger:
    """Carries out each request that it remembers once, and gives repeats the first answer.

    Operations run in `tasks`, not in their callers: a caller that disconnects or gives up waiting cancels nothing, and
    a repeat of its request waits for the same operation. At most `capacity` requests of this process are remembered;
    the journal has those of earlier ones. Even if it hangs, requests are carried out and answered. Used on the event
    loop only.
    """

    def __init__(self, capacity: int, journal: AsyncJournal, status: RunStatus, tasks: TaskGroup) -> None:
        self._log = structlog.get_logger(__name__)
        self._capacity = capacity
        self._journal = journal
        self._status = status
        self._tasks = tasks
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def knows(self, method: str, request: MutatingRequest) -> bool:
        """Whether a request is a repeat of one that this process remembers, so that it does nothing."""
        entry = self._entries.get(request.request_id)
        return entry is not None and (entry.method, entry.content) == (method, _content(request))

    async def once(
        self,
        method: str,
        request: MutatingRequest,
        operation: Callable[[], Awaitable[Answer]],
        *,
        timeout_s: float,
        late: str,
    ) -> Answer:
        """Returns the answer of `operation`, or the one that the RPC `method` gave earlier to the same request id.

        `late` is the part of the error message that says what has not happened within `timeout_s`.

        Raises:
            InvalidFieldError: the common fields are wrong, or the id was another request's.
            StillUnderwayError: the operation takes longer; it goes on, and a repeat waits for it.
            TolariaError: raised by `operation`, and again for repeats.
        """
        check_request(request)
        content = _content(request)
        entry = self._entries.get(request.request_id)
        if entry is None:
            entry = self._entries[request.request_id] = _Entry(method, content)
            self._forget_oldest()
            self._tasks.start_soon(self._carry_out, request.request_id, request.reason, entry, operation)
        elif (entry.method, entry.content) != (method, content):
            raise InvalidFieldError("request_id", "was used for another request already")
        with anyio.move_on_after(timeout_s):
            await entry.done.wait()
        if not entry.done.is_set():
            raise StillUnderwayError(f"{late} within {timeout_s:.0f} s; the request remains in effect")
        if entry.answer is None:
            raise entry.error or StillUnderwayError("the service is stopping; the request may have taken effect")
        return cast("Answer", entry.answer)

    async def _carry_out(
        self, request_id: str, reason: str, entry: _Entry, operation: Callable[[], Awaitable[Answer]]
    ) -> None:
        try:
            answer = await self._find(request_id, entry.method)
            if answer is None:
                answer = await operation()
                answer = await self._keep(request_id, reason, entry.method, answer)
            entry.answer = answer
        except TolariaError as error:
            entry.error = error
        finally:
            entry.done.set()

    async def _find(self, request_id: str, method: str) -> Message | None:
        """Returns the answer that an earlier process gave; None when none can be found in time."""
        problem = f"took more than {FIND_S_MAX} s"
        try:
            with anyio.move_on_after(FIND_S_MAX):
                row = await self._journal.find_answer(request_id)
                return None if row is None else _parsed(method, row)
        except JournalError as error:
            problem = str(error)
        self._log.warning("request_not_looked_up", request_id=request_id, error=problem)
        return None

    async def _keep(self, request_id: str, reason: str, method: str, answer: Message) -> Message:
        """Makes an answer durable, now or later; returns the answer to send: an earlier one if the journal has it."""
        row = AdminActionRow(
            request_id=request_id,
            at_ns=time.time_ns(),
            run_id=self._status.run_id,
            method=method,
            reason=reason,
            global_step=self._status.global_step,
            answer=answer.SerializeToString(deterministic=True),
        )
        kept = False
        try:
            with anyio.move_on_after(KEEP_S_MAX):
                first = await self._journal.answer_once(row)
                kept = True
                return _parsed(method, first)
            if not kept:
                self._log.warning("request_not_durable_yet", request_id=request_id, waited_s=KEEP_S_MAX)
        except JournalError as error:
            self._log.warning("request_not_remembered_yet", request_id=request_id, error=str(error))
        finally:
            if not kept:
                self._journal.note(row)
        return answer

    def _forget_oldest(self) -> None:
        """Forgets finished requests beyond the capacity, oldest first."""
        excess = max(0, len(self._entries) - self._capacity)
        finished = (request_id for request_id, entry in self._entries.items() if entry.done.is_set())
        for request_id in list(islice(finished, excess)):
            del self._entries[request_id]


def _content(request: MutatingRequest) -> bytes:
    return request.SerializeToString(deterministic=True)


def _parsed(method: str, row: AdminActionRow) -> Message:
    """Returns an earlier process's answer. Its request is not kept in full, so only the method is compared."""
    if row.method != method:
        raise InvalidFieldError("request_id", "was used for another request already")
    kind: type[Message] = vars(admin_service_pb2)[f"{method}Response"]
    return kind.FromString(row.answer)
