from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.waiting import wait_for
from tolaria.errors import ImageDamagedError, LaneLostError
from tolaria.images import ImagePool, Lease, StateImage, TensorSpec
from tolaria.segments import PREAMBLE_BYTES, Segment, image_header, open_image
from tolaria.transport.lane_images import HeldSegments, LaneImages
from tolaria.values.training import Position
from tolaria.wire import Frame, FrameKind, packed_id

TIMEOUT_S = 180.0


def open_descriptors() -> int:
    """How many descriptors this process has."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def new_image(step: int = 7) -> StateImage:
    """A sealed image with two tensors."""
    specs = (TensorSpec("a", "U8", (100,)), TensorSpec("b", "U8", (10,)))
    buffers = {"a": memoryview(bytearray(range(100))), "b": memoryview(bytearray([step % 256] * 10))}
    image = StateImage(Position(step, 1), specs, buffers, b"{}")
    image.seal()
    return image


class Lane:
    """What the process of the lane would do: fills segments, and records the frames that it is sent."""

    def __init__(self) -> None:
        self.held = HeldSegments()
        self.frames: list[Frame] = []
        self.images = LaneImages(self.held, self.frames.append)
        self.segments: dict[int, Segment] = {}

    def captures(self, image_id: int, numbers: tuple[int, int], step: int = 7) -> StateImage:
        """Captures an image whose tensors lie in two segments, the second of which may be another image's too."""
        image = new_image(step)
        a, b = image.specs
        for number, spec in zip(numbers, (b, a), strict=True):
            if number not in self.segments:
                self.segments[number] = Segment.create(number, 2000)
                self.held.put({number: os.dup(self.segments[number].descriptor)})
            memory = self.segments[number].memory
            memory[PREAMBLE_BYTES : PREAMBLE_BYTES + spec.size_bytes] = bytes(image.buffers[spec.name])
        header = image_header(image, [(numbers[0], [b]), (numbers[1], [a])])
        assert self.segments[numbers[0]].write_header(500, header)
        self.images.captured(image_id, numbers[0])
        return image

    @property
    def sent(self) -> list[tuple[FrameKind, bytes]]:
        """Kind and content of each frame so far."""
        return [(frame.kind, frame.content) for frame in self.frames]

    def close(self) -> None:
        """Closes all segments, and waits for the thread that does it, so that the next test counts none of them."""
        for number in list(self.held):
            self.held.close(number)
        self.held._closer.shutdown()  # noqa: SLF001 - nothing else says when all is closed


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane with no images yet."""
    lane = Lane()
    yield lane
    lane.close()


def released(image_id: int) -> tuple[FrameKind, bytes]:
    """What the lane is sent when an image of its own is not read any more."""
    return FrameKind.IMAGE_RELEASED, packed_id(image_id)


def discarded(image_id: int) -> tuple[FrameKind, bytes]:
    """What the lane is sent when an image of the service's is not going to be restored."""
    return FrameKind.IMAGE_DISCARDED, packed_id(image_id)


def in_thread(function: Callable[[], object]) -> None:
    """Runs a function in a thread of its own."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


# -- images of the lane ------------------------------------------------------------------------------------------------


def test_an_image_of_the_lane_is_taken_and_released(lane: Lane) -> None:
    """Its content is the lane's memory; the lane hears of the release once."""
    image = lane.captures(4, (1, 2))
    lease = lane.images.take(4)
    assert lease.image.verify() == image.seal()
    assert (lease.image.position, lease.image.segment) == (Position(7, 1), 1)
    lane.segments[1].memory[PREAMBLE_BYTES] = 88
    assert lease.image.buffers["b"][0] == 88
    assert (lane.images.being_read, lane.sent) == ({1, 2}, [])
    lease.release()
    lease.release()
    assert (lane.images.being_read, lane.sent) == (set(), [released(4)])


@pytest.mark.parametrize("first", [True, False], ids=["taken", "discarded"])
def test_an_image_is_taken_once(lane: Lane, first: bool) -> None:
    """Neither after it was taken or discarded, nor if it was never captured."""
    lane.captures(4, (1, 2))
    if first:
        lane.images.take(4).release()
    else:
        lane.images.discard(4)
    assert lane.sent == [released(4)]
    for image_id in (4, 5):
        with pytest.raises(KeyError):
            lane.images.take(image_id)
    lane.images.discard(4)
    assert lane.sent == [released(4)]


def test_segments_of_all_leased_images_are_being_read(lane: Lane) -> None:
    """Those that two images share until the last of them is released."""
    lane.captures(1, (1, 5), step=1)
    lane.captures(2, (2, 5), step=2)
    lane.captures(3, (3, 6), step=3)
    assert lane.images.being_read == set()
    first, second = lane.images.take(1), lane.images.take(2)
    assert lane.images.being_read == {1, 2, 5}
    first.release()
    assert lane.images.being_read == {2, 5}
    third = lane.images.take(3)
    second.release()
    assert lane.images.being_read == {3, 6}
    third.release()
    assert lane.images.being_read == set()
    assert lane.sent == [released(1), released(2), released(3)]


def test_an_image_is_released_by_another_thread(lane: Lane) -> None:
    """Such as the one that has written a checkpoint."""
    lane.captures(1, (1, 2))
    lease = lane.images.take(1)
    in_thread(lease.release)
    assert (lane.images.being_read, lane.sent) == (set(), [released(1)])


def test_threads_release_images_while_their_segments_are_asked_for(lane: Lane) -> None:
    """The answer is what is being read at some moment, and never an error."""
    rounds, before = 500, sys.getswitchinterval()
    for index in range(3 * rounds):
        lane.captures(index, (1 + index % 40, 100))
    leases = [[lane.images.take(index) for index in range(start, 3 * rounds, 3)] for start in range(3)]
    ends = [threading.Thread(target=lambda each=each: [lease.release() for lease in each]) for each in leases]
    sys.setswitchinterval(1e-6)
    try:
        for thread in ends:
            thread.start()
        while any(thread.is_alive() for thread in ends):
            assert lane.images.being_read <= {*range(1, 41), 100}
    finally:
        sys.setswitchinterval(before)
        for thread in ends:
            thread.join(TIMEOUT_S)
    assert (lane.images.being_read, len(lane.frames)) == (set(), 3 * rounds)


def test_an_image_in_lost_memory_cannot_be_taken(lane: Lane) -> None:
    """If one of its segments is gone, the lane that has captured it has ended."""
    lane.captures(1, (1, 2))
    lane.held.close(1)
    with pytest.raises(LaneLostError, match="gone"):
        lane.images.take(1)
    assert lane.images.being_read == set()


def test_a_damaged_image_is_not_leased(lane: Lane) -> None:
    """Without a finished header it is an error, and nothing is being read."""
    lane.captures(1, (1, 2))
    lane.segments[1].clear()
    with pytest.raises(ImageDamagedError, match="header"):
        lane.images.take(1)
    assert lane.images.being_read == set()


# -- the end of the lane -----------------------------------------------------------------------------------------------


def test_images_are_read_on_after_the_end_of_their_lane(lane: Lane) -> None:
    """Their segments still count as being read; the next lane hears nothing of their release."""
    image = lane.captures(4, (1, 2))
    lease = lane.images.take(4)
    lane.images.lost()
    assert lane.images.being_read == {1, 2}
    lane.close()
    assert lease.image.verify() == image.seal()
    in_thread(lease.release)
    assert (lane.images.being_read, lane.sent) == (set(), [])


def test_ids_of_two_lanes_are_told_apart(lane: Lane) -> None:
    """A later lane gives the same ids again: each release concerns the image of its own lane."""
    lane.captures(1, (1, 2), step=1)
    older = lane.images.take(1)
    lane.images.lost()
    lane.captures(1, (3, 4), step=2)
    newer = lane.images.take(1)
    assert lane.images.being_read == {1, 2, 3, 4}
    older.release()
    assert (lane.images.being_read, lane.sent) == ({3, 4}, [])
    assert newer.image.position == Position(2, 1)
    newer.release()
    assert (lane.images.being_read, lane.sent) == (set(), [released(1)])


def test_images_of_a_lane_that_has_ended_cannot_be_taken(lane: Lane) -> None:
    """The caller learns that the lane has ended."""
    lane.captures(1, (1, 2))
    lane.images.lost()
    with pytest.raises(LaneLostError):
        lane.images.take(1)
    assert (lane.images.being_read, lane.sent) == (set(), [])


def test_images_of_a_lane_that_has_ended_are_discarded_without_a_word(lane: Lane) -> None:
    """Neither its own ones nor those that it has been given concern the next lane."""
    lane.captures(1, (1, 2))
    given = lane.images.put(new_image())
    lane.images.lost()
    del lane.frames[:]
    lane.images.discard(1)
    lane.images.discard(given)
    assert lane.sent == []


# -- images of the service ---------------------------------------------------------------------------------------------


def test_an_image_of_the_service_is_copied_and_sent(lane: Lane) -> None:
    """The frame keeps its segment open; in there is the same image, with its digests."""
    image = new_image()
    image_id = lane.images.put(image)
    (frame,) = lane.frames
    assert (frame.kind, frame.content, len(frame.descriptors)) == (FrameKind.IMAGE, packed_id(image_id), 1)
    assert len(lane.images) == 0
    image.buffers["a"][0] = 99
    opened = open_image(Segment(0, os.dup(frame.descriptors[0])), {}).image
    assert opened.verify() == image.sealed
    assert opened.position == image.position


def test_the_segment_of_a_sent_image_is_closed_with_its_frame(lane: Lane) -> None:
    """The lane has it then."""
    before = open_descriptors()
    lane.images.put(new_image())
    assert open_descriptors() > before
    lane.frames.clear()
    assert open_descriptors() == before


def test_a_lease_ends_with_the_copy(lane: Lane) -> None:
    """Also if there is no memory for the copy; then nothing is sent."""
    ends = list[int]()
    lane.images.put(Lease(new_image(), lambda: ends.append(1)))
    assert (ends, len(lane.frames)) == ([1], 1)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(image: StateImage) -> Segment:
            raise MemoryError("no room")

        patch.setattr("tolaria.transport.lane_images.share", refuse)
        with pytest.raises(MemoryError, match="no room"):
            lane.images.put(Lease(new_image(), lambda: ends.append(2)))
    assert (ends, len(lane.frames), len(lane.images)) == ([1, 2], 1, 0)


def test_an_image_of_the_service_is_discarded_once(lane: Lane) -> None:
    """Unknown ids are ignored."""
    first, second = lane.images.put(new_image()), lane.images.put(new_image())
    assert first != second
    del lane.frames[:]
    lane.images.discard(first)
    lane.images.discard(first)
    lane.images.discard(99)
    assert lane.sent == [discarded(first)]
    lane.images.discard(second)
    assert lane.sent == [discarded(first), discarded(second)]


def test_images_of_both_sides_are_told_apart(lane: Lane) -> None:
    """Both count their images; the one to be discarded is the one that was meant."""
    of_lane = ImagePool().put(new_image())
    given = lane.images.put(new_image())
    lane.captures(of_lane, (1, 2))
    del lane.frames[:]
    lane.images.discard(of_lane)
    assert lane.sent == [released(of_lane)]
    lane.images.discard(given)
    assert lane.sent == [released(of_lane), discarded(given)]


# -- held segments -----------------------------------------------------------------------------------------------------


def test_held_segments_are_mapped_when_they_are_looked_up() -> None:
    """Each look-up is a mapping of its own, with a descriptor of its own; the held one stays."""
    before, held, segment = open_descriptors(), HeldSegments(), Segment.create(3, 100)
    descriptor = os.dup(segment.descriptor)
    held.put({3: descriptor})
    found = held[3]
    segment.memory[70] = 5
    assert (found.number, found.memory[70]) == (3, 5)
    assert found.descriptor not in {descriptor, segment.descriptor}
    assert (list(held), len(held), 3 in held, held.descriptors()) == ([3], 1, True, [(3, descriptor)])
    held.close(3)
    held.close(3)
    assert (list(held), len(held), 3 in held, held.descriptors()) == ([], 0, False, [])
    with pytest.raises(KeyError):
        held[3]
    assert found.memory[70] == 5
    del found, segment
    wait_for(lambda: open_descriptors() == before)  # a thread closes what was held


def test_a_held_segment_is_replaced_by_another_of_its_number() -> None:
    """The descriptor of the older one is closed."""
    before, held, segments = open_descriptors(), HeldSegments(), [Segment.create(3, 100) for _ in range(3)]
    segments[2].memory[70] = 9
    for segment in segments:
        held.put({3: os.dup(segment.descriptor)})
    assert held[3].memory[70] == 9
    assert len(held) == 1
    held.close(3)
    del segments, segment
    wait_for(lambda: open_descriptors() == before)  # a thread closes what was held


def test_what_is_no_segment_leaves_no_descriptor_open() -> None:
    """A file that cannot be mapped raises an error at each look-up."""
    held = HeldSegments()
    held.put({3: os.memfd_create("empty")})
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises((OSError, ValueError)):
            held[3]
    assert open_descriptors() == before
    held.close(3)
