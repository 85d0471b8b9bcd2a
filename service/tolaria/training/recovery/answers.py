"""Answers to operators' requests, kept in the journal, so that a repeat after a restart gets the first answer.

Must not know what the requests do.
"""

from __future__ import annotations

import time

import structlog
from google.protobuf.message import Message

from tolaria.errors import JournalError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.training.progress import Progress
from tolaria.training.recovery.listing import admin_row


class JournaledAnswers:
    """Used on the event loop only. What the journal refuses now it is given again later."""

    def __init__(self, archive: AsyncJournal, progress: Progress) -> None:
        self._archive = archive
        self._progress = progress
        self._log = structlog.get_logger(__name__)

    async def find(self, request_id: str) -> tuple[str, bytes] | None:
        """The method that a request called and its answer, serialized; None: it has none, as far as can be told."""
        try:
            row = await self._archive.find_answer(request_id)
        except JournalError as error:
            self._log.warning("request_not_looked_up", request_id=request_id, error=str(error))
            return None
        return None if row is None else (row.method, row.answer)

    async def keep(self, request_id: str, reason: str, answer: Message) -> None:
        """Keep a request's answer, unless it has one; where that takes long, cancel this: it is kept later."""
        row = admin_row(
            request_id,
            answer,
            at_ns=time.time_ns(),
            run_id=self._progress.run_id,
            reason=reason,
            global_step=self._progress.global_step,
        )
        kept = False
        try:
            await self._archive.answer_once(row)
            kept = True
        except JournalError as error:
            self._log.warning("request_not_remembered_yet", request_id=request_id, error=str(error))
        finally:
            if not kept:
                self._archive.note(row)
