"""A peer on the signal board: its heart beats there, and it acknowledges what others raise.

Owns the waiting. Must not know what the peer does about an emergency: the reference peers hold nothing that goes on
by itself, so that having seen it is having acted.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from tolaria.errors import SignalError
from tolaria.signals import Participant, SignalBoard

_BEAT_S = 1.0
_RETRY_S = 1.0
_log = structlog.get_logger(__name__)


async def attend_board(path: Path, name: str) -> None:
    """A task: attend the board at `path` as participant `name` until cancelled, joining anew when it was replaced."""
    told = ""
    while True:
        try:
            board = await anyio.to_thread.run_sync(SignalBoard.attach, path)
            try:
                _log.info("attending", board=str(path), participant=name)
                await _attend(board, board.claim(name))
            finally:
                # In a thread: it waits for the one that waits on the bell.
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(board.close)
        except SignalError as error:
            if str(error) != told:
                _log.warning("board_not_attended", board=str(path), detail=str(error))
            told = str(error)
        await anyio.sleep(_RETRY_S)


async def _attend(board: SignalBoard, me: Participant) -> None:
    limiter = anyio.CapacityLimiter(1)
    while board.current:
        seen = board.bell  # before reading: what comes in between must not be slept through
        me.beat()
        signal = board.effective()
        if signal is not None and signal.signal_id != me.record.acknowledged_id:
            me.acknowledge(signal.signal_id)
            _log.warning(
                "emergency_acknowledged", emergency_level=signal.level, reason=signal.reason, origin=signal.origin
            )
        await anyio.to_thread.run_sync(board.wait, seen, _BEAT_S, abandon_on_cancel=True, limiter=limiter)
