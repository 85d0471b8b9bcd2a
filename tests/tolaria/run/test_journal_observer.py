from __future__ import annotations

import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_SEED, EMERGENCY_LEVEL_HALT, CommandType
from leyline.v1.state_pb2 import SystemStatePacket
from support.admin import MemoryJournal
from tolaria.emergency import RESPONSES, Cleared, Clearer, EmergencyState, Escalated
from tolaria.errors import CommandRejectedError
from tolaria.journal.rows import CommandRow, EmergencyRow, RunRow
from tolaria.peers.consultation import Consultation
from tolaria.run.journal_observer import JournalObserver
from tolaria.run.status import RunStatus

SMOKE = EmergencyState(level=EMERGENCY_LEVEL_HALT, reason="smoke", origin="sentinel")


class ObservedRun:
    """An observer of a run at step 3 whose clock is set by the test."""

    def __init__(self, active: EmergencyRow | None = None) -> None:
        self.journal = MemoryJournal()
        self.now_ns = 7
        status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0)
        status.global_step = 3
        self.observer = JournalObserver(
            self.journal, status, RunRow("run", 0, "job"), active=active, wall_ns=lambda: self.now_ns
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


def test_the_health_record_is_written_when_it_changes() -> None:
    """It is part of the run's row."""
    observed = ObservedRun()
    for saved in ("", "{}", "{}", '{"a": 1}'):
        observed.observer.on_health(saved)
    assert observed.journal.noted == [RunRow("run", 0, "job", scale=saved) for saved in ("{}", '{"a": 1}')]
