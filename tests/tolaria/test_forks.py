from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from tolaria import forks


def in_fork(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a fork of this process."""
    pid = os.fork()
    if not pid:
        code = 2
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def is_open(descriptor: int) -> bool:
    """Whether the descriptor refers to anything."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_forks_close_private_descriptors() -> None:
    """A fork does not keep a pipe open, whose end means the end of this process; others stay open."""
    reading, writing = os.pipe()
    forks.keep_private(writing)
    assert in_fork(lambda: is_open(reading) and not is_open(writing))
    assert is_open(writing)
    forks.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_number_that_is_used_again_is_not_closed() -> None:
    """A descriptor that something else has closed is known by what it was opened for."""
    reading, writing = os.pipe()
    forks.keep_private(writing)
    os.close(writing)
    again = os.dup2(os.open(os.devnull, os.O_RDONLY), writing)
    assert in_fork(lambda: is_open(again))
    forks.close(again)
    os.close(reading)


def test_forks_close_listening_sockets() -> None:
    """Clients of a service that was killed are refused, and its successor can bind the port."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        forks.keep_sockets_private(server.getsockname()[1])
        assert in_fork(lambda: is_open(other.fileno()) and not is_open(server.fileno()))


@pytest.mark.anyio
async def test_signals_of_a_fork_do_not_arrive_in_the_event_loop() -> None:
    """Its handlers are the defaults, so that it ends by SIGTERM, and nothing is written to the wake-up descriptor."""
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert in_fork(lambda: signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1)
        os.kill(os.getpid(), signal.SIGTERM)
        async for number in signals:
            assert number == signal.SIGTERM
            break


@pytest.mark.anyio
async def test_forks_wait_while_a_program_is_being_started() -> None:
    """They would inherit the pipe on which it reports errors. The wait for a fork does not block the loop."""
    order: list[str] = []
    begun = threading.Event()

    def fork() -> None:
        begun.set()
        assert in_fork(lambda: True)
        order.append("forked")

    thread = threading.Thread(target=fork)
    async with forks.without_forks():
        thread.start()
        await anyio.to_thread.run_sync(begun.wait)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        order.append("started")
    await anyio.to_thread.run_sync(thread.join)
    assert order == ["started", "forked"]
