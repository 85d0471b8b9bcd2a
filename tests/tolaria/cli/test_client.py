from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from leyline.v1.admin_service_pb2 import (
    PauseTrainingRequest,
    ResumeTrainingRequest,
    StopTrainingRequest,
    TriggerRollbackRequest,
)
from support.fake_admin import FakeAdmin, fake_admin, serving_nothing, status_of, whole_run
from tolaria.cli.client import admin_client, connectable, service_address
from tolaria.cli.failures import RequestRefusedError, ServiceUnreachableError
from tolaria.config import Address, load_settings
from tolaria.errors import ConfigurationError

Serve = Callable[[FakeAdmin], str]


@pytest.fixture
def nobody() -> Iterator[Address]:
    """An address that is taken by a socket that never answers to a connection."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Address("127.0.0.1", bound.getsockname()[1])


@pytest.mark.anyio
async def test_status_is_the_service_s_own_answer(serve_fake: Serve) -> None:
    """What the service sends arrives unchanged."""
    async with admin_client(Address.parse(serve_fake(fake_admin([status_of(2)]))), 5.0) as client:
        assert status_of(2) == await client.status()


@pytest.mark.anyio
async def test_refusal_names_the_field(serve_fake: Serve) -> None:
    """A BadRequest detail becomes `field: why`, followed by the status."""
    async with admin_client(Address.parse(serve_fake(fake_admin([]))), 5.0) as client:
        with pytest.raises(RequestRefusedError) as caught:
            await client.call(lambda admin: admin.PauseTraining, PauseTrainingRequest(request_id="1"))
    assert str(caught.value) == "reason: must not be empty (INVALID_ARGUMENT)"


@pytest.mark.anyio
async def test_refusal_is_one_harmless_line_with_its_stable_reason(serve_fake: Serve) -> None:
    """An ErrorInfo detail gives the reason; line breaks and escape sequences of the message do not reach the screen."""
    async with admin_client(Address.parse(serve_fake(fake_admin([]))), 5.0) as client:
        with pytest.raises(RequestRefusedError) as caught:
            await client.call(lambda admin: admin.ResumeTraining, ResumeTrainingRequest())
    assert str(caught.value) == "the run is not held [31m (WRONG_STATE)"


@pytest.mark.anyio
async def test_a_deadline_of_the_service_s_own_is_no_silence(serve_fake: Serve) -> None:
    """A rollback that missed its budget is told as what it is: the service is there."""
    async with admin_client(Address.parse(serve_fake(fake_admin([]))), 5.0) as client:
        with pytest.raises(RequestRefusedError, match=r"abandoned \(ROLLBACK_DEADLINE\)"):
            await client.call(lambda admin: admin.TriggerRollback, TriggerRollbackRequest(reason="too late"))


@pytest.mark.anyio
async def test_refusal_without_details_tells_the_status(serve_fake: Serve) -> None:
    """A call that the service does not have is refused with gRPC's own word for it."""
    async with admin_client(Address.parse(serve_fake(fake_admin([]))), 5.0) as client:
        with pytest.raises(RequestRefusedError, match="UNIMPLEMENTED"):
            await client.call(lambda admin: admin.StopTraining, StopTrainingRequest())


@pytest.mark.anyio
async def test_another_kind_of_server_is_named() -> None:
    """A gRPC server that is no Tolaria answers, which is told beside its address."""
    with serving_nothing() as address:
        async with admin_client(Address.parse(address), 5.0) as client:
            with pytest.raises(RequestRefusedError) as caught:
                await client.status()
    assert str(caught.value) == (
        f"{address} answers, but is no Tolaria admin server that knows this call (UNIMPLEMENTED)"
    )


@pytest.mark.anyio
async def test_nobody_there_is_unreachable(nobody: Address) -> None:
    """A refused connection names the address."""
    async with admin_client(nobody, 5.0) as client:
        with pytest.raises(ServiceUnreachableError, match=str(nobody)):
            await client.status()


@pytest.mark.anyio
async def test_call_ends_at_its_deadline(serve_fake: Serve) -> None:
    """A service that hangs is given up after the timeout, and told so."""
    admin = fake_admin([])
    admin.hangs.set()
    async with admin_client(Address.parse(serve_fake(admin)), 0.2) as client:
        with pytest.raises(ServiceUnreachableError, match=r"no answer within 0\.2 s"):
            await client.status()


@pytest.mark.anyio
async def test_watch_ends_with_the_stream(serve_fake: Serve) -> None:
    """All states arrive in order, and the end of the stream ends the watching."""
    async with admin_client(Address.parse(serve_fake(fake_admin(whole_run(), ends=True))), 5.0) as client:
        assert whole_run() == [status async for status in client.watch()]


@pytest.mark.anyio
async def test_silent_stream_is_asked_and_opened_anew(serve_fake: Serve) -> None:
    """Silence for the timeout is no failure while the service answers."""
    admin = fake_admin([status_of(1)])
    admin.silent = True
    async with admin_client(Address.parse(serve_fake(admin)), 0.2) as client:
        statuses = client.watch()
        assert await anext(statuses) == status_of(1)
        admin.silent, admin.ends = False, True
        assert [status_of(1)] == [status async for status in statuses]
    assert [type(r).__name__ for r in admin.requests] == [
        "WatchStatusRequest",
        "GetStatusRequest",
        "WatchStatusRequest",
    ]


@pytest.mark.anyio
async def test_silent_stream_of_a_hanging_service_is_unreachable(serve_fake: Serve) -> None:
    """A service that neither streams nor answers ends the watching."""
    admin = fake_admin([])
    admin.silent = True
    admin.hangs.set()
    async with admin_client(Address.parse(serve_fake(admin)), 0.2) as client:
        with pytest.raises(ServiceUnreachableError, match="no answer within"):
            await anext(client.watch())


def test_address_comes_from_the_settings_unless_asked_for() -> None:
    """--address wins over server.listen."""
    settings = load_settings(None, ["server.listen=127.0.0.1:7001"])
    assert service_address(None, settings) == Address("127.0.0.1", 7001)
    assert service_address("[::1]:7002", settings) == Address("::1", 7002)


@pytest.mark.parametrize("text", ["nonsense", "host:port", "127.0.0.1:0", ":1", "http://127.0.0.1:1"])
def test_address_that_cannot_be_connected_to_is_refused(text: str) -> None:
    """A malformed address is a mistake on the command line, named with its option."""
    with pytest.raises(ConfigurationError, match="--address"):
        service_address(text, load_settings())


@pytest.mark.parametrize(
    ("asked", "hint"), [("127.0.0.1:0", "give the port that the service has logged"), (None, "give --address")]
)
def test_port_0_is_refused_with_a_way_out(asked: str | None, hint: str) -> None:
    """Who gave --address is not told to give it."""
    with pytest.raises(ConfigurationError) as caught:
        service_address(asked, load_settings(None, ["server.listen=127.0.0.1:0"]))
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("listening", "reached"), [("0.0.0.0:5", "127.0.0.1:5"), ("[::]:5", "[::1]:5"), ("10.0.0.1:5", "10.0.0.1:5")]
)
def test_every_interface_is_reached_over_loopback(listening: str, reached: str) -> None:
    """The wildcard addresses are for listening; nobody can rely on connecting to them."""
    assert str(connectable(Address.parse(listening))) == reached
