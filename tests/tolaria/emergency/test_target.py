from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tolaria.emergency.target import ServiceProcess

PATIENCE_S = 30.0


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_a_process_lives_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    """Its end wakes the waiter, also before anybody has collected its exit code."""
    with ServiceProcess(child.pid, while_open=None) as service:
        assert not service.ended_within(0)
        service.send(signal.SIGKILL)
        assert service.ended_within(PATIENCE_S)
        service.send(signal.SIGTERM)  # to nobody
    assert child.wait() == -signal.SIGKILL


def test_the_end_of_the_input_counts_as_the_end(child: subprocess.Popen[bytes]) -> None:
    """What is written to it does not."""
    read, write = os.pipe()
    with ServiceProcess(child.pid, while_open=read) as service:
        os.write(write, b"x")
        assert not service.ended_within(PATIENCE_S)
        os.close(write)
        assert service.ended_within(PATIENCE_S)
    os.close(read)


def test_there_must_be_a_process(child: subprocess.Popen[bytes]) -> None:
    """Whoever is to watch nobody must say so."""
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        ServiceProcess(child.pid, while_open=None)
