"""The environment of a service that systemd has started with `Type=notify`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG_US, _WATCHDOG_PID = "WATCHDOG_USEC", "WATCHDOG_PID"
_US_PER_S: Final = 1e6


@dataclass(frozen=True, slots=True)
class NotifySocket:
    """Where this process reports to its service manager.

    Attributes:
        address: of a datagram socket, as the socket module takes it; empty if no manager waits for reports.
        watchdog_s: time without a report after which the manager ends the process; 0 for none.
    """

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def take(cls) -> NotifySocket:
        """Returns what the environment says, and removes it: the reports of child processes are not the service's."""
        address = os.environ.pop(_SOCKET, "")
        watchdog_us, pid = os.environ.pop(_WATCHDOG_US, ""), os.environ.pop(_WATCHDOG_PID, "")
        if not address.startswith(("/", "@")):  # other kinds of sockets are of no service manager that is known
            return cls()
        watched = watchdog_us.isascii() and watchdog_us.isdigit() and pid in {"", str(os.getpid())}
        name = f"\0{address[1:]}" if address.startswith("@") else address
        return cls(name, int(watchdog_us) / _US_PER_S if watched else 0.0)
