"""Reports to systemd: ready, alive, what the run does, stopping; the protocol of sd_notify, without its library."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

import anyio
import structlog

from tolaria.config import NotifySocket

STATUS_INTERVAL_S: Final = 10.0
"""Time between two reports without a watchdog; with one they come at least three times within its time."""

_STATUS_LENGTH_MAX: Final = 200


class Notifier:
    """Reports to the service manager that has started this process; does nothing without one.

    A report never blocks: one that the manager does not take is lost, and the next one says the same. The event loop
    makes them, so that a loop that hangs is noticed.
    """

    def __init__(self, manager: NotifySocket) -> None:
        self._manager = manager
        self._log = structlog.get_logger()
        self._failing = False

    @property
    def interval_s(self) -> float:
        """Time between two reports."""
        return min(STATUS_INTERVAL_S, self._manager.watchdog_s / 3 or STATUS_INTERVAL_S)

    async def serve(self, status: Callable[[], str]) -> None:
        """Reports that the service is ready and alive, and its status in one line, until cancelled."""
        if not self._manager.address:
            return
        while True:
            line = " ".join(status().split())[:_STATUS_LENGTH_MAX]
            self._send(f"READY=1\nWATCHDOG=1\nSTATUS={line}")
            await anyio.sleep(self.interval_s)

    def stopping(self, status: str) -> None:
        """Reports that the service stops."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def _send(self, report: str) -> None:
        if not self._manager.address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
                channel.sendto(report.encode(), self._manager.address)
        except OSError as error:
            if not self._failing:
                self._log.warning("service_manager_not_reached", error=str(error))
            self._failing = True
        else:
            self._failing = False
