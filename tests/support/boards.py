"""A signal board's clock and file, for tests."""

from __future__ import annotations

from pathlib import Path

from tolaria.signals import PARTICIPANTS, SignalBoard
from tolaria.signals.layout import LINE, PARTICIPANT_PAYLOAD, participant_at


def acknowledgements(board: SignalBoard, signal_id: int) -> dict[str, int]:
    """The times (monotonic ns) at which participants acknowledged a signal, by participant."""
    return {
        state.name: state.record.acknowledged_ns
        for state in board.read_all()
        if state.record is not None and state.record.acknowledged_id == signal_id
    }


class BoardClock:
    """Monotonic nanoseconds that advance by one microsecond at each call."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def __call__(self) -> int:
        self.now_ns += 1000
        return self.now_ns


class BoardBytes:
    """The board's file, accessed as another program would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_word(self, at: int) -> int:
        """The 64-bit word at an offset."""
        return int.from_bytes(self.path.read_bytes()[at : at + 8], "little")

    def write(self, at: int, data: bytes) -> None:
        """Overwrites bytes."""
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def flip_bit(self, at: int) -> None:
        """Flips one bit of a byte."""
        self.write(at, bytes([self.path.read_bytes()[at] ^ 0x40]))

    def payload_at(self, participant: str, *, other: bool = False) -> int:
        """The offset of a participant's current payload, or of the other copy."""
        block = participant_at(PARTICIPANTS.index(participant))
        return block + LINE + ((self.read_word(block) + other) & 1) * PARTICIPANT_PAYLOAD
