"""Writes commands, emergencies and the health record of a run to its journal, without waiting."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from leyline.v1.enums_pb2 import EMERGENCY_LEVEL_NOTICE, CommandType
from tolaria.emergency import Cleared, Covered, EmergencyState, Escalated, Report
from tolaria.emergency.protocol import CRITICAL_LEVELS, TRIGGERS, level_name
from tolaria.errors import CommandRejectedError
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import SCHEDULED, STOPPED_EARLY, CommandRow, EmergencyRow, FaultRow, RunRow
from tolaria.lane.messages import EpochDone, LaneLost, LaneReady
from tolaria.peers.consultation import Consultation
from tolaria.run.observers import RunObserver
from tolaria.run.status import RunStatus
from tolaria.signals import Signal

_OPEN_MAX = 256  # beyond it, what an active level covers is in the log only
_NOTICES = frozenset(trigger.value for trigger, level in TRIGGERS.items() if level == EMERGENCY_LEVEL_NOTICE)
_COMMAND_NAMES = {number: name.removeprefix("COMMAND_").lower() for name, number in CommandType.items()}


class JournalObserver(RunObserver):
    """Writes the rows of one run. `active` is the emergency that the run was resumed with: it has a row already.

    `ended` are rows of other emergencies that were not cleared: they ended with the earlier process.
    """

    def __init__(
        self,
        journal: AsyncJournal,
        status: RunStatus,
        run: RunRow,
        *,
        active: EmergencyRow | None,
        ended: Sequence[EmergencyRow] = (),
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._journal = journal
        self._status = status
        self._run = run
        self._active = active
        self._ended = ended
        self._wall_ns = wall_ns
        self._open: dict[tuple[str, str, str], EmergencyRow] = {}
        """Rows of the emergency, by the level, reason and origin of their signals."""

    def on_ready(self, ready: LaneReady) -> None:  # noqa: ARG002 - the hook's signature
        for row in self._ended:
            self._journal.note(replace(row, cleared_at_ns=self._wall_ns()))

    def on_health(self, saved: str) -> None:
        if saved != self._run.scale:
            self._run = replace(self._run, scale=saved)
            self._journal.note(self._run)

    def on_lane_lost(self, lost: LaneLost, step: int) -> None:
        row = FaultRow(uuid.uuid4().hex, self._wall_ns(), self._status.run_id, "lane_lost", step, lost.kind, lost.cause)
        self._journal.note(row)

    def on_epoch(self, epoch: EpochDone, *, show_layers: bool) -> None:
        del show_layers
        if epoch.scheduled is not None:
            self._decision(SCHEDULED, epoch.global_step, json.dumps(asdict(epoch.scheduled)))
        if epoch.stop:
            self._decision(STOPPED_EARLY, epoch.global_step, epoch.stop)

    def on_command_applied(self, consultation: Consultation) -> None:
        if (command := consultation.command) is not None:
            kind = _COMMAND_NAMES.get(command.command_type, str(command.command_type))
            self._command(command.command_id, kind, "applied", "")

    def on_command_rejected(self, rejection: CommandRejectedError) -> None:
        self._command(f"{rejection.command_id}@{self._wall_ns()}", "unverified", "rejected", rejection.reason)

    def on_emergency(self, report: Report) -> None:
        match report:
            case Escalated(state) | Cleared(state) if _is_notice(state) and not self._open:
                pass  # a late boundary or an absent peer is no incident, and there may be one in every epoch
            case Escalated(state):
                self._open_row(state)
            case Covered(signal) if signal.level in CRITICAL_LEVELS and len(self._open) < _OPEN_MAX:
                self._open_row(signal)  # nothing but a log line would be left of it
            case Cleared(before):
                if not self._open:
                    self._open_row(before)
                resumed_with, self._active = self._active, None
                for row in (*self._open.values(), *((resumed_with,) if resumed_with else ())):
                    self._journal.note(replace(row, cleared_at_ns=self._wall_ns()))
                self._open = {}
            case _:
                pass  # acknowledgements and repeats are in the log only

    def _command(self, key: str, kind: str, outcome: str, reason: str) -> None:
        status = self._status
        self._journal.note(CommandRow(key, self._wall_ns(), status.run_id, kind, status.global_step, outcome, reason))

    def _decision(self, kind: str, step: int, reason: str) -> None:
        """Writes the row of a decision; a process that repeats it after a crash writes the same one again."""
        status = self._status
        key = f"{kind}@{status.run_id}/{status.attempt}/{step}"
        self._journal.note(CommandRow(key, self._wall_ns(), status.run_id, kind, step, "applied", reason))

    def _open_row(self, raised: EmergencyState | Signal) -> None:
        """Writes the row of a signal, unless an equal one is open."""
        level, reason, origin = level_name(raised.level), raised.reason, raised.origin
        signal = (level, reason, origin)
        if signal in self._open:
            return
        key = (uuid.uuid4().hex, self._wall_ns())
        active = self._active
        # Raised again from the journal; or adopted from the board, which cuts reasons and names the block as origin.
        if active is not None and active.level == level and reason and active.reason.startswith(reason):
            key, origin, reason, self._active = (active.emergency_id, active.at_ns), active.origin, active.reason, None
        row = EmergencyRow(*key, self._status.run_id, level, origin, self._status.global_step, reason)
        self._open[signal] = row
        self._journal.note(row)


def _is_notice(state: EmergencyState) -> bool:
    """Whether Tolaria itself has raised the lowest level, for one of the reasons that have it."""
    return state.level == EMERGENCY_LEVEL_NOTICE and state.reason.partition(":")[0] in _NOTICES
