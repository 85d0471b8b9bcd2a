from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_SEED,
    EMERGENCY_LEVEL_ELEVATED,
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_NOTICE,
    CommandType,
)
from leyline.v1.state_pb2 import SystemStatePacket
from support.admin import MemoryJournal
from support.checkpointing import epoch_done
from tolaria.emergency import RESPONSES, Cleared, Clearer, Covered, EmergencyState, Escalated
from tolaria.errors import CommandRejectedError
from tolaria.journal.rows import CommandRow, EmergencyRow, RunRow
from tolaria.lane.messages import LaneReady
from tolaria.peers.consultation import Consultation
from tolaria.run.journal_observer import JournalObserver
from tolaria.run.status import RunStatus
from tolaria.signals.layout import Signal
from tolaria.values.optimization import ScheduledRates
from tolaria.values.training import EpochProgress, Position

READY = LaneReady(Position(0, 0), EpochProgress(), 4, "cpu", "2", {}, (), (), {}, (), ())
SMOKE = EmergencyState(level=EMERGENCY_LEVEL_HALT, reason="smoke", origin="sentinel")


class ObservedRun:
    """An observer of a run at step 3 whose clock is set by the test."""

    def __init__(self, active: EmergencyRow | None = None, ended: Sequence[EmergencyRow] = ()) -> None:
        self.journal = MemoryJournal()
        self.now_ns = 7
        status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0)
        status.global_step = 3
        self.observer = JournalObserver(
            self.journal, status, RunRow("run", 0, "job"), active=active, ended=ended, wall_ns=lambda: self.now_ns
        )

    def escalate(self) -> None:
        """Observes a halt."""
        self.observer.on_emergency(Escalated(SMOKE, RESPONSES[EMERGENCY_LEVEL_HALT], ""))

    def clear(self) -> None:
        """Observes its clearance."""
        self.observer.on_emergency(Cleared(SMOKE, Clearer.OPERATOR, "no smoke", "operator"))


@pytest.mark.parametrize(("kind", "name"), [(COMMAND_SEED, "seed"), (CommandType.ValueType(77), "77")])
def test_an_applied_command_is_a_row_with_its_id(kind: CommandType.ValueType, name: str) -> None:
    """An unknown type of command is named by its number."""
    observed = ObservedRun()
    command = AdaptationCommand(command_id="c", command_type=kind)
    observed.observer.on_command_applied(Consultation(SystemStatePacket(), command=command))
    assert observed.journal.noted == [CommandRow("c", 7, "run", name, 3, "applied", "")]


def test_a_rejected_command_does_not_replace_an_applied_one() -> None:
    """Its key has the time, so that a replay gets another row; its type has not been verified."""
    observed = ObservedRun()
    for observed.now_ns in (8, 9):
        observed.observer.on_command_rejected(CommandRejectedError("replayed", "c", "again"))
    assert observed.journal.noted == [
        CommandRow("c@8", 8, "run", "unverified", 3, "rejected", "replayed"),
        CommandRow("c@9", 9, "run", "unverified", 3, "rejected", "replayed"),
    ]


def test_what_a_schedule_and_early_stopping_decide_has_a_row() -> None:
    """Once in an attempt: a process that repeats the epoch writes the same row again."""
    observed = ObservedRun()
    rates = ScheduledRates("ReduceLROnPlateau of the job, by epoch on mae", "mae 0.5", {"host": 0.2}, {"host": 0.1})
    epoch = replace(epoch_done(30), scheduled=rates, stop="stopped early: mae was 0.5")
    observed.observer.on_epoch(epoch_done(20), show_layers=False)
    observed.observer.on_epoch(epoch, show_layers=False)
    scheduled, stopped = observed.journal.noted
    assert isinstance(scheduled, CommandRow)
    assert json.loads(scheduled.reason) == asdict(rates)
    key = "learning_rate_scheduled"
    assert replace(scheduled, reason="") == CommandRow(f"{key}@run/1/30", 7, "run", key, 30, "applied", "")
    assert stopped == CommandRow(
        "stopped_early@run/1/30", 7, "run", "stopped_early", 30, "applied", "stopped early: mae was 0.5"
    )


def test_an_emergency_and_its_clearance_are_one_row() -> None:
    """The second row has the key of the first one and the time of the clearance."""
    observed = ObservedRun()
    observed.escalate()
    observed.now_ns = 9
    observed.clear()
    raised, cleared = observed.journal.noted
    assert isinstance(raised, EmergencyRow)
    assert raised == EmergencyRow(raised.emergency_id, 7, "run", "halt", "sentinel", 3, "smoke")
    assert cleared == EmergencyRow(raised.emergency_id, 7, "run", "halt", "sentinel", 3, "smoke", 9)


def test_a_resumed_emergency_keeps_its_row() -> None:
    """The halt that the run was resumed with is raised again under the key of the earlier process."""
    observed = ObservedRun(EmergencyRow("e", 1, "run", "halt", "sentinel", 2, "smoke"))
    observed.escalate()
    assert observed.journal.noted == [EmergencyRow("e", 1, "run", "halt", "sentinel", 3, "smoke")]


def row(key: str, level: str, reason: str, origin: str = "operator") -> EmergencyRow:
    """An emergency at step 3 that was not cleared."""
    return EmergencyRow(key, 1, "run", level, origin, 3, reason)


def test_a_critical_signal_that_an_active_level_covers_has_a_row() -> None:
    """Each reason once; lower levels have none. All rows of an emergency are cleared with it."""
    observed = ObservedRun()
    observed.escalate()
    for _ in range(3):
        observed.observer.on_emergency(Covered(Signal("kasmina", EMERGENCY_LEVEL_HALT, "fire", 9, 1)))
        observed.observer.on_emergency(Covered(Signal("tolaria", EMERGENCY_LEVEL_ELEVATED, "slow", 0, 1)))
        observed.observer.on_emergency(Covered(Signal("sentinel", EMERGENCY_LEVEL_HALT, "smoke", 8, 1)))
    rows = [entry for entry in observed.journal.noted if isinstance(entry, EmergencyRow)]
    assert [(entry.reason, entry.cleared_at_ns) for entry in rows] == [("smoke", None), ("fire", None)]
    observed.now_ns = 9
    observed.clear()
    assert observed.journal.noted[2:] == [replace(entry, cleared_at_ns=9) for entry in rows]


def test_an_escalation_leaves_no_row_open() -> None:
    """The row of the lower level is cleared too."""
    observed = ObservedRun()
    lower = EmergencyState(level=EMERGENCY_LEVEL_ELEVATED, reason="slow", origin="tolaria")
    observed.observer.on_emergency(Escalated(lower, RESPONSES[EMERGENCY_LEVEL_ELEVATED], ""))
    observed.escalate()
    observed.clear()
    last = {entry.reason: entry.cleared_at_ns for entry in observed.journal.noted if isinstance(entry, EmergencyRow)}
    assert last == {"slow": 7, "smoke": 7}


def test_a_late_boundary_is_no_incident() -> None:
    """On a busy machine there would be one in every epoch; one that an operator raises, or a higher level, is."""
    observed = ObservedRun()
    late = EmergencyState(level=EMERGENCY_LEVEL_NOTICE, reason="boundary_breach: over budget", origin="tolaria")
    for report in (Escalated(late, RESPONSES[EMERGENCY_LEVEL_NOTICE], ""), Cleared(late, Clearer.RECOVERED, "", "")):
        observed.observer.on_emergency(report)
    assert observed.journal.noted == []
    for reason, level in (("look here", EMERGENCY_LEVEL_NOTICE), ("breaker_open: tamiyo", EMERGENCY_LEVEL_ELEVATED)):
        observed.observer.on_emergency(Escalated(replace(late, reason=reason, level=level), RESPONSES[level], ""))
    observed.observer.on_emergency(Cleared(late, Clearer.RECOVERED, "", ""))
    last = {entry.reason: entry.cleared_at_ns for entry in observed.journal.noted if isinstance(entry, EmergencyRow)}
    assert last == {"look here": 7, "breaker_open: tamiyo": 7}


def test_a_halt_adopted_from_the_board_is_the_one_in_the_journal() -> None:
    """The board names its block as the origin and cuts the reason; a second row would halt the next process again."""
    kept = row("e", "halt", "smoke in the second room")
    observed = ObservedRun(kept)
    adopted = EmergencyState(level=EMERGENCY_LEVEL_HALT, reason="smoke in the", origin="tolaria")
    observed.observer.on_emergency(Escalated(adopted, RESPONSES[EMERGENCY_LEVEL_HALT], ""))
    observed.clear()
    assert observed.journal.noted == [kept, replace(kept, cleared_at_ns=7)]


def test_clearing_completes_the_resumed_halt_whatever_was_raised_since() -> None:
    """It was active until now, although another halt was adopted from the board first."""
    kept = row("e", "halt", "fire")
    observed = ObservedRun(kept)
    observed.escalate()
    observed.clear()
    assert replace(kept, cleared_at_ns=7) in observed.journal.noted


def test_emergencies_below_halt_ended_with_their_process() -> None:
    """Their rows are completed when the next process begins."""
    ended = [row("a", "elevated", "slow"), row("b", "halt", "silent", "sentinel")]
    observed = ObservedRun(ended=ended)
    observed.observer.on_ready(READY)
    assert observed.journal.noted == [replace(entry, cleared_at_ns=7) for entry in ended]


def test_the_health_record_is_written_when_it_changes() -> None:
    """It is part of the run's row."""
    observed = ObservedRun()
    for saved in ("", "{}", "{}", '{"a": 1}'):
        observed.observer.on_health(saved)
    assert observed.journal.noted == [RunRow("run", 0, "job", scale=saved) for saved in ("{}", '{"a": 1}')]
