"""Fixtures for all tests: asyncio as the backend, and an event loop that must not be blocked."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import grpc.aio
import pytest
import structlog
import torch
from anyio._backends._asyncio import TestRunner
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings
from structlog.typing import EventDict

gc.disable()  # until all is collected
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # how fast an example is depends on what else the machine does

_BUSY_LOOP: Final = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def pytest_collection_finish() -> None:
    """Has the garbage collector leave out what has been imported and collected: looking at it takes long."""
    gc.collect()
    gc.freeze()
    gc.enable()


_LONGEST_FIRST: Final = (
    *(
        "test_rank_deaths",
        "test_lane_deaths",
        "test_rank_moments",
        "test_peer_chaos",
        "test_lane_process",
        "test_ranks",
    ),
    *("test_resume", "test_serve", "test_ends"),
    *("system", "faults", "deploy", "ranks", "trackers", "export", "run", "cli", "lane", "transport"),
)
"""Files and directories of tests."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: one that begins last would have a core alone.

    Skips what is marked `long` or `slow`, unless its option is given.
    """

    def place(item: pytest.Item) -> int:
        names = (item.path.stem, *reversed(item.path.parts))
        return next((_LONGEST_FIRST.index(name) for name in names if name in _LONGEST_FIRST), len(_LONGEST_FIRST))

    items.sort(key=place)
    long, slow = config.getoption("--long"), config.getoption("--slow")
    for item in items:
        if item.get_closest_marker("long") and not long:
            item.add_marker(pytest.mark.skip(reason="a long variant of other tests: needs --long"))
        elif item.get_closest_marker("slow") and not (long or slow):
            item.add_marker(pytest.mark.skip(reason="runs in CI: needs --slow"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options for longer tests; the section "Tests" of the README lists them."""
    parser.addoption("--long", action="store_true", help="run the long variants of tests that have one")
    parser.addoption("--slow", action="store_true", help="run the slow tests too, as CI does")
    parser.addoption("--beside-load", action="store_true", help="run two busy loops beside the tests")
    parser.addoption("--fuzz-cases", type=int, default=150, help="requests or responses per fuzzing test")


@pytest.fixture
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    """The number of requests or responses that a fuzzing test generates."""
    cases: int = request.config.getoption("--fuzz-cases")
    return cases


@pytest.fixture(autouse=True, scope="session")
def load_beside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps two cores busy during the whole session, with `--beside-load`."""
    first = getattr(request.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    count = 2 if request.config.getoption("--beside-load") and first else 0
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(count)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.fixture(autouse=True, scope="session")
def keep_grpc_initialised() -> Iterator[None]:
    """Keeps gRPC's poller thread alive: closing the last channel or server would join it and block the event loop."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(autouse=True, scope="session")
def ignore_late_grpc_events(keep_grpc_initialised: None) -> Iterator[None]:
    """Ignores late events of gRPC, which has a single queue and delivers them to the loop of the next test."""
    report = TestRunner._exception_handler  # noqa: SLF001 - anyio has no other place to filter reports

    def report_others(self: TestRunner, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(self, loop, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TestRunner, "_exception_handler", report_others)
        yield


@pytest.fixture
def anyio_backend() -> str:
    """Runs async tests on asyncio, which gRPC requires."""
    return "asyncio"


def _drop(_logger: object, _method: str, _event: EventDict) -> EventDict:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Discards log lines, unless a test configures structlog itself."""
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Makes every blocking call on the event loop raise an exception."""
    with blockbuster_ctx("tolaria") as guard:
        yield guard
