"""Why the signal board cannot do what was asked. Must not know memory or files."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class SignalError(TolariaError):
    """Base of what can go wrong with the signal board."""


class BoardRefusedError(SignalError):
    """Raised when a file cannot be used as a board.

    `reason` is its stable name: missing, io, platform, foreign, truncated, version, size, header, run or replaced.
    """

    def __init__(self, path: str, reason: str, detail: str) -> None:
        self.path = path
        self.reason = reason
        self.detail = detail
        super().__init__(f"{path} is refused ({reason}): {detail}")


class BoardBusyError(SignalError):
    """Raised when a board is to be created under a name that another living process holds."""


class BoardLostError(SignalError):
    """Raised when an attached board has been closed or its file was cut short."""


class BlockOwnedError(SignalError):
    """Raised when a block of the board is to be written by who does not own it."""


class SignalValueError(SignalError):
    """Raised when something does not belong on the board: an unknown level or name, a level below the standing one."""
