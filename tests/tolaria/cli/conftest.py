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

_ENDS_WITHIN_S = 20.0


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings from this machine: neither its environment nor a tolaria.toml in the working directory."""
    for name in list(os.environ):
        if name.startswith("TOLARIA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve_fake() -> Iterator[Callable[[FakeAdmin], str]]:
    """Serves a fake until the test ends; gives its address."""
    with ExitStack() as stack:
        yield lambda admin: stack.enter_context(serving(admin))


class Lifeline:
    """A FIFO that a child process holds open while it lives: its end is seen without asking again and again."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def until_gone(self) -> list[dict[str, Any]]:
        """What the children that held it have said of themselves, once all of them are gone."""
        said = b""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLHUP)
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (data := os.read(self._fd, 65536)):
                return [json.loads(line) for line in said.splitlines()]
            said += data
        raise AssertionError(f"the child process did not end; it said {said!r}")

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def lifeline(tmp_path: Path) -> Iterator[Lifeline]:
    """Has a `path` to hold open, and `until_gone`."""
    line = Lifeline(tmp_path / "lifeline")
    yield line
    line.close()
