"""Writes commands, emergencies and the health record of a run to its journal, without waiting."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from leyline.v1.enums_pb2 import CommandType
from tolaria.emergency import Cleared, Escalated, HeldBack, Report
from tolaria.emergency.protocol import EmergencyState, level_name
from tolaria.errors import CommandRejectedError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import CommandRow, EmergencyRow, RunRow
from tolaria.peers.consultation import Consultation
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus

_COMMAND_NAMES = {number: name.removeprefix("COMMAND_").lower() for name, number in CommandType.items()}


class JournalObserver(RunObserver):
    """Writes the rows of one run. `active` is the emergency that the run was resumed with: it has a row already."""

    def __init__(
        self,
        journal: AsyncJournal,
        status: RunStatus,
        run: RunRow,
        *,
        active: EmergencyRow | None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._journal = journal
        self._status = status
        self._run = run
        self._active = active
        self._wall_ns = wall_ns
        self._emergency: tuple[str, int] | None = None

    def on_health(self, saved: str) -> None:
        if saved != self._run.scale:
            self._run = replace(self._run, scale=saved)
            self._journal.note(self._run)

    def on_command_applied(self, consultation: Consultation) -> None:
        if (command := consultation.command) is not None:
            kind = _COMMAND_NAMES.get(command.command_type, str(command.command_type))
            self._command(command.command_id, kind, "applied", "")

    def on_command_rejected(self, rejection: CommandRejectedError) -> None:
        self._command(f"{rejection.command_id}@{self._wall_ns()}", "unverified", "rejected", rejection.reason)

    def on_emergency(self, report: Report) -> None:
        match report:
            case Escalated():
                self._emergency = self._key(report.state)
                self._emergency_row(self._emergency, report.state)
            case Cleared():
                key = self._emergency or (uuid.uuid4().hex, self._wall_ns())
                self._emergency_row(key, report.before, self._wall_ns())
            case HeldBack():
                signal = report.notice.signal
                state = EmergencyState(level=signal.level, reason=f"told later: {signal.reason}", origin=signal.origin)
                self._emergency_row((uuid.uuid4().hex, self._wall_ns()), state)
            case _:
                pass  # acknowledgements and repeats are in the log only

    def _command(self, key: str, kind: str, outcome: str, reason: str) -> None:
        status = self._status
        self._journal.note(CommandRow(key, self._wall_ns(), status.run_id, kind, status.global_step, outcome, reason))

    def _key(self, state: EmergencyState) -> tuple[str, int]:
        active, self._active = self._active, None
        if active is not None and (active.reason, active.origin) == (state.reason, state.origin):
            return active.emergency_id, active.at_ns
        return uuid.uuid4().hex, self._wall_ns()

    def _emergency_row(self, key: tuple[str, int], state: EmergencyState, cleared_at_ns: int | None = None) -> None:
        run_id, step = self._status.run_id, self._status.global_step
        level, origin, reason = level_name(state.level), state.origin, state.reason
        self._journal.note(EmergencyRow(*key, run_id, level, origin, step, reason, cleared_at_ns))
