"""Calls to a running service: each under a deadline, each failure as one line. Must not know what is printed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from leyline.v1.admin_service_pb2 import (
    GetStatusRequest,
    GetStatusResponse,
    WatchStatusRequest,
    WatchStatusResponse,
)
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from tolaria.cli.failures import RequestRefusedError, ServiceUnreachableError
from tolaria.cli.words import one_line
from tolaria.config import Address, Settings
from tolaria.errors import ConfigurationError, TolariaError

if TYPE_CHECKING:
    from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceAsyncStub  # the stub's types exist for mypy only

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
Rpc = Callable[["TolariaAdminServiceAsyncStub"], "grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]"]

_GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
_GENERATED_REFUSAL = "Method not implemented!"  # what a servicer says that has the call but not its body
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - is looked for here, not bound to


class AdminClient:
    """One channel to one service. Every method raises what `admin_client` lists."""

    def __init__(self, stub: TolariaAdminServiceAsyncStub, address: Address, timeout_s: float) -> None:
        self._stub = stub
        self._address = address
        self._timeout_s = timeout_s

    async def call(self, rpc: Rpc[RequestT, ResponseT], request: RequestT) -> ResponseT:
        """Make one call and wait for its answer, at most the client's timeout."""
        try:
            return await rpc(self._stub)(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None

    async def status(self) -> GetStatusResponse:
        """The service's state now."""
        return await self.call(lambda admin: admin.GetStatus, GetStatusRequest())

    async def watch(self, *, interval_ms: int = 0) -> AsyncGenerator[GetStatusResponse]:
        """States as they come, at the server's pace (0) or slower; ends when the server ends the stream.

        A stream that is silent for the timeout is not taken for dead: the service is asked, and the stream opened anew.
        """
        while True:
            stream = self._stub.WatchStatus(WatchStatusRequest(interval_ms=interval_ms))
            try:
                while (answer := await self._next(stream)) is not None:
                    yield answer
            except TimeoutError:
                pass
            else:
                return
            finally:
                stream.cancel()
            yield await self.status()

    async def _next(
        self, stream: grpc.aio.UnaryStreamCall[WatchStatusRequest, WatchStatusResponse]
    ) -> GetStatusResponse | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await stream.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None
        return answer.status if isinstance(answer, WatchStatusResponse) else None

    def _failure(self, error: grpc.aio.AioRpcError) -> TolariaError:
        # A deadline of the service's own, as a rollback has one, comes with its reason.
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not _rich_status(error).details:
            return ServiceUnreachableError(f"{self._address}: no answer within {self._timeout_s:g} s")
        if error.code() is grpc.StatusCode.UNIMPLEMENTED and error.details() != _GENERATED_REFUSAL:
            told = f"{self._address} answers, but is no Tolaria admin server that knows this call"
            return RequestRefusedError(f"{told} (UNIMPLEMENTED)")
        told = _told(error)
        if error.code() in _GONE:
            return ServiceUnreachableError(f"no service answers at {self._address}: {told}")
        return RequestRefusedError(told)


@asynccontextmanager
async def admin_client(address: Address, timeout_s: float) -> AsyncIterator[AdminClient]:
    """A client for the service at `address`; connects at the first call.

    Raises:
        ServiceUnreachableError: when nobody answers there within `timeout_s`, or no longer does.
        RequestRefusedError: when the service refuses; the message names the field and the stable reason.
    """
    # A proxy from the environment must never stand between an operator and a loopback port.
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(str(address), options=options) as channel:
        yield AdminClient(TolariaAdminServiceStub(channel), address, timeout_s)


def service_address(asked: str | None, settings: Settings) -> Address:
    """Where to connect: what was asked for, else where `settings` would listen.

    Raises:
        ConfigurationError: when that is no address to connect to.
    """
    text, origin = (settings.server.listen, "server.listen") if asked is None else (asked, "--address")
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise ConfigurationError([f"{origin}: {error}"]) from None
    if address.port == 0:
        hint = "give --address" if asked is None else "give the port that the service has logged"
        raise ConfigurationError([f"{origin}: {text!r} has port 0, to which nobody can connect; {hint}"])
    return connectable(address)


def connectable(listening: Address) -> Address:
    """Where to reach a server of this machine that listens on `listening`, which may be every interface."""
    return Address(_EVERY_INTERFACE.get(listening.host, listening.host), listening.port)


def _told(error: grpc.aio.AioRpcError) -> str:
    """What the service says is wrong, on one line: `field: why` for each field where it names them, then the reason."""
    rich = _rich_status(error)
    violations = error_details_pb2.BadRequest()
    info = error_details_pb2.ErrorInfo()
    for detail in rich.details:
        # Unpack leaves its argument alone when the detail is of another type.
        detail.Unpack(violations)
        detail.Unpack(info)
    fields = "; ".join(f"{v.field}: {v.description}" for v in violations.field_violations)
    code = error.code().name
    message = one_line(fields or error.details() or code, length_max=500)
    return f"{message} ({one_line(info.reason or code)})"


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    try:
        # The library asks for a call; an error of grpc.aio has the three methods that it reads.
        return rpc_status.from_call(cast(grpc.Call, error)) or status_pb2.Status()
    except (DecodeError, ValueError):
        return status_pb2.Status()  # details that contradict the status add nothing to it
