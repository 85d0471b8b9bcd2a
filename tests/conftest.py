"""What every test gets: asyncio as the backend, and a loop on which nothing may block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
import structlog
import torch
from anyio._backends._asyncio import TestRunner
from blockbuster import BlockBuster, blockbuster_ctx
from structlog.typing import EventDict

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags that turn short forms into long ones; README, "Tests", lists them."""
    parser.addoption("--long", action="store_true", help="run the long forms of tests that have one")
    parser.addoption("--fuzz-cases", type=int, default=150, help="requests and answers that each fuzzing test makes up")


@pytest.fixture
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    """How many requests or answers a fuzzing test makes up."""
    cases: int = request.config.getoption("--fuzz-cases")
    return cases


@pytest.fixture(autouse=True, scope="session")
def grpc_stays_up() -> Iterator[None]:
    """Hold gRPC's poller thread: the last channel or server to go would join it, on a loop where nothing may block."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(autouse=True, scope="session")
def late_grpc_events_are_ignored(grpc_stays_up: None) -> Iterator[None]:
    """Ignores events of gRPC, whose one queue delivers them to the next test's loop if they are late for their own."""
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
    """Async tests run on asyncio, which gRPC needs."""
    return "asyncio"


def _drop(_logger: object, _method: str, _event: EventDict) -> EventDict:
    raise structlog.DropEvent


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Log lines go nowhere, unless a test sends them somewhere."""
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Make every blocking call on the event loop raise."""
    with blockbuster_ctx("tolaria") as guard:
        yield guard
