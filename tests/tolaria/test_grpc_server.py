from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tolaria.errors import BindError
from tolaria.grpc_server import bound_server, grpc_server

pytestmark = pytest.mark.anyio


def no_services(_server: grpc.aio.Server) -> None:
    """Registers no service."""


async def test_health_check_answers_by_part() -> None:
    """Each part has the status that was set; an unknown part is NOT_FOUND."""
    async with grpc_server(await bound_server("x", "127.0.0.1:0"), no_services, service_names=[], grace_s=1) as server:
        await server.set_health("tolaria.training", serving=True)
        await server.set_health("tolaria.tamiyo", serving=False)
        async with grpc.aio.insecure_channel(str(server.address)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are not in its types
            good = await stub.Check(health_pb2.HealthCheckRequest(service="tolaria.training"))
            bad = await stub.Check(health_pb2.HealthCheckRequest(service="tolaria.tamiyo"))
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert (good.status, bad.status) == (1, 2)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_is_served_under_both_names(version: str) -> None:
    """Each version lists the services, itself among them, and describes itself; the messages are equal on the wire."""
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"),
    ]
    async with (
        grpc_server(await bound_server("x", "127.0.0.1:0"), no_services, service_names=["a.B"], grace_s=1) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        method = channel.stream_stream(
            path,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, described = [answer async for answer in method(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"a.B", "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= names
    (file,) = described.file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(file).package == f"grpc.reflection.{version}"


async def test_port_in_use_raises_bind_error() -> None:
    """The message names the server and the address; the port is not shared by SO_REUSEPORT."""
    async with grpc_server(await bound_server("x", "127.0.0.1:0"), no_services, service_names=[], grace_s=1) as server:
        with pytest.raises(BindError, match=f"y cannot listen on {server.address}"):
            await bound_server("y", str(server.address))
