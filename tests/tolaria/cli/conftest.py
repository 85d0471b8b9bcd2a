from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.fake_admin import FakeAdmin, serving

_EXIT_TIMEOUT_S = 180.0


@pytest.fixture(autouse=True)
def isolated_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Removes TOLARIA_ variables and profiles, and changes to a directory without a tolaria.toml."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no profiles"))
    for name in list(os.environ):
        if name.startswith("TOLARIA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve_fake() -> Iterator[Callable[[FakeAdmin], str]]:
    """Serves a fake admin service until the test ends; returns its address."""
    with ExitStack() as stack:
        yield lambda admin: stack.enter_context(serving(admin))


class ChildFifo:
    """A FIFO that child processes hold open while they run, so that their exit can be waited for."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_for_exit(self) -> list[dict[str, Any]]:
        """Waits until every child has exited; returns the JSON lines that they wrote."""
        written = b""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLHUP)
        deadline = time.monotonic() + _EXIT_TIMEOUT_S
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (data := os.read(self._fd, 65536)):
                return [json.loads(line) for line in written.splitlines()]
            written += data
        raise AssertionError(f"the child process did not exit; it wrote {written!r}")

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def child_fifo(tmp_path: Path) -> Iterator[ChildFifo]:
    """A FIFO for the child processes of a test."""
    fifo = ChildFifo(tmp_path / "child-fifo")
    yield fifo
    fifo.close()
