"""What keeps a peer from doing what was asked: the call, its breaker, a seed's life. Must not know transports."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class PeerError(TolariaError):
    """Base of what can go wrong with a call to a peer. `peer` names it."""

    def __init__(self, peer: str, detail: str) -> None:
        self.peer = peer
        self.detail = detail
        super().__init__(f"{peer}: {detail}")


class PeerTimeoutError(PeerError):
    """Raised when a call did not answer within its deadline; its handler has been cancelled."""


class PeerUnavailableError(PeerError):
    """Raised when a peer cannot be reached or answers with an error status."""


class PeerProtocolError(PeerError):
    """Raised when a peer's answer breaks the contract: NaN, unknown enum values, double ids."""


class BreakerOpenError(PeerError):
    """Raised instead of calling a peer whose circuit breaker is open."""


class CallRefusedError(PeerError):
    """Raised instead of calling a peer to which too many calls are in flight, or whose channel is closing."""


class IllegalBreakerSignalError(TolariaError):
    """Raised when a signal cannot happen to a circuit breaker in its state; nothing has changed."""


class LifecycleError(TolariaError):
    """Base of why a seed stays in its stage."""


class IllegalMoveError(LifecycleError):
    """Raised when no table allows a seed's move; nothing has changed."""


class GateShutError(LifecycleError):
    """Raised when the gate on a seed's way is not open; nothing has changed."""
