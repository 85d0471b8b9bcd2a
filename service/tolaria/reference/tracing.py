"""Spans of the calls that a reference peer serves, as children of the caller's."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from tolaria.telemetry.tracing import Tracer
from tolaria.values.spans import KIND, SpanContext, remote_parent, within


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Records a span for each unary call whose metadata names a parent in a trace that is exported."""

    def __init__(self, peer: str, tracer: Tracer) -> None:
        self._peer = peer
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of such a call."""
        handler = await continuation(handler_call_details)
        parent = remote_parent(handler_call_details.invocation_metadata or ())
        if handler is None or handler.unary_unary is None or parent is None or not parent.sampled:
            return handler
        name = f"{self._peer}/{handler_call_details.method.rpartition('/')[2]}"
        return grpc.unary_unary_rpc_method_handler(
            self._traced(handler.unary_unary, name, parent),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _traced(self, respond: Any, name: str, parent: SpanContext) -> Any:
        async def traced(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            span, began_s, error = parent.child(), time.monotonic(), "not answered"
            try:
                with within(span):
                    answer = await respond(request, context)
                error = ""
            finally:
                attributes: dict[str, str | float] = {KIND: "server"}
                self._tracer.record(span, name, time.monotonic() - began_s, error, **attributes)
            return answer

        return traced
