"""The handshake and the frames of machines that join, against strangers, cuts, garbage and recordings."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import anyio
import pytest
from anyio.abc import SocketStream

from tolaria.errors import ChannelError, JoinRefusedError
from tolaria.ranks.channel import FRAME_BYTES_MAX, Channel, interface_of

pytestmark = pytest.mark.anyio
T = TypeVar("T")
SECRET = b"a secret of two machines"
ASKED, ANSWER = b"may I", b"you may"


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[SocketStream, SocketStream]]:
    """Both ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = await anyio.connect_tcp(*listener.getsockname())
        accepted, _ = listener.accept()
        second = await SocketStream.from_socket(accepted)
    async with first, second:
        yield first, second


async def both(first: Callable[[], Awaitable[object]], second: Callable[[], Awaitable[T]]) -> T:
    """Runs both at the same time; returns what the second one does."""
    found: list[T] = []

    async def keep() -> None:
        found.append(await second())

    with anyio.fail_after(180):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)  # type: ignore[arg-type] # any awaitable will do
            tasks.start_soon(keep)
    return found[0]


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Channel, Channel, SocketStream, SocketStream]]:
    """A channel's ends, of the machine and of the service, and the connection below them."""
    async with connected() as (machine, service):
        ends: list[Channel] = []

        async def serve() -> None:
            channel, asked = await Channel.accept(service, SECRET)
            assert asked == ASKED
            ends.append(channel)
            await channel.send(ANSWER)

        channel, answer = await both(serve, lambda: Channel.open(machine, SECRET, ASKED))
        assert answer == ANSWER
        yield channel, ends[0], machine, service


async def test_frames_pass_in_both_directions() -> None:
    """In their order, of any length up to the bound; each side knows the addresses."""
    async with opened() as (machine, service, _, _):
        for content in (b"", b"one", os.urandom(FRAME_BYTES_MAX - 32)):
            await machine.send(content)
            await service.send(content + b"!"[: FRAME_BYTES_MAX - 32 - len(content)])
            assert await service.receive() == content
            assert (await machine.receive()).startswith(content)
        assert (machine.local, machine.remote) == ("127.0.0.1", "127.0.0.1")
        with pytest.raises(ChannelError, match="exceeds the bound"):
            await machine.send(bytes(FRAME_BYTES_MAX))


async def test_another_secret_is_refused_on_both_sides() -> None:
    """Both learn why, and nothing that was asked is read."""
    async with connected() as (machine, service):

        async def serve() -> None:
            with pytest.raises(JoinRefusedError, match="does not have this secret"):
                await Channel.accept(service, b"another")

        async def join() -> None:
            with pytest.raises(JoinRefusedError, match="the service has another secret") as found:
                await Channel.open(machine, SECRET, ASKED)
            assert found.value.reason == "secret"

        await both(serve, join)


async def test_a_stranger_in_place_of_the_service_is_not_believed() -> None:
    """It cannot answer without the secret: neither with an own frame, nor by sending back what it got."""
    for answer in (b"x" * 50, None):
        async with connected() as (machine, service):

            async def pose(answer: bytes | None = answer, service: SocketStream = service) -> None:
                await service.send(framed(b"tolaria lane rendezvous, protocol 1\n" + bytes(32)))
                got = await service.receive()
                await service.send(framed(answer) if answer is not None else framed(got[36:]))

            async def join(machine: SocketStream = machine) -> None:
                with pytest.raises(ChannelError, match="not authentic"):
                    await Channel.open(machine, SECRET, ASKED)

            await both(pose, join)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame of 1213486160 bytes is announced"),
        (struct.pack(">I", 10) + b"0123456789", "no rendezvous of Tolaria"),
        (b"", "the connection has ended"),
    ],
)
async def test_what_answers_may_be_something_else(greeting: bytes, words: str) -> None:
    """A machine says what it got instead of a greeting."""
    async with connected() as (machine, service):
        if greeting:
            await service.send(greeting)
        await service.send_eof()
        with pytest.raises(ChannelError, match=words):
            await Channel.open(machine, SECRET, ASKED)


async def test_another_protocol_is_refused_by_the_machine() -> None:
    """By its number."""
    async with connected() as (machine, service):
        await service.send(framed(b"tolaria lane rendezvous, protocol 7\n" + bytes(32)))
        with pytest.raises(JoinRefusedError, match="protocol 7 for joining, this machine 1"):
            await Channel.open(machine, SECRET, ASKED)


async def test_garbage_never_joins() -> None:
    """Random bytes, whatever lengths they announce, end in an error; a huge frame is not read."""
    generator = random.Random(3)
    for case in range(60):
        async with connected() as (stranger, service):
            size = generator.choice([1, 3, 4, 5, 40, 68, 100, 5000])
            content = generator.randbytes(size)
            data = content if case % 2 else framed(content)
            await stranger.send(data if case else b"\xff\xff\xff\xff")
            await stranger.send_eof()
            with anyio.fail_after(180), pytest.raises((ChannelError, JoinRefusedError)):
                await Channel.accept(service, SECRET)


async def recorded() -> bytes:
    """What a machine with the secret sends to a service to join it."""
    async with connected() as (machine, service):
        sent: list[bytes] = []

        async def pose() -> None:
            await service.send(framed(b"tolaria lane rendezvous, protocol 1\n" + bytes(32)))
            sent.append(await service.receive())
            await service.aclose()

        async def join() -> None:
            with suppress(ChannelError):
                await Channel.open(machine, SECRET, ASKED)

        await both(pose, join)
    return sent[0]


async def test_a_recorded_join_is_not_accepted_again() -> None:
    """The service's nonce is another one each time."""
    async with connected() as (stranger, service):
        await stranger.send(await recorded())
        with pytest.raises(JoinRefusedError, match="does not have this secret"):
            await Channel.accept(service, SECRET)


async def test_a_join_that_is_cut_at_any_byte_ends() -> None:
    """With an error, wherever the connection ends."""
    whole = await recorded()
    for size in range(len(whole)):
        async with connected() as (stranger, service):
            await stranger.send(whole[:size]) if size else None
            await stranger.send_eof()
            with anyio.fail_after(180), pytest.raises(ChannelError, match="the connection has ended"):
                await Channel.accept(service, SECRET)


@pytest.mark.parametrize("misdeed", ["repeated", "left out", "swapped", "changed", "sent back", "cut"])
async def test_frames_that_were_tampered_with_end_the_connection(misdeed: str) -> None:
    """Something between both sides repeats, drops, swaps or changes frames that one side sends, or sends them back."""
    async with opened() as (machine, service, raw_machine, raw_service):
        await machine.send(b"first")
        await machine.send(b"second")
        first, second = framed_of(await raw_service.receive(200))
        frames = {
            "repeated": first + first,
            "left out": second,
            "swapped": second + first,
            "changed": first[:-1] + bytes([first[-1] ^ 1]),
            "cut": first[:-1],
        }
        receiver, through = (machine, raw_service) if misdeed == "sent back" else (service, raw_machine)
        await through.send(frames.get(misdeed, first))
        await through.send_eof()
        if misdeed == "repeated":
            assert await receiver.receive() == b"first"
        with anyio.fail_after(180), pytest.raises(ChannelError) as found:
            await receiver.receive()
        assert str(found.value) == ("the connection has ended" if misdeed == "cut" else "a frame is not authentic")


def test_the_interface_of_an_address() -> None:
    """That of loopback is known; an address of another machine has none."""
    assert interface_of("127.0.0.1") == "lo"
    assert not interface_of("203.0.113.7")
    if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):  # noqa: PTH110 - one look
        assert interface_of("::1") in {"lo", ""}


def framed(content: bytes) -> bytes:
    """A frame as it is sent."""
    return struct.pack(">I", len(content)) + content


def framed_of(data: bytes) -> list[bytes]:
    """The frames of what was sent."""
    frames = []
    while data:
        end = 4 + struct.unpack(">I", data[:4])[0]
        frames.append(data[:end])
        data = data[end:]
    return frames
