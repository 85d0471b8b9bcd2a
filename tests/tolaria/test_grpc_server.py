from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tolaria.errors import BindError
from tolaria.grpc_server import grpc_server

pytestmark = pytest.mark.anyio


def no_services(_server: grpc.aio.Server) -> None:
    """Registers no service."""


async def test_health_check_answers_by_part() -> None:
    """Each part has the status that was set; an unknown part is NOT_FOUND."""
    async with grpc_server("x", "127.0.0.1:0", no_services, service_names=[], grace_s=1) as server:
        await server.set_health("tolaria.training", serving=True)
        await server.set_health("tolaria.tamiyo", serving=False)
        async with grpc.aio.insecure_channel(str(server.address)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are not in its types
            good = await stub.Check(health_pb2.HealthCheckRequest(service="tolaria.training"))
            bad = await stub.Check(health_pb2.HealthCheckRequest(service="tolaria.tamiyo"))
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert (good.status, bad.status) == (1, 2)


async def test_reflection_lists_the_services() -> None:
    """The names passed to the server and the health service are listed."""
    async with (
        grpc_server("x", "127.0.0.1:0", no_services, service_names=["a.B"], grace_s=1) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        make_stub: Any = reflection_pb2_grpc.ServerReflectionStub  # its types have no asynchronous channel
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [a async for a in make_stub(channel).ServerReflectionInfo(iter([request]))]
    names = {s.name for s in answers[0].list_services_response.service}
    assert {"a.B", "grpc.health.v1.Health"} <= names


async def test_port_in_use_raises_bind_error() -> None:
    """The message names the server and the address; the port is not shared by SO_REUSEPORT."""
    async with grpc_server("x", "127.0.0.1:0", no_services, service_names=[], grace_s=1) as server:
        with pytest.raises(BindError, match=f"y cannot listen on {server.address}"):
            async with grpc_server("y", str(server.address), no_services, service_names=[], grace_s=1):
                pass
