"""Notes in the journal what a run goes through: commands, emergencies. Never waits; the archive writes.

Owns which rows there are. Must not know what is decided by anybody.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from leyline.v1.commands_pb2 import AdaptationCommand
from tolaria.emergency import Cleared, Escalated, HeldBack, Report
from tolaria.emergency.protocol import EmergencyState
from tolaria.errors import CommandRejectedError
from tolaria.journal.rows import CommandRow, EmergencyRow, Row, RunRow
from tolaria.training.progress import Progress
from tolaria.training.record_emergency import level_word
from tolaria.training.recovery.listing import command_row, emergency_row

_UNVERIFIED = "unverified"


class Chronicle:
    """Of one run. Used on the event loop only.

    Args:
        note: has a row written some time soon.
        progress: tells run and step.
        run: the run's row.
        standing: the emergency that the run came with, raised once more: it has its row already.
        wall_ns: Unix time.
    """

    def __init__(
        self,
        note: Callable[[Row], None],
        progress: Progress,
        run: RunRow,
        *,
        standing: EmergencyRow | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._run = run
        self._note = note
        self._progress = progress
        self._wall_ns = wall_ns
        self._standing = standing
        self._emergency: tuple[str, int] = ("", 0)

    def scale(self, scale: str) -> None:
        """What the run's health is measured against now; noted where it has changed."""
        if scale != self._run.scale:
            self._run = replace(self._run, scale=scale)
            self._note(self._run)

    def applied(self, command: AdaptationCommand) -> None:
        """A command has taken effect."""
        self._note(command_row(command, at_ns=self._wall_ns(), run_id=self._run_id, global_step=self._step))

    def rejected(self, rejection: CommandRejectedError) -> None:
        """A command failed a check and changed nothing."""
        at_ns = self._wall_ns()
        key = f"{rejection.command_id}@{at_ns}"  # a replayed one must not take the place of the one that was applied
        self._note(CommandRow(key, at_ns, self._run_id, _UNVERIFIED, self._step, "rejected", rejection.reason))

    def emergency(self, report: Report) -> None:
        """Something has happened to emergencies; what only repeats is left out."""
        match report:
            case Escalated():
                self._emergency = self._key_of(report.state)
                self._note(self._row_of(report.state, cleared_at_ns=None))
            case Cleared():
                self._note(self._row_of(report.before, cleared_at_ns=self._wall_ns()))
            case HeldBack():
                signal = report.notice.signal
                self._note(
                    EmergencyRow(
                        emergency_id=uuid.uuid4().hex,
                        at_ns=self._wall_ns(),
                        run_id=self._run_id,
                        level=level_word(signal.level),
                        origin=signal.origin,
                        global_step=self._step,
                        reason=f"told later: {signal.reason}",
                    )
                )
            case _:
                pass  # acknowledgements and the like are in the log

    def _key_of(self, state: EmergencyState) -> tuple[str, int]:
        standing, self._standing = self._standing, None
        if standing is not None and (standing.reason, standing.origin) == (state.reason, state.origin):
            return standing.emergency_id, standing.at_ns
        return uuid.uuid4().hex, self._wall_ns()

    def _row_of(self, state: EmergencyState, *, cleared_at_ns: int | None) -> EmergencyRow:
        emergency_id, at_ns = self._emergency if self._emergency[0] else (uuid.uuid4().hex, self._wall_ns())
        return emergency_row(
            emergency_id,
            state,
            at_ns=at_ns,
            run_id=self._run_id,
            global_step=self._step,
            cleared_at_ns=cleared_at_ns,
        )

    @property
    def _run_id(self) -> str:
        return self._progress.run_id

    @property
    def _step(self) -> int:
        return self._progress.global_step
