"""The audit trail: each call that could change something, in the journal and the log, with who made it and why."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import structlog
from google.rpc import code_pb2

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import TolariaError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import AdminCallRow
from tolaria.rpc.callers import Caller, present_caller
from tolaria.rpc.requests import REASON_MAX, REQUEST_ID_MAX, MutatingRequest
from tolaria.rpc.status import status_of
from tolaria.run.status import RunStatus

DETAIL_MAX: Final = 500
DENIED_S: Final = 60.0
"""Seconds in which one denied call of a caller to a method is recorded; metrics count all."""

_DENIED_MAX: Final = 1000
_REPEATS_MAX: Final = 1000

CHANGES: Final = frozenset(
    method.name
    for method in admin.DESCRIPTOR.services_by_name["TolariaAdminService"].methods
    if "request_id" in method.input_type.fields_by_name
)
"""The methods that change something: their requests have an id."""


class AuditTrail:
    """Records calls. A row is queued when its call begins, and completed when it ends. Used on the event loop only."""

    def __init__(self, journal: AsyncJournal, status: RunStatus) -> None:
        self._log = structlog.get_logger(__name__)
        self._journal = journal
        self._status = status
        self._denied: dict[tuple[str, str], float] = {}
        self._repeats: set[tuple[str, str]] = set()

    @contextmanager
    def recorded(
        self, method: str, request: MutatingRequest, *, repeat: bool = False, caller: Caller | None = None
    ) -> Iterator[Callable[[int], None]]:
        """Records the call that the block handles; its outcome is the error that the block raises, or OK.

        The block is given a function for the step at which the call took effect, if it did at another one than the
        present. `caller` makes it; None: the caller of the call that is being handled. Of a caller's `repeat` of a
        request, which does nothing, the journal gets the first one, and the log all.
        """
        row = self._row(method, caller or present_caller(), request.request_id, request.reason)
        in_journal = not (repeat and self._repeated_before(row))
        if in_journal:
            self._journal.note(row)
        outcome, detail, steps = "OK", "", list[int]()
        try:
            yield steps.append
        except TolariaError as error:
            outcome, detail = code_pb2.Code.Name(status_of(error).code), str(error)
            raise
        except asyncio.CancelledError:
            outcome, detail = "CANCELLED", "the caller did not wait for the answer; what had begun goes on"
            raise
        except BaseException:
            outcome = "UNKNOWN"
            raise
        finally:
            at_step = steps[-1] if steps else self._status.global_step
            self._end(replace(row, global_step=at_step), outcome, detail, in_journal=in_journal)

    def denied(self, method: str, caller: Caller, error: TolariaError) -> None:
        """Records a call to a method that the role of the caller does not allow, now and then."""
        now_s = time.monotonic()
        key = (caller.name, method)
        if method not in CHANGES or now_s - self._denied.get(key, -DENIED_S) < DENIED_S:
            return
        if len(self._denied) >= _DENIED_MAX:
            self._denied.clear()
        self._denied[key] = now_s
        outcome = code_pb2.Code.Name(status_of(error).code)
        self._end(self._row(method, caller, "", ""), outcome, str(error))

    def _row(self, method: str, caller: Caller, request_id: str, reason: str) -> AdminCallRow:
        return AdminCallRow(
            call_id=uuid.uuid4().hex,
            at_ns=time.time_ns(),
            run_id=self._status.run_id,
            method=method,
            request_id=request_id[:REQUEST_ID_MAX],
            caller=str(caller),
            role=caller.role.name.lower(),
            peer=caller.peer,
            reason=reason[:REASON_MAX],
            global_step=self._status.global_step,
        )

    def _repeated_before(self, row: AdminCallRow) -> bool:
        key = (row.caller, row.request_id)
        if key in self._repeats:
            return True
        if len(self._repeats) >= _REPEATS_MAX:
            self._repeats.clear()
        self._repeats.add(key)
        return False

    def _end(self, row: AdminCallRow, outcome: str, detail: str, *, in_journal: bool = True) -> None:
        ended = replace(row, outcome=outcome, detail=detail[:DETAIL_MAX])
        if in_journal:
            self._journal.note(ended)
        self._log.info(
            "admin_call",
            method=ended.method,
            caller=ended.caller,
            role=ended.role,
            peer=ended.peer,
            request_id=ended.request_id,
            reason=ended.reason,
            outcome=outcome,
            detail=ended.detail,
        )
