from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from tolaria.config import NotifySocket
from tolaria.service.notify import STATUS_INTERVAL_S, Notifier

pytestmark = pytest.mark.anyio


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager, bound to the file `manager` in tmp_path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "manager"))
        bound.setblocking(False)
        yield bound


def received(manager: socket.socket) -> list[str]:
    """What has arrived, oldest first."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
OWN = str(os.getpid())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("", "", ""), NotifySocket()),
        (("/run/s", "", ""), NotifySocket("/run/s")),
        (("@s@1", "", ""), NotifySocket("\0s@1")),
        (("/run/s", "3000000", OWN), NotifySocket("/run/s", 3.0)),
        (("/run/s", "3000000", ""), NotifySocket("/run/s", 3.0)),
        (("/run/s", "3000000", "1"), NotifySocket("/run/s")),  # of another process
        (("/run/s", "soon", OWN), NotifySocket("/run/s")),
        (("vsock:2:1", "3000000", OWN), NotifySocket()),
    ],
)
def test_environment_is_read_and_removed(
    values: tuple[str, str, str], expected: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Child processes do not inherit it."""
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    assert NotifySocket.take() == expected
    assert not set(VARIABLES) & set(os.environ)


async def test_reports_say_ready_alive_and_what_the_run_does(manager: socket.socket, tmp_path: Path) -> None:
    """At once, and again within a third of the watchdog's time."""
    notifier = Notifier(NotifySocket(str(tmp_path / "manager"), watchdog_s=0.03))
    lines = iter(["running,\nepoch 1"] + ["x" * 1000] * 1000)
    reports: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifier.serve, lambda: next(lines))
        while len(reports) < 3:
            await anyio.sleep(0.005)
            reports += received(manager)
        tasks.cancel_scope.cancel()
    assert reports[0] == "READY=1\nWATCHDOG=1\nSTATUS=running, epoch 1"
    assert len(reports[1]) < 300
    notifier.stopping("finished")
    assert received(manager)[-1] == "STOPPING=1\nSTATUS=finished"


@pytest.mark.parametrize(("watchdog_s", "expected"), [(0.0, STATUS_INTERVAL_S), (120.0, STATUS_INTERVAL_S), (3.0, 1.0)])
def test_interval_is_a_third_of_the_watchdogs(watchdog_s: float, expected: float) -> None:
    """Two reports may be lost."""
    assert Notifier(NotifySocket("/s", watchdog_s)).interval_s == expected


async def test_without_a_manager_nothing_is_reported() -> None:
    """`serve` returns at once."""
    notifier = Notifier(NotifySocket())
    await notifier.serve(lambda: pytest.fail("nothing to report to"))
    notifier.stopping("finished")


async def test_a_manager_that_does_not_read_blocks_nothing(manager: socket.socket, tmp_path: Path) -> None:
    """Reports that do not fit are lost, with one warning until one arrives again."""
    notifier = Notifier(NotifySocket(str(tmp_path / "manager")))
    with capture_logs() as log:
        for _ in range(3000):  # more than a socket holds
            notifier.stopping("finished")
        received(manager)
        notifier.stopping("once more")
        (tmp_path / "manager").unlink()
        notifier.stopping("finished")
        notifier.stopping("finished")
    assert [entry["event"] for entry in log] == ["service_manager_not_reached"] * 2
    assert received(manager) == ["STOPPING=1\nSTATUS=once more"]
