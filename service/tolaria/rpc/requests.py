"""Requests that change something: their common fields, and the promise that each is carried out at most once.

Owns the memory of answers. Must not know what requests do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar, cast

import anyio
import structlog
from google.protobuf.message import Message

from leyline.v1 import admin_service_pb2
from tolaria.errors import InvalidFieldError, StillUnderwayError, TolariaError

REQUEST_ID_MAX = 128
REASON_MAX = 1024

FIND_S_MAX: Final = 0.05
"""Longest that a request waits for what earlier processes answered: a halt takes effect within twice that, whatever
the disk does. An id that cannot be looked up in time counts as new."""

KEEP_S_MAX: Final = 0.25
"""Longest that an answer waits until it is durable."""

Answer = TypeVar("Answer", bound=Message)


class MutatingRequest(Protocol):
    """What every request that changes something carries."""

    @property
    def request_id(self) -> str:
        """Made by the client; a repeat gets the first answer."""

    @property
    def reason(self) -> str:
        """Why, for the records."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:  # noqa: N802 - protobuf's name
        """The request's bytes."""


def check_request(request: MutatingRequest) -> None:
    """Raise InvalidFieldError when request_id or reason are missing or too long."""
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
    fingerprint: tuple[str, bytes]
    done: anyio.Event = field(default_factory=anyio.Event)
    answer: Message | None = None
    error: TolariaError | None = None


class AnswerStore(Protocol):
    """Remembers answers beyond the life of this process. What it cannot do it tells in the log; it never raises.

    Both are cancelled when they take too long.
    """

    async def find(self, request_id: str) -> tuple[str, bytes] | None:
        """The method that a request called and its answer, serialized; None: it has none."""

    async def keep(self, request_id: str, reason: str, answer: Message) -> None:
        """Keep a request's answer, the first one; when cancelled, as soon as that can be done."""


class RequestLedger:
    """Remembers the answers to the newest `capacity` requests, and those of earlier processes by `store`.

    Used on the event loop only. The store may hang: requests are carried out and answered all the same.
    """

    def __init__(self, capacity: int, store: AnswerStore) -> None:
        self._log = structlog.get_logger(__name__)
        self._capacity = capacity
        self._store = store
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def once(self, method: str, request: MutatingRequest, carry_out: Callable[[], Awaitable[Answer]]) -> Answer:
        """Carry a request out, or give the answer that its id got before; a repeat that comes early waits for it.

        Raises:
            InvalidFieldError: when the request's common fields are wrong, or its id was another request's.
            StillUnderwayError: it takes long; a repeat is handed to `carry_out` again.
            TolariaError: what else `carry_out` raised, also to repeats.
        """
        check_request(request)
        fingerprint = (method, request.SerializeToString(deterministic=True))
        while (entry := self._entries.get(request.request_id)) is not None:
            if entry.fingerprint != fingerprint:
                raise InvalidFieldError("request_id", "was used for another request already")
            await entry.done.wait()
            if entry.error is not None:
                raise entry.error
            if entry.answer is not None:
                return cast("Answer", entry.answer)
            # Its caller went away, or was told to wait, before there was an answer: this repeat carries it on.
        return await self._first(request, _Entry(fingerprint), carry_out)

    async def _first(
        self, request: MutatingRequest, entry: _Entry, carry_out: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        request_id, method = request.request_id, entry.fingerprint[0]
        self._entries[request_id] = entry
        self._forget_oldest()
        try:
            if (found := await self._find(request_id)) is not None:
                entry.answer = answer = cast("Answer", _parsed(method, *found))
                return answer
            entry.answer = answer = await carry_out()
        except StillUnderwayError:
            raise
        except TolariaError as error:
            entry.error = error
            raise
        finally:
            if entry.answer is None and entry.error is None:
                self._entries.pop(request_id, None)
            entry.done.set()
        with anyio.move_on_after(KEEP_S_MAX) as scope:
            await self._store.keep(request_id, request.reason, answer)
        if scope.cancelled_caught:
            self._log.warning("request_not_durable_yet", request_id=request_id, waited_s=KEEP_S_MAX)
        return answer

    async def _find(self, request_id: str) -> tuple[str, bytes] | None:
        with anyio.move_on_after(FIND_S_MAX):
            return await self._store.find(request_id)
        self._log.warning("request_not_looked_up", request_id=request_id, error=f"took more than {FIND_S_MAX} s")
        return None

    def _forget_oldest(self) -> None:
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)


def _parsed(method: str, answered: str, content: bytes) -> Message:
    """An earlier process's answer. What it was asked in full is not kept: the method has to do."""
    if answered != method:
        raise InvalidFieldError("request_id", "was used for another request already")
    kind: type[Message] = getattr(admin_service_pb2, f"{method}Response")
    return kind.FromString(content)
