from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.errors import WireError
from tolaria.wire import (
    DESCRIPTORS_MAX,
    FRAME_BYTES_MAX,
    Frame,
    FrameKind,
    FrameReader,
    FrameStream,
    Outgoing,
    packed_events,
    packed_id,
    receive,
    send,
    unpacked_events,
    unpacked_id,
)

TIMEOUT_S = 180.0
MAGIC = 0x7A0A


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def named(name: str) -> int:
    """A descriptor that can be recognised after it has been passed on."""
    return os.memfd_create(name)


def name_of(descriptor: int) -> str:
    """The name with which the descriptor was created."""
    return Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(":")[2].split()[0]


def close_all(descriptors: Sequence[int]) -> None:
    """Closes each of them."""
    for descriptor in descriptors:
        os.close(descriptor)


def header(kind: int, count: int = 0, length: int = 0, magic: int = MAGIC) -> bytes:
    """The header of a frame, valid or not."""
    return struct.pack("<HBBI", magic, kind, count, length)


def encoded(frame: Frame) -> bytes:
    """The bytes of a frame."""
    return frame.header() + frame.content


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection on which nothing waits for ever."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(TIMEOUT_S)
        theirs.settimeout(TIMEOUT_S)
        yield ours, theirs


def send_all(connection: socket.socket, frames: Sequence[Frame]) -> None:
    """Sends the frames, one after the other."""
    for frame in frames:
        send(connection, frame)


def narrow(connection: socket.socket) -> None:
    """Leaves room for a few kilobytes in the socket."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@contextmanager
def descriptors_limited_to(free: int) -> Iterator[None]:
    """Lets this process open only so many descriptors more."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(free + 1)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    close_all(opened)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# -- putting frames together -------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.tuples(st.sampled_from(FrameKind), st.binary(max_size=100), st.integers(0, 3)), min_size=1, max_size=6
)


@given(FRAMES, st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_frames_survive_pieces_of_any_size(described: list[tuple[FrameKind, bytes, int]], sizes: list[int]) -> None:
    """Kind, content and descriptors of each frame are as sent, whatever the borders of the pieces."""
    before = open_descriptors()
    data, starts = b"", dict[int, list[int]]()
    for index, (kind, content, count) in enumerate(described):
        passed = [named(f"{index}-{place}") for place in range(count)]
        starts[len(data)] = passed
        data += encoded(Frame(kind, content, tuple(passed)))
    reader, found, at, turn = FrameReader(), list[Frame](), 0, 0
    while at < len(data):
        end = at + sizes[turn % len(sizes)]
        arriving = [descriptor for start in starts if at <= start < end for descriptor in starts[start]]
        found += reader.feed(data[at:end], arriving)
        at, turn = end, turn + 1
    assert [(frame.kind, frame.content, len(frame.descriptors)) for frame in found] == described
    for index, frame in enumerate(found):
        names = [name_of(descriptor) for descriptor in frame.descriptors]
        assert names == [f"{index}-{place}" for place in range(len(names))]
        close_all(frame.descriptors)
    assert reader.close() == ""
    assert open_descriptors() == before


@pytest.mark.parametrize("seed", range(5))
def test_frames_survive_a_socket_with_little_room(seed: int) -> None:
    """Frames of many sizes that a thread sends arrive complete, in order, and with their own descriptors."""
    chosen, before = random.Random(seed), open_descriptors()
    frames = [
        Frame(
            chosen.choice(list(FrameKind)),
            chosen.randbytes(chosen.choice([0, 1, 100, 5000, 70_000, 200_000])),
            tuple(named(f"{index}-{place}") for place in range(chosen.choice([0, 0, 1, 5]))),
        )
        for index in range(30)
    ]
    with connected() as (ours, theirs):
        narrow(ours)
        sender = threading.Thread(target=send_all, args=(ours, frames))
        sender.start()
        stream = FrameStream(theirs)
        for index, frame in enumerate(frames):
            found = stream.next()
            assert found is not None
            assert (found.kind, found.content == frame.content) == (frame.kind, True)
            names = [name_of(descriptor) for descriptor in found.descriptors]
            assert names == [f"{index}-{place}" for place in range(len(frame.descriptors))]
            close_all(found.descriptors)
        sender.join()
    for frame in frames:
        close_all(frame.descriptors)
    assert open_descriptors() == before


def test_descriptors_are_the_receivers_own_and_end_with_its_programs() -> None:
    """As many as a frame may have arrive under numbers of the receiver's own, and are closed on exec."""
    passed = [named(f"file-{index}") for index in range(DESCRIPTORS_MAX)]
    with connected() as (ours, theirs):
        send(ours, Frame(FrameKind.SEGMENTS, b"x", tuple(passed)))
        frame = FrameStream(theirs).next()
    assert frame is not None
    assert [name_of(descriptor) for descriptor in frame.descriptors] == [f"file-{n}" for n in range(DESCRIPTORS_MAX)]
    assert not set(frame.descriptors) & set(passed)
    assert not any(os.get_inheritable(descriptor) for descriptor in frame.descriptors)
    close_all([*passed, *frame.descriptors])


def test_a_connection_cut_at_any_byte_ends_cleanly_or_with_an_error() -> None:
    """At a frame's border it has ended, within a frame it is an error, and no descriptor is left open."""
    passed = [named("first"), named("second"), named("third")]
    frames = [
        Frame(FrameKind.SEGMENTS, b"[1, 2]", tuple(passed[:2])),
        Frame(FrameKind.READY, b""),
        Frame(FrameKind.IMAGE, packed_id(7), tuple(passed[2:])),
    ]
    sizes = [len(encoded(frame)) for frame in frames]
    borders = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    before = open_descriptors()
    for cut in range(sum(sizes) + 1):
        with connected() as (ours, theirs):
            left = cut
            for frame in frames:
                if data := encoded(frame)[:left]:
                    socket.send_fds(ours, [data], list(frame.descriptors))
                left -= len(data)
            ours.close()
            stream, found = FrameStream(theirs), 0
            try:
                while (arrived := stream.next()) is not None:
                    close_all(arrived.descriptors)
                    found += 1
                assert cut in borders
            except WireError as error:
                assert cut not in borders
                assert "within a frame" in str(error)  # noqa: PT017 - both outcomes are right, each at its places
            assert found == sum(border <= cut for border in borders) - 1
            del stream
        assert open_descriptors() == before, cut
    close_all(passed)


# -- what is no frame --------------------------------------------------------------------------------------------------

NO_FRAMES = {
    "garbage": b"garbage!",
    "other magic": header(1, magic=MAGIC + 1),
    "kind 0": header(0),
    "unknown kind": header(max(FrameKind) + 1),
    "length over the bound": header(1, length=FRAME_BYTES_MAX + 1),
    "longest length": header(1, length=2**32 - 1),
    "descriptors over the bound": header(1, count=DESCRIPTORS_MAX + 1),
}


@pytest.mark.parametrize("data", NO_FRAMES.values(), ids=NO_FRAMES.keys())
def test_what_is_no_frame_is_refused_with_its_first_bytes(data: bytes) -> None:
    """The error quotes the header; the descriptors that came with it are closed, and nothing is left over."""
    before = open_descriptors()
    reader = FrameReader()
    with pytest.raises(WireError, match=f"not a frame: its first bytes are {data[:8].hex()}"):
        reader.feed(data, [named("lost")])
    assert (open_descriptors(), reader.close()) == (before, "")


def test_any_bytes_give_frames_or_an_error() -> None:
    """Random bytes, and frames with a few bytes changed, raise nothing else, in pieces of any size."""
    refused = 0
    for seed in range(300):
        chosen = random.Random(seed)
        frames = [Frame(chosen.choice(list(FrameKind)), chosen.randbytes(chosen.randrange(20))) for _ in range(4)]
        data = bytearray(b"".join(map(encoded, frames)))
        for _ in range(chosen.randrange(1, 4)):
            data[chosen.randrange(len(data))] ^= chosen.randrange(1, 256)
        if seed % 3 == 0:
            data = bytearray(chosen.randbytes(50))
        reader, at = FrameReader(), 0
        try:
            while at < len(data):
                size = chosen.randrange(1, 30)
                reader.feed(bytes(data[at : at + size]))
                at += size
        except WireError:
            refused += 1
    assert refused > 150


def test_missing_descriptors_are_an_error() -> None:
    """The error says how many were announced and how many came; those that came are closed."""
    before = open_descriptors()
    with connected() as (ours, theirs):
        passed = named("one")
        socket.send_fds(ours, [header(FrameKind.IMAGE, count=2, length=3) + b"abc"], [passed])
        os.close(passed)
        with pytest.raises(WireError, match="announces 2 descriptors, but 1 have arrived"):
            FrameStream(theirs).next()
    assert open_descriptors() == before


@pytest.mark.parametrize("announced", [0, 1])
def test_descriptors_that_no_frame_announces_are_an_error(announced: int) -> None:
    """They are closed, and are not taken for those of a later frame."""
    before = open_descriptors()
    with connected() as (ours, theirs):
        passed = [named(f"file-{index}") for index in range(announced + 1)]
        socket.send_fds(ours, [header(FrameKind.IMAGE, count=announced, length=3) + b"abc"], passed)
        close_all(passed)
        stream = FrameStream(theirs)
        with pytest.raises(WireError, match="descriptor"):
            stream.next()
        del stream
    assert open_descriptors() == before


def test_an_error_after_a_frame_with_descriptors_leaves_none_open() -> None:
    """A frame that ends in the same read as garbage begins does not keep its descriptors open."""
    before = open_descriptors()
    reader = FrameReader()
    good = Frame(FrameKind.IMAGE, packed_id(1), (named("one"),))
    frames = list[Frame]()
    with pytest.raises(WireError, match="not a frame"):
        frames += reader.feed(encoded(good) + b"garbage!", good.descriptors)
    for frame in frames:
        close_all(frame.descriptors)
    assert open_descriptors() == before


def test_descriptors_that_the_receiver_has_no_room_for_are_an_error() -> None:
    """A process at its limit gets an error instead of a frame without its descriptors; what came is closed."""
    passed = [named(f"file-{index}") for index in range(3)]
    with connected() as (ours, theirs):
        send(ours, Frame(FrameKind.SEGMENTS, b"[1,2,3]", tuple(passed)))
        before, reader = open_descriptors(), FrameReader()
        with descriptors_limited_to(1), pytest.raises(WireError, match="descriptors were lost"):
            receive(theirs, reader)
        reader.close()
        assert open_descriptors() == before
    close_all(passed)


# -- sending -----------------------------------------------------------------------------------------------------------


def through_send(connection: socket.socket, frame: Frame) -> None:
    """Sends a frame on a blocking socket."""
    send(connection, frame)


def through_outgoing(connection: socket.socket, frame: Frame) -> None:
    """Begins to send a frame."""
    Outgoing(frame).advance(connection)


@pytest.mark.parametrize("begin", [through_send, through_outgoing])
def test_a_frame_over_the_bounds_is_not_sent(begin: Callable[[socket.socket, Frame], None]) -> None:
    """The error names the kind, the size and the bounds, and not one byte is sent."""
    with connected() as (ours, theirs):
        with pytest.raises(WireError, match=f"a events frame of {FRAME_BYTES_MAX + 1} bytes and 0 descriptors exceeds"):
            begin(ours, Frame(FrameKind.EVENTS, bytes(FRAME_BYTES_MAX + 1)))
        with pytest.raises(WireError, match=f"of 0 bytes and {DESCRIPTORS_MAX + 1} descriptors exceeds"):
            begin(ours, Frame(FrameKind.SEGMENTS, b"", (1,) * (DESCRIPTORS_MAX + 1)))
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive(theirs, FrameReader())


def test_a_frame_of_the_largest_size_is_accepted() -> None:
    """The bounds themselves are allowed, at the sender and at the receiver."""
    content = bytes(FRAME_BYTES_MAX)
    (frame,) = FrameReader().feed(Frame(FrameKind.EVENTS, content).header() + content)
    assert frame.content == content


def test_what_the_socket_does_not_take_is_sent_later_in_order() -> None:
    """A sender that does not block stops when the peer does not read, and goes on where it has stopped."""
    before = open_descriptors()
    passed = [named(f"file-{index}") for index in range(4)]
    frames = [Frame(FrameKind.EVENTS, bytes([index]) * 300_000, (passed[index],)) for index in range(4)]
    outbox, found, stops = deque(map(Outgoing, frames)), list[Frame](), 0
    with connected() as (ours, theirs):
        narrow(ours)
        ours.setblocking(False)
        theirs.setblocking(False)
        reader = FrameReader()
        while len(found) < len(frames):
            with suppress(BlockingIOError):
                while outbox and outbox[0].advance(ours):
                    outbox.popleft()
            stops += bool(outbox)
            found += receive(theirs, reader) or []
    assert stops > 10
    assert [frame.content for frame in found] == [frame.content for frame in frames]
    assert [name_of(frame.descriptors[0]) for frame in found] == [f"file-{index}" for index in range(4)]
    close_all([*passed, *(frame.descriptors[0] for frame in found)])
    assert open_descriptors() == before


def test_descriptors_wait_with_the_first_byte() -> None:
    """A socket that is full takes neither; both arrive once, when there is room again."""
    passed = named("late")
    with connected() as (ours, theirs):
        narrow(ours)
        ours.setblocking(False)
        filler = Outgoing(Frame(FrameKind.EVENTS, bytes(500_000)))
        with suppress(BlockingIOError):
            while not filler.advance(ours):
                pass
        late = Outgoing(Frame(FrameKind.IMAGE, b"", (passed,)))
        with pytest.raises(BlockingIOError):
            late.advance(ours)
        stream = FrameStream(theirs)
        reader = threading.Thread(target=stream.next)
        reader.start()
        ours.setblocking(True)
        while not filler.advance(ours):
            pass
        reader.join()
        assert late.advance(ours)
        frame = stream.next()
        assert frame is not None
        assert [name_of(descriptor) for descriptor in frame.descriptors] == ["late"]
        close_all([passed, *frame.descriptors])


def test_sending_to_a_closed_connection_is_an_error() -> None:
    """No signal ends the process, and the error says that the connection has ended."""
    with connected() as (ours, theirs):
        theirs.close()
        with pytest.raises(WireError, match="the connection has ended"):
            send(ours, Frame(FrameKind.READY, b"x"))


def test_a_peer_that_closes_with_unread_frames_has_ended() -> None:
    """The reset that the system reports then is an end like any other."""
    with connected() as (ours, theirs):
        send(ours, Frame(FrameKind.READY, b"unread"))
        theirs.close()
        assert FrameStream(ours).next() is None


# -- ids and events ----------------------------------------------------------------------------------------------------


@given(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=50))
def test_ids_survive(number: int, rest: bytes) -> None:
    """An id of 64 bits and what follows it are found again."""
    assert unpacked_id(packed_id(number, rest)) == (number, rest)


@pytest.mark.parametrize("size", range(8))
def test_a_frame_too_short_for_an_id_is_refused(size: int) -> None:
    """The error says how long it is."""
    with pytest.raises(WireError, match=f"of {size} bytes has no room for an id"):
        unpacked_id(bytes(size))


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_events_survive_and_are_refused_when_cut_off(events: list[bytes]) -> None:
    """All events are found again; a content cut off anywhere but between two of them is an error."""
    content = packed_events(events)
    assert unpacked_events(content) == events
    borders = {len(packed_events(events[:count])): count for count in range(len(events) + 1)}
    for cut in range(len(content)):
        if cut in borders:
            assert unpacked_events(content[:cut]) == events[: borders[cut]]
        else:
            with pytest.raises(WireError, match="cut off"):
                unpacked_events(content[:cut])
