"""What every test gets: asyncio as the backend, and a loop on which nothing may block."""

from __future__ import annotations

from collections.abc import Iterator

import grpc.aio
import pytest
import structlog
import torch
from blockbuster import BlockBuster, blockbuster_ctx
from structlog.typing import EventDict

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def grpc_stays_up() -> Iterator[None]:
    """Hold gRPC's poller thread: the last channel or server to go would join it, on a loop where nothing may block."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


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
