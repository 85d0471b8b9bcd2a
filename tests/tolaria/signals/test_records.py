from __future__ import annotations

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.signals.records import ParticipantRecord, standing_signals

NOTICE = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
ELEVATED = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED
HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def test_records_the_highest_level_counts_first() -> None:
    """Signals come by level, and blocks without one do not appear."""
    signals = standing_signals(
        {
            "tolaria": ParticipantRecord(NOTICE, "a", 1, 10),
            "kasmina": ParticipantRecord(),
            "tamiyo": ParticipantRecord(HALT, "b", 2, 30),
            "sentinel": ParticipantRecord(ELEVATED, "c", 3, 20),
        }
    )
    assert [signal.origin for signal in signals] == ["tamiyo", "sentinel", "tolaria"]


def test_records_between_equals_the_first_raised_counts() -> None:
    """The first cause is the one that is acted on."""
    signals = standing_signals(
        {"tolaria": ParticipantRecord(HALT, "late", 1, 20), "tamiyo": ParticipantRecord(HALT, "early", 2, 10)}
    )
    assert [signal.reason for signal in signals] == ["early", "late"]


def test_records_clearing_voids_what_was_raised_until_then() -> None:
    """A signal raised at or before the clearing is void, one raised after it stands."""
    records = {
        "tolaria": ParticipantRecord(cleared_ns=20),
        "kasmina": ParticipantRecord(HALT, "before", 1, 20),
        "tamiyo": ParticipantRecord(NOTICE, "after", 2, 21),
    }
    assert [signal.reason for signal in standing_signals(records)] == ["after"]


def test_records_only_tolaria_and_operator_clear_for_others() -> None:
    """What a peer writes into its clearing time voids nothing."""
    halt = ParticipantRecord(HALT, "x", 1, 10)
    assert len(standing_signals({"tamiyo": halt, "kasmina": ParticipantRecord(cleared_ns=50)})) == 1
    assert standing_signals({"tamiyo": halt, "operator": ParticipantRecord(cleared_ns=50)}) == ()
