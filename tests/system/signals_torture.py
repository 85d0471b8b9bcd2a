"""Two processes on one board, one publishing and one reading without pause: no torn value may be accepted.

    python tests/system/signals_torture.py --writes 1000000

Every value carries the same number in all its fields, so a mixture of two writes is detected. The reader continues
until the writer is done, and reads at least as often as it writes; then it must see the last value. Prints the counts
as JSON; exit status 1 when a torn value was accepted, a block was damaged or a number went backwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.signals import BlockCondition, RollbackState, SignalBoard

_HALT = EmergencyLevel.EMERGENCY_LEVEL_HALT


def write(path: Path, writes: int) -> None:
    """Writes increasing numbers, each to the signal, the heartbeat and the rollback block."""
    number = 0

    def clock() -> int:
        return number | number << 32

    with SignalBoard.attach(path, clock=clock) as board:
        participant, rollback = board.claim("kasmina"), board.claim_rollback()
        for number in range(1, writes // 2 + 1):
            participant.raise_level(_HALT, f"{number:08x}" * (number % 20 + 1))
            rollback.write(
                RollbackState.COMMIT,
                rollback_id=f"{number:08x}" * (number % 8 + 1),
                target_step=number,
                deadline_ns=number,
            )
            participant.beat()


def torture(path: Path, writes: int) -> dict[str, int]:
    """Reads while another process writes; returns the counts."""
    counts = {"reads": 0, "accepted": 0, "wrong": 0, "backwards": 0, "torn_heartbeats": 0, "damaged": 0, "lost": 0}
    last = 0
    with SignalBoard.create(path, "torture") as board:
        writer = subprocess.Popen([sys.executable, __file__, "--writer", str(path), "--writes", str(writes)])
        try:
            while writer.poll() is None or counts["reads"] < writes:
                last = _read(board, last, counts)
            counts["lost"] = writes // 2 - _read(board, last, counts)
        finally:
            writer.kill()
            writer.wait()
    return {"writes": writes, **counts}


def _read(board: SignalBoard, last: int, counts: dict[str, int]) -> int:
    state, rollback = board.read("kasmina"), board.read_rollback()
    counts["reads"] += 2
    counts["torn_heartbeats"] += state.heartbeat_ns >> 32 != state.heartbeat_ns & 0xFFFFFFFF
    counts["damaged"] += state.condition is BlockCondition.DAMAGED
    number = last
    if state.condition is BlockCondition.OK and state.record is not None and state.record.reason:
        number = state.record.raised_ns & 0xFFFFFFFF
        counts["accepted"] += 1
        same = state.record.raised_ns >> 32 == number
        counts["wrong"] += not (same and state.record.reason == f"{number:08x}" * (number % 20 + 1))
        counts["backwards"] += number < last
    if rollback is not None and rollback.rollback_id:
        step = rollback.target_step
        counts["accepted"] += 1
        same = rollback.deadline_ns == step == rollback.changed_ns >> 32 == rollback.changed_ns & 0xFFFFFFFF
        counts["wrong"] += not (same and rollback.rollback_id == f"{step:08x}" * (step % 8 + 1))
    return number


def main() -> int:
    """Runs in a temporary folder: a mapping is shared memory wherever its file is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writes", type=int, default=100_000)
    parser.add_argument("--writer", type=Path)
    arguments = parser.parse_args()
    if arguments.writer is not None:
        write(arguments.writer, arguments.writes)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(Path(folder) / "board", arguments.writes)
    sys.stdout.write(json.dumps(counts) + "\n")
    return int(any(counts[fault] for fault in ("wrong", "backwards", "torn_heartbeats", "damaged", "lost")))


if __name__ == "__main__":
    sys.exit(main())
