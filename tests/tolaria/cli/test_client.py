from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from leyline.v1.admin_service_pb2 import (
    GetStatusRequest,
    GetStatusResponse,
    PauseTrainingRequest,
    ResumeTrainingRequest,
    StopTrainingRequest,
    TriggerRollbackRequest,
)
from support.fake_admin import FakeAdmin, fake_admin, serving_nothing, status_of, whole_run
from tolaria import __version__
from tolaria.cli import client
from tolaria.cli.client import Rpc, Target, call, connectable, service_address, watch_status
from tolaria.cli.errors import CommandFailedError, ServiceUnreachableError
from tolaria.config import Address, load_settings
from tolaria.errors import ConfigurationError

Serve = Callable[[FakeAdmin], str]

GET_STATUS: Rpc[GetStatusRequest, GetStatusResponse] = lambda admin: admin.GetStatus  # noqa: E731 - typed here


def target_of(address: str, timeout_s: float = 5.0) -> Target:
    """Returns the target for `address`."""
    return Target(Address.parse(address), timeout_s)


@pytest.fixture
def refusing_address() -> Iterator[Address]:
    """An address at which every connection is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Address("127.0.0.1", bound.getsockname()[1])


def test_call_returns_the_answer(serve_fake: Serve) -> None:
    """The message of the service is returned unchanged."""
    target = target_of(serve_fake(fake_admin([status_of(2)])))
    assert status_of(2) == call(target, GET_STATUS, GetStatusRequest())


def test_refusal_names_the_field(serve_fake: Serve) -> None:
    """A BadRequest detail becomes `field: why`, followed by the status code."""
    target = target_of(serve_fake(fake_admin([])))
    with pytest.raises(CommandFailedError) as caught:
        call(target, lambda admin: admin.PauseTraining, PauseTrainingRequest(request_id="1"))
    assert str(caught.value) == "reason: must not be empty (INVALID_ARGUMENT)"


def test_refusal_is_one_line_with_its_stable_reason(serve_fake: Serve) -> None:
    """The reason comes from an ErrorInfo detail; line breaks and escape sequences of the message are removed."""
    target = target_of(serve_fake(fake_admin([])))
    with pytest.raises(CommandFailedError) as caught:
        call(target, lambda admin: admin.ResumeTraining, ResumeTrainingRequest())
    assert str(caught.value) == "the run is not held [31m (WRONG_STATE)"


def test_deadline_enforced_by_the_service_is_a_refusal(serve_fake: Serve) -> None:
    """A rollback that exceeds its budget has a reason, and the service is reachable."""
    target = target_of(serve_fake(fake_admin([])))
    with pytest.raises(CommandFailedError, match=r"abandoned \(ROLLBACK_DEADLINE\)"):
        call(target, lambda admin: admin.TriggerRollback, TriggerRollbackRequest(reason="too late"))


def test_refusal_without_details_has_the_status_code(serve_fake: Serve) -> None:
    """A call that the service does not have is named, with the status code and the versions of both sides."""
    address = serve_fake(fake_admin([status_of(1)]))
    with pytest.raises(CommandFailedError) as caught:
        call(target_of(address), lambda admin: admin.StopTraining, StopTrainingRequest())
    assert str(caught.value) == (
        f"{address} is Tolaria 0.1.0, which does not offer StopTraining (UNIMPLEMENTED); "
        f"this command is of Tolaria {__version__}"
    )


def test_refusal_by_a_service_without_a_status_names_this_version(serve_fake: Serve) -> None:
    """It says less, and does not wait longer than the timeout."""
    address = serve_fake(fake_admin([]))
    with pytest.raises(CommandFailedError, match=rf"{address} does not offer StopTraining .*Tolaria {__version__}"):
        call(target_of(address), lambda admin: admin.StopTraining, StopTrainingRequest())


def test_server_without_the_admin_service_is_refused() -> None:
    """The message names the address of the other gRPC server."""
    with serving_nothing() as address:
        target = target_of(address)
        with pytest.raises(CommandFailedError) as caught:
            call(target, GET_STATUS, GetStatusRequest())
    assert str(caught.value) == f"{address} is not an admin service of Tolaria (UNIMPLEMENTED)"


def test_refused_connection_is_unreachable(refusing_address: Address) -> None:
    """The message names the address."""
    target = Target(refusing_address, 5.0)
    with pytest.raises(ServiceUnreachableError, match=str(refusing_address)):
        call(target, GET_STATUS, GetStatusRequest())


def test_call_ends_at_its_deadline(serve_fake: Serve) -> None:
    """A service that hangs is unreachable after the timeout."""
    admin = fake_admin([])
    admin.hangs.set()
    target = target_of(serve_fake(admin), 0.2)
    with pytest.raises(ServiceUnreachableError, match=r"no answer within 0\.2 s"):
        call(target, GET_STATUS, GetStatusRequest())


@pytest.mark.anyio
async def test_watch_ends_with_the_stream(serve_fake: Serve) -> None:
    """All statuses arrive in order; the end of the stream ends the iteration."""
    target = target_of(serve_fake(fake_admin(whole_run(), ends=True)), 5.0)
    assert whole_run() == [status async for status in watch_status(target)]


@pytest.mark.anyio
async def test_watch_of_a_silent_stream_gets_the_status_and_reconnects(serve_fake: Serve) -> None:
    """A silence as long as the timeout is no failure while the service answers."""
    admin = fake_admin([status_of(1)])
    admin.silent = True
    target = target_of(serve_fake(admin), 0.2)
    statuses = watch_status(target)
    assert await anext(statuses) == status_of(1)
    admin.silent, admin.ends = False, True
    assert [status_of(1)] == [status async for status in statuses]
    assert [type(r).__name__ for r in admin.requests] == [
        "WatchStatusRequest",
        "GetStatusRequest",
        "WatchStatusRequest",
    ]


@pytest.mark.anyio
async def test_watch_of_a_hanging_service_is_unreachable(serve_fake: Serve) -> None:
    """The service neither streams nor answers."""
    admin = fake_admin([])
    admin.silent = True
    admin.hangs.set()
    target = target_of(serve_fake(admin), 0.2)
    with pytest.raises(ServiceUnreachableError, match="no answer within"):
        await anext(watch_status(target))


def test_address_option_overrides_the_settings() -> None:
    """Without it the address is server.listen."""
    settings = load_settings(None, ["server.listen=127.0.0.1:7001"])
    assert service_address(None, settings) == Address("127.0.0.1", 7001)
    assert service_address("[::1]:7002", settings) == Address("::1", 7002)


@pytest.mark.parametrize("text", ["nonsense", "host:port", "127.0.0.1:0", ":1", "http://127.0.0.1:1"])
def test_address_that_cannot_be_connected_to_is_refused(text: str) -> None:
    """A malformed address is a configuration error that names the option."""
    with pytest.raises(ConfigurationError, match="--address"):
        service_address(text, load_settings())


@pytest.mark.parametrize(
    ("given", "hint"), [("127.0.0.1:0", "give the port that the service has logged"), (None, "give --address")]
)
def test_port_0_is_refused_with_a_hint(given: str | None, hint: str) -> None:
    """The hint depends on whether --address was given."""
    with pytest.raises(ConfigurationError) as caught:
        service_address(given, load_settings(None, ["server.listen=127.0.0.1:0"]))
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("listening", "reached"), [("0.0.0.0:5", "127.0.0.1:5"), ("[::]:5", "[::1]:5"), ("10.0.0.1:5", "10.0.0.1:5")]
)
def test_wildcard_addresses_are_reached_over_loopback(listening: str, reached: str) -> None:
    """A connection to a wildcard address is not portable."""
    assert str(connectable(Address.parse(listening))) == reached


def test_each_reason_for_waiting_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Further attempts that fail for the same reason print nothing."""
    answers: Iterator[ServiceUnreachableError | GetStatusResponse] = iter(
        [ServiceUnreachableError("refused"), ServiceUnreachableError("refused"), whole_run()[-1]]
    )

    async def follow_run(*_: object) -> GetStatusResponse:
        answer = next(answers)
        if isinstance(answer, ServiceUnreachableError):
            raise answer
        return answer

    monkeypatch.setattr(client, "follow_run", follow_run)
    follow = client.follow_run_across_restarts(target_of("127.0.0.1:1"), lambda _: None, pause_s=0.0)
    assert asyncio.run(follow) == whole_run()[-1]
    assert capsys.readouterr().err == "waiting: refused\n"
