"""The addresses of a service: bound at once, exclusively, and kept."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tolaria.config import Address, Settings
from tolaria.errors import BindError
from tolaria.service.listeners import open_listeners, open_sockets
from tolaria.telemetry.metrics import Metrics


def settings(server: str, metrics: str) -> Settings:
    """Settings with these addresses."""
    return Settings.model_validate({"server": {"listen": server}, "metrics": {"listen": metrics}})


def bind_sharing(address: Address) -> None:
    """Binds as a server does that would share its port with others."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((address.host, address.port))
        other.listen()


def test_both_addresses_are_bound_before_anything_is_served() -> None:
    """They have their actual ports, nothing else can have them meanwhile, and clients that connect wait."""
    with asyncio.Runner() as loop:
        listeners = open_listeners(settings("127.0.0.1:0", "127.0.0.1:0"), loop, Metrics())
        for address in (listeners.admin.address, listeners.metrics_address):
            assert address.port
            with pytest.raises(OSError, match="in use"):
                bind_sharing(address)
            with pytest.raises(BindError, match=f"other cannot listen on {address}: Address already in use"):
                open_sockets("other", str(address))
            socket.create_connection((address.host, address.port)).close()
        for listener in listeners.metrics:
            listener.close()


def test_a_fork_does_not_keep_an_address() -> None:
    """A worker of the job that outlives the service would."""
    with asyncio.Runner() as loop:
        listeners = open_listeners(settings("127.0.0.1:0", "127.0.0.1:0"), loop, Metrics())
        (listener,) = listeners.metrics
        pid = os.fork()
        if not pid:
            try:
                os.fstat(listener.fileno())
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        listener.close()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("192.0.2.1:1", "Cannot assign requested address"),
        ("name.invalid:1", "cannot listen on name.invalid:1: "),
        ("{taken}", "Address already in use (process {own})"),
    ],
)
@pytest.mark.parametrize("setting", ["server", "metrics"])
def test_an_address_that_cannot_be_bound(setting: str, address: str, words: str) -> None:
    """The message names the setting, the address, the cause, and which process listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken, asyncio.Runner() as loop:
        listen = address.format(taken=f"127.0.0.1:{taken.getsockname()[1]}")
        chosen = {"server": "127.0.0.1:0", "metrics": "127.0.0.1:0"} | {setting: listen}
        with pytest.raises(BindError) as caught:
            open_listeners(settings(**chosen), loop, Metrics())
    assert str(caught.value).startswith(f"{setting}.listen: the ")
    assert f"cannot listen on {listen}: " in str(caught.value)
    assert words.format(own=os.getpid()) in str(caught.value)


def test_every_address_of_a_host_gets_the_same_port() -> None:
    """A name such as localhost may have an IPv4 and an IPv6 address."""
    sockets = open_sockets("a server", "localhost:0")
    assert len({listener.getsockname()[1] for listener in sockets}) == 1
    for listener in sockets:
        listener.close()
