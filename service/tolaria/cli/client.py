"""The client of the admin service: one channel, a deadline for each call, and errors that fit on one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import grpc.aio
import typer
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from leyline.v1.admin_service_pb2 import (
    GetStatusRequest,
    GetStatusResponse,
    RunState,
    StreamTelemetryRequest,
    StreamTelemetryResponse,
    WatchStatusRequest,
    WatchStatusResponse,
)
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from tolaria import __version__
from tolaria.cli.channel import open_channel, tls_hint
from tolaria.cli.errors import CommandFailedError, ServiceUnreachableError
from tolaria.cli.render import Show, one_line
from tolaria.config import Address, Connection, Settings, connection, load_settings
from tolaria.errors import ConfigurationError, TolariaError

if TYPE_CHECKING:
    from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceAsyncStub  # the stub's types exist for mypy only

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
Rpc = Callable[["TolariaAdminServiceAsyncStub"], "grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]"]

_CONNECTION_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
_RUN_OVER = {RunState.RUN_STATE_FINISHED, RunState.RUN_STATE_FAILED}
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True, slots=True)
class Target:
    """The address of a service, the longest wait for each of its answers, and what is presented to it."""

    address: Address
    timeout_s: float
    connection: Connection = field(default_factory=Connection)


@asynccontextmanager
async def admin_stub(target: Target, method: str = "this call") -> AsyncIterator[TolariaAdminServiceAsyncStub]:
    """Opens a channel to `target`, and translates the errors of the calls made inside the block.

    `method` is what an error names that an older service does not have.

    Raises:
        ServiceUnreachableError: no service answers within the timeout, or the connection is lost.
        CommandFailedError: the service refuses; the message names the field and the stable reason.
    """
    async with open_channel(target.address, target.connection) as channel:
        stub: TolariaAdminServiceAsyncStub = TolariaAdminServiceStub(channel)
        try:
            yield stub
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise CommandFailedError(await _not_offered(stub, target, method)) from None
            raise _failure(error, target) from None


async def _not_offered(stub: TolariaAdminServiceAsyncStub, target: Target, method: str) -> str:
    """Says which version the service has that does not offer a call."""
    ours = f"this command is of Tolaria {__version__}"
    try:
        status = await stub.GetStatus(GetStatusRequest(), timeout=target.timeout_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return f"{target.address} is not an admin service of Tolaria (UNIMPLEMENTED)"
        return f"{target.address} does not offer {method} (UNIMPLEMENTED); {ours}"
    theirs = f"is Tolaria {one_line(status.version) or 'of an unknown version'}"
    return f"{target.address} {theirs}, which does not offer {method} (UNIMPLEMENTED); {ours}"


def call(target: Target, rpc: Rpc[RequestT, ResponseT], request: RequestT) -> ResponseT:
    """Makes one call, outside an event loop. Raises what `admin_stub` does."""
    method = type(request).__name__.removesuffix("Request")

    async def call_once() -> ResponseT:
        async with admin_stub(target, method) as stub:
            return await rpc(stub)(request, timeout=target.timeout_s)

    return asyncio.run(call_once())


async def watch_status(target: Target) -> AsyncGenerator[GetStatusResponse]:
    """Yields statuses as the service streams them, until it ends the stream. Raises what `admin_stub` does.

    After a silence as long as the timeout, asks for the status and opens a new stream.
    """
    async with admin_stub(target) as stub:
        while True:
            stream = stub.WatchStatus(WatchStatusRequest())
            try:
                while True:
                    async with asyncio.timeout(target.timeout_s):
                        answer = await stream.read()
                    if not isinstance(answer, WatchStatusResponse):
                        return
                    yield answer.status
            except TimeoutError:
                pass
            finally:
                stream.cancel()
            yield await stub.GetStatus(GetStatusRequest(), timeout=target.timeout_s)


async def follow_telemetry(
    target: Target, request: StreamTelemetryRequest, show: Callable[[StreamTelemetryResponse], None]
) -> None:
    """Shows each packet until the service ends the stream. Raises what `admin_stub` does."""
    async with admin_stub(target, "StreamTelemetry") as stub:
        stream = stub.StreamTelemetry(request)
        try:
            async with asyncio.timeout(target.timeout_s):
                await stream.initial_metadata()
        except TimeoutError:
            stream.cancel()
            raise ServiceUnreachableError(f"{target.address}: no answer within {target.timeout_s:g} s") from None
        async for response in stream:
            show(response)


async def follow_run(target: Target, show: Show) -> GetStatusResponse:
    """Shows each status until the run is over; returns the last.

    Raises:
        ServiceUnreachableError: no service answers, or its stream ends before the run is over.
    """
    async with aclosing(watch_status(target)) as statuses:
        async for status in statuses:
            show(status)
            if status.state in _RUN_OVER:
                return status
    raise ServiceUnreachableError(f"the service at {target.address} has gone before its run was over")


async def follow_run_across_restarts(target: Target, show: Show, *, pause_s: float = 0.5) -> GetStatusResponse:
    """Follows a run as `follow_run` does, but reconnects; each new reason for waiting is a line on standard error."""
    reported = ""
    while True:
        try:
            return await follow_run(target, show)
        except ServiceUnreachableError as error:
            if str(error) != reported:
                reported = str(error)
                typer.echo(f"waiting: {reported}", err=True)
        await asyncio.sleep(pause_s)


def target(
    address: str | None,
    timeout_s: float,
    config_file: Path | None,
    overrides: list[str] | None,
    profile: str | None = None,
) -> Target:
    """Returns the service to call: by --address, else a profile or the environment, else the settings.

    What is presented to the service is that of the profile or the environment in each case.

    Raises:
        ConfigurationError: something of it is invalid.
    """
    found = connection(profile, address=address)
    if address is None and found.address:
        return Target(_parsed(found.address, found.origin, "give the port of the service"), timeout_s, found)
    return Target(service_address(address, load_settings(config_file, overrides or [])), timeout_s, found)


def service_address(given: str | None, settings: Settings) -> Address:
    """Returns the address to connect to: `given`, or the one that a service with these settings listens on.

    Raises:
        ConfigurationError: it is malformed, or its port is 0.
    """
    if given is None:
        return _parsed(settings.server.listen, "server.listen", "give --address")
    return _parsed(given, "--address", "give the port that the service has logged")


def _parsed(text: str, origin: str, hint: str) -> Address:
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise ConfigurationError([f"{origin}: {error}"]) from None
    if address.port == 0:
        raise ConfigurationError([f"{origin}: {text!r} has port 0, which cannot be connected to; {hint}"])
    return connectable(address)


def connectable(listening: Address) -> Address:
    """Returns the address at which a local server on `listening` is reached: loopback for the wildcard addresses."""
    return Address(_LOOPBACK.get(listening.host, listening.host), listening.port)


def _failure(error: grpc.aio.AioRpcError, target: Target) -> TolariaError:
    # A deadline that the service itself enforces, as of a rollback, comes with details.
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not _rich_status(error).details:
        return ServiceUnreachableError(f"{target.address}: no answer within {target.timeout_s:g} s")
    if error.code() in _CONNECTION_LOST and not _rich_status(error).details:  # with details, the service has answered
        hint = tls_hint(target.connection, error.details() or "") if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return ServiceUnreachableError(f"no service answers at {target.address}: {_message(error)}{hint}")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED and not target.connection.token_file:
        return CommandFailedError(f"{_message(error)}; give it with TOLARIA_TOKEN_FILE or a profile")
    return CommandFailedError(_message(error))


def _message(error: grpc.aio.AioRpcError) -> str:
    """Formats the error as `field: why` for each field violation, else as its message, followed by the reason."""
    violations = error_details_pb2.BadRequest()
    info = error_details_pb2.ErrorInfo()
    for detail in _rich_status(error).details:
        # Unpack does not change its argument when the detail has another type.
        detail.Unpack(violations)
        detail.Unpack(info)
    fields = "; ".join(f"{v.field}: {v.description}" for v in violations.field_violations)
    code = error.code().name
    return f"{one_line(fields or error.details() or code, length_max=500)} ({one_line(info.reason or code)})"


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    try:
        # from_call is typed for a call, and reads three methods that AioRpcError has too.
        return rpc_status.from_call(cast(grpc.Call, error)) or status_pb2.Status()
    except (DecodeError, ValueError):
        return status_pb2.Status()  # the details contradict the status code
