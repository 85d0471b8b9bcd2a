from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tolaria import probe

STATUS = health_pb2.HealthCheckResponse


@contextmanager
def health_server(**services: int) -> Iterator[str]:
    """A gRPC server on loopback with the status of each service; yields its address."""
    servicer = health.HealthServicer()
    for name, status in services.items():
        servicer.set(name.replace("_", "."), status)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_exit_code_follows_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    """0 for a service that serves, else 1 and one line with the reason; the empty name is that of the whole server."""
    with health_server(a_Admin=STATUS.SERVING, b_Training=STATUS.NOT_SERVING) as address:
        codes = [probe.main([address, *names]) for names in ([], ["a.Admin"], ["b.Training"], ["unknown"])]
    assert codes == [0, 0, 1, 1]
    assert capsys.readouterr().err.splitlines() == [
        f"b.Training at {address} is NOT_SERVING",
        f"{address} does not answer: NOT_FOUND",
    ]


def test_a_server_that_has_stopped_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that has stopped does not answer."""
    with health_server(a=STATUS.SERVING) as address:
        pass
    assert probe.main([address]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"]])
def test_wrong_arguments_are_another_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With the usage."""
    assert probe.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")
