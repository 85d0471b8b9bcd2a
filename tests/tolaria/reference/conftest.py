"""What the tests of the reference peers share."""

from __future__ import annotations

from collections.abc import Iterator

import grpc.aio
import pytest


@pytest.fixture(autouse=True, scope="session")
def grpc_stays_up() -> Iterator[None]:
    """Hold gRPC's poller thread: the last server to go would join it, on a loop where nothing may block."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()
