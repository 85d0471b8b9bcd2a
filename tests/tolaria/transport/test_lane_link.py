from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tolaria.errors import WireError
from tolaria.transport.lane_link import LaneLink
from tolaria.wire import FRAME_BYTES_MAX, Frame, FrameKind, FrameStream, packed_id, send

pytestmark = pytest.mark.anyio
TIMEOUT_S = 180.0
AT_ONCE_S = 2.0
LARGE_BYTES = 300_000


@dataclass
class Linked:
    """A link, what it has received, and the other end of its connection, which blocks."""

    link: LaneLink
    peer: socket.socket
    frames: list[Frame] = field(default_factory=list)
    arrived: anyio.Event = field(default_factory=anyio.Event)

    async def receives(self, count: int) -> None:
        """Waits until that number of frames have arrived."""
        while len(self.frames) < count:
            self.arrived = anyio.Event()
            await self.arrived.wait()


def linked(refuse: Callable[[Sequence[Frame]], None] | None = None) -> Linked:
    """A link that nobody serves yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(TIMEOUT_S)

    def on_frames(frames: Sequence[Frame]) -> None:
        if refuse is not None:
            refuse(frames)
        found.frames.extend(frames)
        found.arrived.set()

    found = Linked(LaneLink(ours, on_frames), theirs)
    return found


@asynccontextmanager
async def served(refuse: Callable[[Sequence[Frame]], None] | None = None) -> AsyncIterator[Linked]:
    """A link that is served until the block ends."""
    found = linked(refuse)
    with found.peer, anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(found.link.serve)
            await anyio.wait_all_tasks_blocked()
            yield found
            tasks.cancel_scope.cancel()
        assert found.link.ended.is_set()


async def frames_of(peer: socket.socket, count: int) -> list[Frame]:
    """Reads `count` frames at the other end, in a thread."""

    def read() -> list[Frame]:
        stream, found = FrameStream(peer), list[Frame]()
        while len(found) < count and (frame := stream.next()) is not None:
            found.append(frame)
        return found

    return await anyio.to_thread.run_sync(read)


async def end_of(peer: socket.socket) -> bool:
    """Whether the other end sees the end of the connection."""
    return await anyio.to_thread.run_sync(peer.recv, 1) == b""


def large(index: int) -> Frame:
    """A frame that does not fit into the socket."""
    return Frame(FrameKind.EVENTS, packed_id(index, bytes([index % 256]) * LARGE_BYTES))


def contents(frames: Sequence[Frame]) -> list[bytes]:
    """The contents alone."""
    return [frame.content for frame in frames]


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def new_descriptor() -> int:
    """A descriptor of a file of its own."""
    return os.memfd_create("passed")


# -- frames ------------------------------------------------------------------------------------------------------------


async def test_frames_pass_both_ways() -> None:
    """Kind, content and descriptors of each, in order."""
    async with served() as ends:
        passed = new_descriptor()
        sent = [Frame(FrameKind.COMMAND, b"one"), Frame(FrameKind.IMAGE, b"", (passed,)), Frame(FrameKind.ORDER, b"3")]
        for frame in sent:
            ends.link.send(frame)
            send(ends.peer, frame)
        found = await frames_of(ends.peer, 3)
        await ends.receives(3)
        for frames in (found, ends.frames):
            assert [frame.kind for frame in frames] == [frame.kind for frame in sent]
            assert contents(frames) == contents(sent)
            (received,) = frames[1].descriptors
            assert os.path.samestat(os.fstat(received), os.fstat(passed))
            os.close(received)
        os.close(passed)
    assert ends.link.fault == ""


async def test_frames_of_one_read_are_handed_over_together() -> None:
    """In one call, in their order."""
    calls = list[int]()
    async with served(lambda frames: calls.append(len(frames))) as ends:
        ends.peer.sendall(
            b"".join(frame.header() + frame.content for frame in map(Frame, FrameKind, [b"x"] * len(FrameKind)))
        )
        await ends.receives(len(FrameKind))
    assert calls == [len(FrameKind)]
    assert [frame.kind for frame in ends.frames] == list(FrameKind)


async def test_frames_sent_before_the_link_is_served_arrive() -> None:
    """What the socket takes at once, and the rest as soon as it is served."""
    ends = linked()
    for index in range(5):
        ends.link.send(large(index))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ends.link.serve)
        with anyio.fail_after(TIMEOUT_S):
            assert contents(await frames_of(ends.peer, 5)) == contents([large(index) for index in range(5)])
        ends.link.close()
    ends.peer.close()


async def test_a_frame_keeps_its_owner_until_it_is_sent() -> None:
    """The owner closes the descriptor, which travels only when those before it have been sent."""

    class Owner:
        def __init__(self) -> None:
            self.descriptor = new_descriptor()

        def __del__(self) -> None:
            os.close(self.descriptor)

    before = open_descriptors()
    async with served() as ends:
        owner = Owner()
        file = os.fstat(owner.descriptor)
        ends.link.send(large(0))
        ends.link.send(Frame(FrameKind.IMAGE, b"", (owner.descriptor,), owner=owner))
        del owner
        _, frame = await frames_of(ends.peer, 2)
        assert os.path.samestat(os.fstat(frame.descriptors[0]), file)
        os.close(frame.descriptors[0])
    del ends, frame
    assert open_descriptors() == before


# -- backpressure ------------------------------------------------------------------------------------------------------


async def test_sending_never_waits_for_the_peer() -> None:
    """A peer that does not read for a while gets everything later, in order; the loop goes on meanwhile."""
    async with served() as ends:
        started_s = time.monotonic()
        for index in range(50):
            ends.link.send(large(index))
        assert time.monotonic() - started_s < AT_ONCE_S
        for _ in range(20):
            await anyio.sleep(0.001)
        send(ends.peer, Frame(FrameKind.READY, b"still received"))
        await ends.receives(1)
        found = await frames_of(ends.peer, 50)
        assert contents(found) == contents([large(index) for index in range(50)])
        ends.link.send(Frame(FrameKind.COMMAND, b"last"))
        assert contents(await frames_of(ends.peer, 1)) == [b"last"]


async def test_a_peer_waits_for_a_link_that_does_not_read() -> None:
    """Its frames all arrive in order once the link is served."""
    ends, count = linked(), 20

    def send_all() -> None:
        for index in range(count):
            send(ends.peer, large(index))

    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, send_all)
            await anyio.sleep(0.05)
            assert ends.frames == []
            tasks.start_soon(ends.link.serve)
            await ends.receives(count)
            ends.link.close()
    assert contents(ends.frames) == contents([large(index) for index in range(count)])
    ends.peer.close()


async def test_both_sides_send_much_at_once() -> None:
    """Neither waits for the other: two links that both have far more to send than fits receive it all."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    found: tuple[list[Frame], list[Frame]] = ([], [])
    links = [LaneLink(each, frames.extend) for each, frames in zip((ours, theirs), found, strict=True)]
    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            for index in range(30):
                for link in links:
                    link.send(large(index))
            for link in links:
                tasks.start_soon(link.serve)
            while len(found[0]) + len(found[1]) < 60:
                await anyio.sleep(0.005)
            links[0].close()  # the other one sees the end
    for frames in found:
        assert contents(frames) == contents([large(index) for index in range(30)])
    assert [link.fault for link in links] == ["", ""]


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_closing_ends_a_link_that_waits() -> None:
    """At once, while it waits for frames or for room to send; the other side sees the end. Closing again is allowed."""
    for waiting in ([], [large(1), large(2)]):
        ends = linked()
        with ends.peer, anyio.fail_after(AT_ONCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ends.link.serve)
                for frame in waiting:
                    ends.link.send(frame)
                await anyio.wait_all_tasks_blocked()
                ends.link.close()
                ends.link.close()
            assert (ends.link.ended.is_set(), ends.link.fault) == (True, "")
            if not waiting:
                assert await end_of(ends.peer)


async def test_a_link_that_is_closed_by_its_own_frames_ends() -> None:
    """Whoever handles a frame may close the link."""
    async with served(lambda frames: ends.link.close()) as ends:
        send(ends.peer, Frame(FrameKind.READY, b"x"))
        await ends.link.ended.wait()
        assert await end_of(ends.peer)
    assert ends.link.fault == ""


async def test_a_cancelled_link_closes_its_connection() -> None:
    """The other side sees the end."""
    async with served() as ends:
        pass
    assert ends.link.ended.is_set()
    async with served() as others:
        others.link.send(Frame(FrameKind.READY, b"x"))
        await frames_of(others.peer, 1)
    assert others.link.fault == ""


async def test_a_link_that_has_ended_sends_nothing() -> None:
    """Frames for it are dropped, even those over the bounds of others."""
    async with served() as ends:
        ends.peer.close()
        await ends.link.ended.wait()
        ends.link.send(Frame(FrameKind.READY, b"x"))
    ends.link.send(Frame(FrameKind.READY, b"x"))
    assert ends.link.fault == ""


async def test_a_frame_over_the_bounds_is_refused_and_the_link_goes_on() -> None:
    """The sender gets the error, and the next frame arrives."""
    async with served() as ends:
        with pytest.raises(WireError, match="exceeds the bounds"):
            ends.link.send(Frame(FrameKind.EVENTS, bytes(FRAME_BYTES_MAX + 1)))
        ends.link.send(Frame(FrameKind.READY, b"next"))
        assert contents(await frames_of(ends.peer, 1)) == [b"next"]


@pytest.mark.parametrize("garbage", [b"garbage!", bytes(8), b"\x0a\x7a\xff\x00\x00\x00\x00\x00"])
async def test_garbage_ends_the_link(garbage: bytes) -> None:
    """Frames before it are handed over; the fault quotes it, and the other side sees the end."""
    async with served() as ends:
        send(ends.peer, Frame(FrameKind.READY, b"x"))
        await ends.receives(1)
        ends.peer.sendall(garbage)
        await ends.link.ended.wait()
        assert ends.link.fault == f"not a frame: its first bytes are {garbage.hex()}"
        assert await end_of(ends.peer)
    assert contents(ends.frames) == [b"x"]


@pytest.mark.parametrize("error", [WireError, ValueError, TypeError, KeyError])
async def test_refused_frames_end_the_link(error: type[Exception]) -> None:
    """The reason of whoever handles the frames is the fault."""

    def refuse(frames: Sequence[Frame]) -> None:
        raise error("not like this")

    async with served(refuse) as ends:
        send(ends.peer, Frame(FrameKind.READY, b"x"))
        await ends.link.ended.wait()
        assert "not like this" in ends.link.fault
        assert ends.frames == []


async def test_the_end_of_the_peer_ends_the_link() -> None:
    """Between two frames it is no fault, within one it is."""
    async with served() as ends:
        send(ends.peer, Frame(FrameKind.READY, b"x"))
        ends.peer.close()
        await ends.link.ended.wait()
    assert (contents(ends.frames), ends.link.fault) == ([b"x"], "")
    async with served() as ends:
        frame = Frame(FrameKind.READY, b"cut off")
        ends.peer.sendall((frame.header() + frame.content)[:-1])
        ends.peer.close()
        await ends.link.ended.wait()
    assert (ends.frames, "ended within a frame, after 14 of its bytes" in ends.link.fault) == ([], True)


async def test_the_end_of_a_peer_that_does_not_read_ends_the_link() -> None:
    """Although much is still to be sent; it is no fault."""
    async with served() as ends:
        for index in range(5):
            ends.link.send(large(index))
        await anyio.wait_all_tasks_blocked()
        ends.peer.close()
        await ends.link.ended.wait()
    assert ends.link.fault == ""


@pytest.fixture
def child() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A process that has the only other end of a connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[theirs.fileno()], start_new_session=True
        )
    yield ours, process
    process.kill()
    process.wait(TIMEOUT_S)


async def test_the_death_of_the_other_process_ends_the_link(
    child: tuple[socket.socket, subprocess.Popen[bytes]],
) -> None:
    """SIGKILL leaves no message; what the link had to send is dropped."""
    connection, process = child
    link = LaneLink(connection, lambda frames: None)
    for index in range(5):
        link.send(large(index))
    with anyio.fail_after(TIMEOUT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.serve)
            await anyio.sleep(0.05)
            assert not link.ended.is_set()
            process.send_signal(signal.SIGKILL)
    assert (link.ended.is_set(), link.fault) == (True, "")


async def test_links_leave_no_descriptors_open() -> None:
    """Fifty of them, with descriptors in both directions, that end in each of the ways."""
    before = 0
    for number in range(51):
        if number == 1:  # the first one has started the threads and pipes that stay
            before = open_descriptors()
        async with served() as ends:
            passed = new_descriptor()
            ends.link.send(Frame(FrameKind.IMAGE, b"", (passed,)))
            send(ends.peer, Frame(FrameKind.IMAGE, b"", (passed,)))
            await ends.receives(1)
            for frame in (*await frames_of(ends.peer, 1), *ends.frames):
                os.close(frame.descriptors[0])
            if number % 5 == 0:
                socket.send_fds(ends.peer, [Frame(FrameKind.IMAGE, b"x", (passed,)).header()], [passed])
                ends.peer.close()
            elif number % 5 == 1:
                ends.peer.sendall(b"garbage!")
            elif number % 5 == 2:
                ends.link.close()
            elif number % 5 == 3:
                ends.link.send(large(1))
                ends.link.send(Frame(FrameKind.IMAGE, b"", (passed,)))
                ends.peer.close()
            if number % 5 != 4:
                await ends.link.ended.wait()
            os.close(passed)
    assert open_descriptors() == before
