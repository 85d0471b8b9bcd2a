"""A gRPC server on one address, with health and reflection, for Tolaria and for the reference peers alike.

Owns binding, serving and stopping. Must not know which services it carries.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tolaria.config import Address
from tolaria.errors import BindError

REQUEST_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """A server that listens. `address` holds the real port, also where port 0 was asked for."""

    address: Address
    _health: HealthServicer

    async def set_health(self, part: str, *, serving: bool) -> None:
        """Publish the health of one part ("" is the whole) under grpc.health.v1."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(part, status.SERVING if serving else status.NOT_SERVING)


@asynccontextmanager
async def grpc_server(
    what: str,
    listen: str,
    register: Callable[[grpc.aio.Server], None],
    *,
    service_names: Sequence[str],
    grace_s: float,
) -> AsyncIterator[GrpcServer]:
    """Serve what `register` adds until the block ends; then new calls are refused and those in flight get `grace_s`.

    Raises:
        BindError: when `listen` cannot be had.
    """
    # Without SO_REUSEPORT a port that is taken is an error, not a share of somebody's traffic.
    server = grpc.aio.server(
        interceptors=[_DecodingInterceptor()],
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", REQUEST_BYTES_MAX)],
    )
    health_servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    register(server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, what, listen)
    await server.start()
    try:
        yield GrpcServer(address, health_servicer)
    finally:
        with anyio.CancelScope(shield=True):
            await health_servicer.enter_graceful_shutdown()
            await server.stop(grace_s)


class _DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to bytes that are no request; gRPC itself would call that its own UNKNOWN failure."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Decode inside the handler, where a failure can be answered."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            stream = _decoding_stream(handler)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=handler.response_serializer)
        unary = _decoding_unary(handler)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=handler.response_serializer)


def _decoding_unary(handler: Any) -> Any:
    async def answer(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await handler.unary_unary(await _decoded(handler, raw, context), context)

    return answer


def _decoding_stream(handler: Any) -> Any:
    async def answer(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        request = await _decoded(handler, raw, context)
        answers = handler.unary_stream(request, context)
        if inspect.isawaitable(answers):  # a coroutine that only ever refuses
            await answers
            return
        async for response in answers:
            yield response

    return answer


async def _decoded(handler: Any, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes are no request of this method: {error}")


def _bind(server: grpc.aio.Server, what: str, listen: str) -> Address:
    host = Address.parse(listen).host
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:  # gRPC's own words are about its environment variables
        port = 0
    if port == 0:
        raise BindError(what, listen, "the address is in use or not of this machine")
    return Address(host, port)
