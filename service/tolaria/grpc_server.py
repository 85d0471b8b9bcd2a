"""A gRPC server with health checks, reflection and TLS, for Tolaria and for the reference peers."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import grpc
import grpc.aio
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tolaria.config import Address
from tolaria.errors import BindError
from tolaria.security.certificates import Identity
from tolaria.security.watched import WatchedFiles

_ALPHA, _V1 = reflection.SERVICE_NAME, reflection.SERVICE_NAME.replace("v1alpha", "v1")
REQUEST_BYTES_MAX = 4 * 1024 * 1024
STREAMS_PER_CONNECTION_MAX = 128
"""Calls of one connection at the same time, which a client of gRPC waits for. Refused calls that are answered late
count, so that a flood over one connection is held back at its source."""

HANDSHAKE_S, KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 10, 60, 20
"""Seconds for a connection to say what it speaks; between pings to a silent client; for the answer to one."""


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """A running server; `address` has the actual port if port 0 was requested."""

    address: Address
    _health: HealthServicer

    async def set_health(self, part: str, *, serving: bool) -> None:
        """Sets the grpc.health.v1 status of a service; "" is the whole server."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(part, status.SERVING if serving else status.NOT_SERVING)


@dataclass(frozen=True, slots=True)
class BoundServer:
    """A server that listens but does not serve yet; `address` has the actual port if port 0 was requested.

    The port is free again once it has been served and stopped, or the process has ended.
    """

    server: grpc.aio.Server
    address: Address


async def bound_server(
    what: str,
    listen: str,
    *,
    tls: WatchedFiles[Identity] | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    request_bytes_max: int = REQUEST_BYTES_MAX,
    connection_idle_s: float | None = None,
) -> BoundServer:
    """Listens on `listen`, for the event loop that calls it; with `tls`, clients must use TLS.

    Each connection is shown the certificate that `tls` has at that time; if it has authorities, the client must
    present a certificate of one of them. `interceptors` see a call before it is decoded.

    Raises:
        BindError: which begins with `what`.
    """
    options: list[tuple[str, int]] = [
        # With SO_REUSEPORT, a port in use would not be an error, and the servers would share its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", request_bytes_max),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_S),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_TIMEOUT_S),
    ]
    if connection_idle_s is not None:
        options.append(("grpc.max_connection_idle_ms", int(1000 * connection_idle_s)))
    server = grpc.aio.server(interceptors=[*interceptors, _DecodingInterceptor()], options=options)
    with suppress(RuntimeError):  # its message only suggests environment variables for debugging
        port = server.add_insecure_port(listen) if tls is None else server.add_secure_port(listen, _credentials(tls))
        if port:
            return BoundServer(server, Address(Address.parse(listen).host, port))
    raise BindError(what, listen, "the address is in use or does not belong to this machine")


def _credentials(tls: WatchedFiles[Identity]) -> grpc.ServerCredentials:
    """Returns credentials that show each connection the newest certificate."""
    shown = tls.value

    def newest() -> grpc.ServerCertificateConfiguration | None:  # called by threads of gRPC, before each handshake
        nonlocal shown
        if tls.value is shown:
            return None
        shown = tls.value
        return _configuration(shown)

    required = bool(shown.authorities)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        newest,  # type: ignore[arg-type] # None is allowed, and means no change
        require_client_authentication=required,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.chain)], identity.authorities or None)


@asynccontextmanager
async def grpc_server(
    bound: BoundServer,
    register: Callable[[grpc.aio.Server], None],
    *,
    service_names: Sequence[str],
    grace_s: float,
) -> AsyncIterator[GrpcServer]:
    """Serves until the context exits, which refuses new calls and gives those in flight `grace_s` to complete.

    `register` adds the services; `service_names` are their full names, for reflection.
    """
    server = bound.server
    health_servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    register(server)
    _enable_reflection(server, (*service_names, health.SERVICE_NAME, _V1, _ALPHA))
    await server.start()
    try:
        yield GrpcServer(bound.address, health_servicer)
    finally:
        with anyio.CancelScope(shield=True):
            await health_servicer.enter_graceful_shutdown()
            await server.stop(grace_s)


def _enable_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    """Adds reflection under both of its names, whose messages are equal on the wire; the library has the older one."""
    alpha = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    described = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(described, FileDescriptorProto()))  # once more changes nothing
    servicer = reflection.aio.ReflectionServicer(service_names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in (_V1, _ALPHA)]
    server.add_generic_rpc_handlers(tuple(handlers))


class _DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a request that cannot be decoded, which gRPC itself answers with UNKNOWN."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Moves decoding into the handler, where a failure can be answered."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        serializer = handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_decoding_stream(handler), response_serializer=serializer)
        return grpc.unary_unary_rpc_method_handler(_decoding_unary(handler), response_serializer=serializer)


def _decoding_unary(handler: Any) -> Any:
    async def respond(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await handler.unary_unary(await _decode(handler, raw, context), context)

    return respond


def _decoding_stream(handler: Any) -> Any:
    async def respond(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        request = await _decode(handler, raw, context)
        responses = handler.unary_stream(request, context)
        if inspect.isawaitable(responses):  # a coroutine that aborts the call without any response
            await responses
            return
        async for response in responses:
            yield response

    return respond


async def _decode(handler: Any, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are not a request of this method: {error}")
