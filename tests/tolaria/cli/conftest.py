from __future__ import annotations

import json
import os
import runpy
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

from leyline.v1.admin_service_pb2 import GetStatusResponse

_ENDS_WITHIN_S = 20.0
# fake_serve.py, which runs as a process of its own, has it from the same file.
_FAKES = runpy.run_path(str(Path(__file__).with_name("fake_admin.py")))


@pytest.fixture(autouse=True)
def last_channel_may_go(blockbuster: BlockBuster) -> None:
    """GRPC joins its poller thread when the last channel goes: a command's loop has nothing else to do by then."""
    blockbuster.functions["threading.Lock.acquire"].can_block_in("threading.py", "_wait_for_tstate_lock")


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings from this machine: neither its environment nor a tolaria.toml in the working directory."""
    for name in list(os.environ):
        if name.startswith("TOLARIA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def status_of() -> Callable[..., GetStatusResponse]:
    """Makes the status of a run at the begin of an epoch."""
    make: Callable[..., GetStatusResponse] = _FAKES["status_of"]
    return make


@pytest.fixture
def whole_run() -> list[GetStatusResponse]:
    """Three epochs and the end."""
    statuses: list[GetStatusResponse] = _FAKES["whole_run"]()
    return statuses


@pytest.fixture
def fake_admin() -> Callable[..., Any]:
    """Makes a service that answers from a script."""
    make: Callable[..., Any] = _FAKES["fake_admin"]
    return make


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[str]]:
    """Serves a fake, at an address if one is given."""
    serve: Callable[..., AbstractContextManager[str]] = _FAKES["serving"]
    return serve


@pytest.fixture
def serve_fake(serving: Callable[..., AbstractContextManager[str]]) -> Iterator[Callable[[Any], str]]:
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
