"""The admin server as callers meet it: over real connections, with and without tokens and certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
from anyio import to_thread
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceServicer, add_TolariaAdminServiceServicer_to_server
from support.admin import SERVICE, stub_of
from support.security import TOKENS, Pki, bearer, channel_to, credentials_of, key_of, protected_server, write_tokens
from tolaria.rpc import callers
from tolaria.rpc.audit import CHANGES
from tolaria.rpc.callers import ROLES, Caller, present_caller
from tolaria.security.certificates import Identity
from tolaria.security.tokens import Role
from tolaria.security.watched import WatchedFiles

pytestmark = pytest.mark.anyio
PREFIX = f"/{SERVICE.full_name}/"
STATUS = grpc.StatusCode


class Echo(TolariaAdminServiceServicer):
    """Answers GetStatus with the caller, streams one status and waits, and holds pauses until `release` is set."""

    def __init__(self) -> None:
        self.release = anyio.Event()
        self.held = 0
        self.streams = 0

    async def GetStatus(self, request: Any, context: Any) -> admin.GetStatusResponse:  # noqa: N802
        caller = present_caller()
        return admin.GetStatusResponse(run_id=str(caller), state_reason=caller.peer, job=caller.role.name)

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[admin.WatchStatusResponse]:  # noqa: N802
        self.streams += 1
        try:
            while True:
                yield admin.WatchStatusResponse(status=admin.GetStatusResponse(run_id=str(present_caller())))
                await anyio.sleep(0.01)
        finally:
            self.streams -= 1

    async def PauseTraining(self, request: Any, context: Any) -> admin.PauseTrainingResponse:  # noqa: N802
        self.held += 1
        await self.release.wait()
        return admin.PauseTrainingResponse()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file with a token of each role, and one that has expired."""
    return write_tokens(tmp_path / "tokens", TOKENS | {"former": Role.ADMIN}, expired="former")


def echo() -> tuple[Echo, Any]:
    """A servicer, and the function that registers it."""
    servicer = Echo()  # type: ignore[abstract] # abstract in the stub only
    return servicer, lambda server: add_TolariaAdminServiceServicer_to_server(servicer, server)


async def code_of(channel: grpc.aio.Channel, method: str, token: str | None = None, body: bytes = b"") -> STATUS:
    """Calls a method with raw bytes; returns the status."""
    metadata = () if token is None else bearer(token)
    try:
        call: Any = channel.unary_unary(method)
        await call(body, timeout=180, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return STATUS.OK


# -- roles -----------------------------------------------------------------------------------------------------------


def test_each_method_has_a_role() -> None:
    """A new method needs a decision: without one it is for admins, which is right for StopTraining only."""
    methods = {f"{PREFIX}{method.name}" for method in SERVICE.methods}
    assert methods - ROLES.keys() == {f"{PREFIX}StopTraining"}
    assert {method for method in ROLES if method.startswith(PREFIX)} <= methods


def test_viewers_change_nothing() -> None:
    """No method with a request id is for viewers, and all others of the service except the audit are."""
    viewers = {name.removeprefix(PREFIX) for name, role in ROLES.items() if role is Role.VIEWER}
    assert not viewers & CHANGES
    assert {method.name for method in SERVICE.methods} - CHANGES - viewers == {"ListAdminCalls"}


@pytest.mark.parametrize(
    ("method", "allowed"),
    [("GetStatus", {"vic", "olga", "root"}), ("PauseTraining", {"olga", "root"}), ("StopTraining", {"root"})],
)
async def test_a_method_needs_a_role(method: str, allowed: set[str], tokens: Path) -> None:
    """PERMISSION_DENIED below it; a method that is not implemented is UNIMPLEMENTED for those who may call it."""
    servicer, register = echo()
    servicer.release.set()
    async with (
        protected_server(register, tokens=tokens) as server,
        channel_to(server) as channel,
    ):
        found = {name: await code_of(channel, PREFIX + method, name) for name in TOKENS}
        assert {name for name, code in found.items() if code is not STATUS.PERMISSION_DENIED} == allowed
        for name, code in found.items():
            await server.counts(name, code.name, 1)


@pytest.mark.parametrize("kind", ["missing", "wrong", "expired", "not bearer", "twice", "empty"])
async def test_a_caller_needs_a_token(kind: str, tokens: Path) -> None:
    """UNAUTHENTICATED, counted under one name whatever is presented; streams too, before anything is answered."""
    metadata = {
        "missing": (),
        "wrong": bearer("nope"),
        "expired": bearer("former"),
        "not bearer": (("authorization", "Basic dmljOnZpYw=="),),
        "twice": bearer("vic") * 2,
        "empty": bearer(""),
    }[kind]
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        stub = stub_of(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStatus(admin.GetStatusRequest(), metadata=metadata, timeout=180)
        assert caught.value.code() is STATUS.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.WatchStatus(admin.WatchStatusRequest(), metadata=metadata, timeout=180)))
        assert caught.value.code() is STATUS.UNAUTHENTICATED
        await server.counts("unknown", "UNAUTHENTICATED", 2)


async def test_a_handler_sees_its_caller(tokens: Path) -> None:
    """Name, role and address of each call, also in streams; nothing of one call is left in the next."""
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        stub = stub_of(channel)
        for name in ("vic", "root"):
            answer = await stub.GetStatus(admin.GetStatusRequest(), metadata=bearer(name), timeout=180)
            assert (answer.run_id, answer.job) == (name, TOKENS[name].name)
            assert answer.state_reason.startswith("127.0.0.1:")
            call = stub.WatchStatus(admin.WatchStatusRequest(), metadata=bearer(name), timeout=180)
            assert (await anext(aiter(call))).status.run_id == name
            call.cancel()
    assert present_caller() == Caller("anonymous", Role.ADMIN)


async def test_without_tokens_every_caller_is_an_admin() -> None:
    """As on loopback; a token that is presented anyway is ignored."""
    async with protected_server(echo()[1]) as server, channel_to(server) as channel:
        assert await code_of(channel, f"{PREFIX}StopTraining") is STATUS.UNIMPLEMENTED
        assert await code_of(channel, f"{PREFIX}GetStatus", "whatever") is STATUS.OK
        await server.counts("anonymous", "OK", 1)


async def test_health_is_open_and_reflection_is_for_viewers(tokens: Path) -> None:
    """Probes have no token; who wants to know the methods has one. An invalid token does not close health."""
    reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        await server.server.set_health("", serving=True)
        health: Any = health_pb2_grpc.HealthStub(channel)
        for metadata in ((), bearer("nope"), bearer("vic")):
            assert (await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)).status == 1
        method: Any = channel.stream_stream(reflection)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(method(iter([request]), timeout=180)))
        assert caught.value.code() is STATUS.UNAUTHENTICATED
        listed = await anext(aiter(method(iter([request]), metadata=bearer("vic"), timeout=180)))
        assert SERVICE.full_name.encode() in listed


async def test_tokens_are_read_again(tokens: Path) -> None:
    """A revoked one is refused on an open connection, a new one accepted."""
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        assert await code_of(channel, f"{PREFIX}GetStatus", "vic") is STATUS.OK
        assert server.tokens is not None
        await to_thread.run_sync(write_tokens, tokens, {"newcomer": Role.VIEWER})
        assert await to_thread.run_sync(server.tokens.refresh)
        assert await code_of(channel, f"{PREFIX}GetStatus", "vic") is STATUS.UNAUTHENTICATED
        assert await code_of(channel, f"{PREFIX}GetStatus", "newcomer") is STATUS.OK


async def test_a_stream_ends_with_its_token(tokens: Path) -> None:
    """One that is revoked while the stream is open; a stream of another token goes on."""
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        request = admin.WatchStatusRequest()
        revoked, kept = (stub_of(channel).WatchStatus(request, metadata=bearer(name)) for name in ("vic", "root"))
        await anext(aiter(revoked))
        assert server.tokens is not None
        await to_thread.run_sync(write_tokens, tokens, {"root": Role.ADMIN})
        assert await to_thread.run_sync(server.tokens.refresh)
        with pytest.raises(grpc.aio.AioRpcError, match="expired or been revoked") as caught:
            async for _ in revoked:
                pass
        assert caught.value.code() is STATUS.UNAUTHENTICATED
        for _ in range(3):
            await anext(aiter(kept))
        await server.counts("vic", "UNAUTHENTICATED", 1)


# -- certificates ----------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """What a server with mutual TLS and its clients have."""

    pki: Pki
    tls: WatchedFiles[Identity]
    clients: dict[str, grpc.ChannelCredentials]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A CA, a foreign one, and clients with and without what the server wants."""
    pki, foreign = Pki(tmp_path / "own"), Pki(tmp_path / "foreign")
    laptop = pki.client("laptop")
    clients = {
        "good": credentials_of(pki.ca, laptop),
        "missing": credentials_of(pki.ca),
        "foreign": credentials_of(pki.ca, foreign.client("laptop")),
        "expired": credentials_of(pki.ca, pki.client("old", expired=True)),
        "misled": credentials_of(foreign.ca, laptop),
    }
    return Files(pki, pki.watched(clients=True), clients)


@pytest.mark.parametrize("kind", ["missing", "foreign", "expired", "misled", "plain"])
async def test_a_wrong_certificate_makes_no_connection(kind: str, files: Files, tokens: Path) -> None:
    """Of the client or of the server, or no TLS: no call reaches the service, which gRPC reports as UNAVAILABLE."""
    async with protected_server(echo()[1], tokens=tokens, tls=files.tls) as server:
        async with channel_to(server, files.clients.get(kind)) as channel:
            assert await code_of(channel, f"{PREFIX}GetStatus", "vic") is STATUS.UNAVAILABLE
        async with channel_to(server, files.clients["good"]) as channel:
            assert await code_of(channel, f"{PREFIX}GetStatus", "vic") is STATUS.OK


async def test_a_certificate_does_not_replace_the_token(files: Files, tokens: Path) -> None:
    """Both are needed; the name of the certificate is part of the caller's."""
    async with (
        protected_server(echo()[1], tokens=tokens, tls=files.tls) as server,
        channel_to(server, files.clients["good"]) as channel,
    ):
        answer = await stub_of(channel).GetStatus(admin.GetStatusRequest(), metadata=bearer("vic"), timeout=180)
        assert answer.run_id == "vic (laptop)"
        assert await code_of(channel, f"{PREFIX}GetStatus") is STATUS.UNAUTHENTICATED


async def test_a_new_certificate_is_shown_without_a_restart(files: Files) -> None:
    """To new connections; calls on an open one go on. Half a file changes nothing."""
    good, tls = files.clients["good"], files.tls

    async def code_by_name(name: str) -> STATUS:
        async with channel_to(server, good, name=name) as channel:
            return await code_of(channel, f"{PREFIX}GetStatus")

    async with protected_server(echo()[1], tls=tls) as server, channel_to(server, good) as before:
        assert await code_of(before, f"{PREFIX}GetStatus") is STATUS.OK
        assert await code_by_name("gpu2") is STATUS.UNAVAILABLE
        certificate = await to_thread.run_sync(files.pki.server, "gpu2")
        assert await to_thread.run_sync(tls.refresh)
        assert await code_by_name("gpu2") is STATUS.OK
        await anyio.Path(key_of(certificate)).write_text("half")
        assert not await to_thread.run_sync(tls.refresh)
        assert await code_by_name("gpu2") is STATUS.OK
        assert await code_of(before, f"{PREFIX}GetStatus") is STATUS.OK


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_calls_in_flight_are_limited_for_each_caller(tokens: Path) -> None:
    """RESOURCE_EXHAUSTED for the one that has too many; others are served, and it is again when one has ended."""
    servicer, register = echo()
    async with (
        protected_server(register, tokens=tokens, calls_in_flight_max=2) as server,
        channel_to(server) as channel,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(2):
            tasks.start_soon(code_of, channel, f"{PREFIX}PauseTraining", "olga")
        while servicer.held < 2:
            await anyio.sleep(0.005)
        assert await code_of(channel, f"{PREFIX}GetStatus", "olga") is STATUS.RESOURCE_EXHAUSTED
        assert await code_of(channel, f"{PREFIX}GetStatus", "root") is STATUS.OK
        servicer.release.set()
        while await code_of(channel, f"{PREFIX}GetStatus", "olga") is not STATUS.OK:
            await anyio.sleep(0.005)
        labels = {"caller": "olga", "code": "RESOURCE_EXHAUSTED"}
        assert server.metrics.registry.get_sample_value("tolaria.server.calls_total", labels)


async def test_streams_are_limited_and_end_with_their_client(tokens: Path) -> None:
    """A stream that is cancelled, or whose connection is closed, makes room for another."""
    servicer, register = echo()
    async with protected_server(register, tokens=tokens, streams_max=2) as server, channel_to(server) as channel:
        stub, request, token = stub_of(channel), admin.WatchStatusRequest(), bearer("vic")
        first = stub.WatchStatus(request, metadata=token)
        await anext(aiter(first))
        async with channel_to(server) as other:
            await anext(aiter(stub_of(other).WatchStatus(request, metadata=token)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(stub.WatchStatus(request, metadata=token)))
            assert caught.value.code() is STATUS.RESOURCE_EXHAUSTED
            assert "server.streams_max" in (caught.value.details() or "")
        first.cancel()
        while servicer.streams:
            await anyio.sleep(0.005)
        await anext(aiter(stub.WatchStatus(request, metadata=token)))


async def test_too_many_calls_are_refused(tokens: Path) -> None:
    """One caller's; the answer says which setting, and another caller is not concerned."""
    async with (
        protected_server(echo()[1], tokens=tokens, calls_per_second=1.0) as server,
        channel_to(server) as channel,
    ):
        codes = [await code_of(channel, f"{PREFIX}GetStatus", "vic") for _ in range(4)]
        assert codes[:2] == [STATUS.OK, STATUS.OK]
        assert STATUS.RESOURCE_EXHAUSTED in codes
        assert await code_of(channel, f"{PREFIX}GetStatus", "root") is STATUS.OK


async def test_an_emergency_gets_through(tokens: Path) -> None:
    """Its caller has reached every limit, and made too many mistakes."""
    servicer, register = echo()
    limits: dict[str, Any] = {"calls_per_second": 0.5, "bad_calls_per_second": 0.1, "calls_in_flight_max": 1}
    async with (
        protected_server(register, tokens=tokens, **limits) as server,
        channel_to(server) as channel,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(code_of, channel, f"{PREFIX}PauseTraining", "olga")
        while not servicer.held:
            await anyio.sleep(0.005)
        assert await code_of(channel, f"{PREFIX}StopTraining", "olga") is STATUS.PERMISSION_DENIED
        assert await code_of(channel, f"{PREFIX}GetStatus", "olga") is STATUS.RESOURCE_EXHAUSTED
        started = anyio.current_time()
        assert await code_of(channel, f"{PREFIX}RaiseEmergency", "olga") is STATUS.UNIMPLEMENTED  # by this servicer
        assert anyio.current_time() - started < callers.LATE_S
        servicer.release.set()


async def test_an_anonymous_connection_does_not_lock_out_another() -> None:
    """Without tokens the limits are those of each connection, so that a flood does not keep an operator out."""
    async with (
        protected_server(echo()[1], calls_per_second=1.0) as server,
        channel_to(server) as flood,
        channel_to(server) as operator,
    ):
        codes = [await code_of(flood, f"{PREFIX}GetStatus") for _ in range(4)]
        assert STATUS.RESOURCE_EXHAUSTED in codes
        assert await code_of(operator, f"{PREFIX}GetStatus") is STATUS.OK


@pytest.mark.parametrize(
    "mistake",
    [
        ("GetStatus", "nope", b"", STATUS.UNAUTHENTICATED, "unknown"),
        ("StopTraining", "vic", b"", STATUS.PERMISSION_DENIED, "vic"),
        ("Nothing", "root", b"", STATUS.UNIMPLEMENTED, "root"),
        ("PauseTraining", "root", b"\xff" * 9, STATUS.INVALID_ARGUMENT, "root"),
    ],
)
async def test_mistakes_are_answered_late_but_rightly(
    mistake: tuple[str, str, bytes, STATUS, str], tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a burst: every answer has its status, is counted, and the waiting ones cost nothing meanwhile."""
    method, token, body, code, name = mistake
    monkeypatch.setattr(callers, "LATE_S", 0.3)
    late: list[float] = []
    async with (
        protected_server(echo()[1], tokens=tokens, bad_calls_per_second=0.5) as server,
        channel_to(server) as channel,
    ):

        async def once() -> None:
            started = anyio.current_time()
            assert await code_of(channel, PREFIX + method, token, body) is code
            late.append(anyio.current_time() - started)

        for _ in range(2):
            await once()
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(once)
        assert min(late[2:]) >= 0.25
        await server.counts(name, code.name, 22)


async def test_an_oversized_message_is_refused(tokens: Path) -> None:
    """RESOURCE_EXHAUSTED, and the connection goes on."""
    async with (
        protected_server(echo()[1], tokens=tokens, request_bytes_max=65536) as server,
        channel_to(server) as channel,
    ):
        assert await code_of(channel, f"{PREFIX}GetStatus", "root", b"\x00" * 70_000) is STATUS.RESOURCE_EXHAUSTED
        assert await code_of(channel, f"{PREFIX}GetStatus", "root") is STATUS.OK


async def test_silent_connections_and_slow_readers_do_no_harm(tokens: Path) -> None:
    """Two hundred connections that say nothing, and streams that are not read: calls are answered as before."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(protected_server(echo()[1], tokens=tokens))
        address = server.server.address
        for _ in range(200):
            await stack.enter_async_context(await anyio.connect_tcp(address.host, address.port))
        channel = await stack.enter_async_context(channel_to(server))
        for _ in range(10):
            await anext(aiter(stub_of(channel).WatchStatus(admin.WatchStatusRequest(), metadata=bearer("vic"))))
        assert await code_of(channel, f"{PREFIX}GetStatus", "root") is STATUS.OK


async def test_metrics_know_a_bounded_number_of_names(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones are counted together."""
    monkeypatch.setattr(callers, "NAMES_MAX", 3)
    async with protected_server(echo()[1], tokens=tokens) as server, channel_to(server) as channel:
        for name in ("vic", "olga", "root", "vic"):
            await code_of(channel, f"{PREFIX}GetStatus", name)
        for name, calls in (("vic", 2), ("olga", 0), ("root", 0), ("other", 2)):
            await server.counts(name, "OK", calls)
