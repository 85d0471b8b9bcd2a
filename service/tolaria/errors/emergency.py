"""Why an emergency or conservative mode does not go as asked. Must not know boards or processes."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class EmergencyError(TolariaError):
    """Base of what can go wrong with emergencies."""


class UnknownLevelError(EmergencyError):
    """Raised when an emergency of a level is asked for that does not exist; nothing has changed."""


class IllegalEmergencyEventError(EmergencyError):
    """Raised when something cannot happen to an emergency as it stands; nothing has changed."""


class ClearanceRefusedError(EmergencyError):
    """Raised when a rule asks for what only an operator may: to clear a halt, above all; nothing has changed."""


class BroadcastFailedError(EmergencyError):
    """Raised by whoever broadcasts emergencies when one could not be handed over; it will be tried again."""


class IllegalModeEventError(TolariaError):
    """Raised when a reason for conservative mode was told what cannot happen to it; nothing has changed."""
