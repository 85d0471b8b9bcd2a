from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.processes import python_path
from tolaria.errors import ImageDamagedError
from tolaria.images import DTYPE_BYTES, StateImage, TensorSpec, canonical_json
from tolaria.segments import (
    ALIGNMENT_BYTES,
    PREAMBLE_BYTES,
    Segment,
    header_bytes,
    image_header,
    open_image,
    padded,
    placed,
    placed_bytes,
    segments_frames,
    segments_of,
    share,
)
from tolaria.values.training import Position
from tolaria.wire import FrameStream, send

TIMEOUT_S = 60.0
DIGEST_BYTES = 32
"""Offset, length and digest in the preamble."""

OPENS = """
import sys
from tolaria.segments import Segment, open_image
opened = open_image(Segment(0, int(sys.argv[1])), {})
position = opened.image.position
print(opened.image.verify().total, position.global_step, position.epoch, opened.image.values.decode())
"""
FILLS = """
import socket, sys
from tolaria.images import StateImage, TensorSpec
from tolaria.segments import segments_frames, share
from tolaria.values.training import Position
from tolaria.wire import send
image = StateImage(Position(3, 1), (TensorSpec("a", "U8", (100_000,)),), {"a": memoryview(bytearray(100_000))}, b"{}")
image.buffers["a"][:] = bytes(range(250)) * 400
print(image.seal().total)
segment = share(image)
(frame,) = segments_frames([(1, segment.descriptor)])
send(socket.socket(fileno=int(sys.argv[1])), frame)
"""


def new_image(values: bytes = b'{"a":"\\"quoted\\""}') -> StateImage:
    """An unsealed image with three tensors, one of them empty."""
    specs = (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BOOL", ()), TensorSpec("c", "I64", (0, 4)))
    buffers = {"a": bytearray(range(24)), "b": bytearray(b"\x01"), "c": bytearray()}
    return StateImage(Position(7, 2), specs, {name: memoryview(data) for name, data in buffers.items()}, values)


def shared_image() -> tuple[Segment, StateImage]:
    """A sealed image and its segment."""
    image = new_image()
    image.seal()
    return share(image), image


def with_header(header: bytes) -> Segment:
    """A segment with this header and its correct digest."""
    segment = Segment.create(0, 1000 + len(header))
    assert segment.write_header(1000, header)
    return segment


def described(segment: Segment) -> dict[str, object]:
    """The JSON of a segment's header."""
    header = segment.header()
    assert header is not None
    found: dict[str, object] = json.loads(header)
    return found


def open_descriptors() -> int:
    """How many descriptors this process has."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mappings() -> int:
    """How many segments are mapped in this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:tolaria")


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """Lowers a limit of this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def python(code: str, descriptor: int) -> str:
    """The output of a program that gets the descriptor and its number."""
    return subprocess.run(
        [sys.executable, "-c", code, str(descriptor)],
        pass_fds=[descriptor],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=TIMEOUT_S,
    ).stdout


# -- between processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_another_process_finds_the_same_image(sealed: bool) -> None:
    """Fingerprint, position and values, whether the digests were recorded or are computed there."""
    image = new_image()
    if sealed:
        image.seal()
    segment = share(image)
    assert (described(segment)["digests"] is not None) == sealed
    found = python(OPENS, segment.descriptor)
    assert found == f"{image.seal().total} 7 2 {image.values.decode()}\n"


def test_a_segment_outlives_the_process_that_filled_it() -> None:
    """What the process has sent before its end is opened and verified after it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        digest = python(FILLS, theirs.fileno()).strip()
        theirs.close()
        frame = FrameStream(ours).next()
    assert frame is not None
    opened = open_image(Segment(0, *frame.descriptors), {})
    assert opened.image.verify().total == digest
    assert opened.image.position == Position(3, 1)


def test_segments_travel_with_their_numbers() -> None:
    """Each is mapped under its number, and both sides write to the same memory."""
    segments = [Segment.create(number, 10) for number in (5, 3, 9)]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        (sent,) = segments_frames([(segment.number, segment.descriptor) for segment in segments])
        send(ours, sent)
        frame = FrameStream(theirs).next()
    assert frame is not None
    found = segments_of(frame)
    assert list(found) == [5, 3, 9]
    for segment in segments:
        assert found[segment.number].descriptor != segment.descriptor
        segment.memory[70] = segment.number
        assert found[segment.number].memory[70] == segment.number
        found[segment.number].memory[70] = 1
        assert segment.memory[70] == 1


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, PREAMBLE_BYTES, 4096, 2**20])
def test_the_size_cannot_change(size: int) -> None:
    """Neither smaller nor larger, so that no access can fail; nor can the seals be changed."""
    segment = Segment.create(0, 500)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.descriptor, size)
    assert os.fstat(segment.descriptor).st_size == segment.size_bytes == PREAMBLE_BYTES + 500


def test_a_new_segment_is_empty_and_private() -> None:
    """It has zeros, no header, and a descriptor that ends with the next program."""
    segment = Segment.create(4, 500)
    assert bytes(segment.memory) == bytes(PREAMBLE_BYTES + 500)
    assert (segment.number, segment.header()) == (4, None)
    assert not os.get_inheritable(segment.descriptor)


def test_memory_is_freed_with_the_last_reference() -> None:
    """An image keeps its memory readable without its segment; afterwards no descriptor and no mapping is left."""
    before = open_descriptors(), mappings()
    segment, image = shared_image()
    opened = open_image(segment, {}).image
    digest = image.seal().total
    del segment
    assert mappings() == before[1] + 1
    assert opened.verify().total == digest
    content = opened.buffers["a"]
    del opened
    assert (bytes(content), mappings()) == (bytes(range(24)), before[1] + 1)
    del content
    assert (open_descriptors(), mappings()) == before


def test_without_memory_nothing_is_left_open() -> None:
    """The system's refusal is a MemoryError; the descriptor is closed."""
    before = open_descriptors()
    with limited(resource.RLIMIT_FSIZE, 2**20), pytest.raises(MemoryError, match="no shared memory"):
        Segment.create(0, 2**21)
    assert open_descriptors() == before


def test_without_descriptors_there_is_no_memory() -> None:
    """A process at its limit of descriptors gets the same error as one without memory."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free), pytest.raises(MemoryError):
        Segment.create(0, 100)


def test_a_copy_of_the_tensors_is_not_made() -> None:
    """An opened image shows what is written to the segment, and the other way round."""
    segment, _ = shared_image()
    image = open_image(segment, {}).image
    segment.memory[PREAMBLE_BYTES] = 99
    assert image.buffers["a"][0] == 99
    image.buffers["b"][0] = 55
    assert segment.memory[PREAMBLE_BYTES + ALIGNMENT_BYTES] == 55


# -- places ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 9), max_size=3)), max_size=8))
def test_tensors_are_aligned_and_do_not_overlap(layouts: list[tuple[str, list[int]]]) -> None:
    """They follow each other in order, each at a multiple of the alignment, within the computed size."""
    specs = [TensorSpec(str(index), dtype, tuple(shape)) for index, (dtype, shape) in enumerate(layouts)]
    end = 0
    for spec, offset in placed(specs):
        assert end <= offset < end + ALIGNMENT_BYTES
        assert offset % ALIGNMENT_BYTES == 0
        end = offset + spec.size_bytes
    assert len(list(placed(specs))) == len(specs)
    assert end <= placed_bytes(specs) < end + ALIGNMENT_BYTES
    assert PREAMBLE_BYTES % ALIGNMENT_BYTES == 0
    assert [padded(size) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]


def test_an_image_in_two_segments() -> None:
    """It is opened with both, keeps the order of names and the time of its capture, and fails without the second."""
    image = new_image()
    image.seal()
    a, b, c = image.specs
    first, second = Segment.create(3, 2000), Segment.create(8, 100)
    first.memory[PREAMBLE_BYTES] = 1  # b
    second.memory[PREAMBLE_BYTES : PREAMBLE_BYTES + 24] = bytes(range(24))
    first.write_header(64, image_header(image, [(3, [b, c]), (8, [a])], at_ns=123))
    opened = open_image(first, {8: second})
    assert (opened.image.specs, opened.image.segment, opened.at_ns) == (image.specs, 3, 123)
    assert opened.places == ((first, (b, c)), (second, (a,)))
    assert opened.image.verify() == image.seal()
    for others in ({}, {7: second}):
        with pytest.raises(ImageDamagedError, match="header"):
            open_image(first, others)


# -- headers -----------------------------------------------------------------------------------------------------------


def test_a_cleared_header_is_none() -> None:
    """As is one of a segment that never had an image."""
    segment, _ = shared_image()
    segment.clear()
    for each in (segment, Segment.create(0, 1000)):
        with pytest.raises(ImageDamagedError, match="header"):
            open_image(each, {})


def test_a_header_without_room_is_not_written() -> None:
    """Not even in part; one that just fits is."""
    segment = Segment.create(0, 1000)
    before = bytes(segment.memory)
    assert not segment.write_header(900, b"x" * 101)
    assert (bytes(segment.memory), segment.header()) == (before, None)
    assert segment.write_header(900, b"x" * 100)
    assert segment.header() == b"x" * 100


def test_a_torn_header_is_none() -> None:
    """A header of which only a part was written over an older one, however long the part."""
    segment, image = shared_image()
    start = PREAMBLE_BYTES + placed_bytes(image.specs)
    size = len(segment.header() or b"")
    newer = image_header(StateImage(Position(8, 2), image.specs, image.buffers, image.values), [(0, image.specs)])
    older = bytes(segment.memory[start : start + size])
    assert newer[:9] == older[:9]
    for part in range(1, size + 1):
        segment.memory[start : start + size] = older
        torn = (newer + b" " * size)[:part]
        segment.memory[start : start + part] = torn
        if torn != older[:part]:
            with pytest.raises(ImageDamagedError, match="header"):
                open_image(segment, {})
        else:
            assert open_image(segment, {}).image.verify() == image.seal()


@pytest.mark.parametrize("seed", range(300))
def test_changed_bytes_of_preamble_and_header_are_found(seed: int) -> None:
    """One to four bytes, anywhere in the two."""
    segment, image = shared_image()
    start = PREAMBLE_BYTES + placed_bytes(image.specs)
    places = [*range(DIGEST_BYTES), *range(start, start + len(segment.header() or b""))]
    chosen = random.Random(seed)
    for place in chosen.sample(places, chosen.randint(1, 4)):
        segment.memory[place] ^= chosen.randrange(1, 256)
    with pytest.raises(ImageDamagedError, match="header"):
        open_image(segment, {})


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_no_image(seed: int) -> None:
    """A segment full of them has no header, whatever its preamble seems to say."""
    segment = Segment.create(0, 500)
    segment.memory[:] = random.Random(seed).randbytes(segment.size_bytes)
    if seed % 2:  # an offset and a length that lie within the segment
        segment.memory[:16] = (100).to_bytes(8, "little") + (seed).to_bytes(8, "little")
    with pytest.raises(ImageDamagedError, match="header"):
        open_image(segment, {})


@pytest.mark.parametrize("size", [1, 16, 31, 32, 63, 64, 65, 100, 150, 300, 500])
def test_a_cut_segment_has_no_image(size: int) -> None:
    """A file that holds only the first bytes of one, however few."""
    segment, _ = shared_image()
    assert size < PREAMBLE_BYTES + 2 * ALIGNMENT_BYTES + len(segment.header() or b"")
    cut = os.memfd_create("cut")
    os.write(cut, segment.memory[:size])
    with pytest.raises(ImageDamagedError, match="header"):
        open_image(Segment(0, cut), {})


def changed(**fields: object) -> bytes:
    """A header with other values of some fields."""
    segment, _ = shared_image()
    return json.dumps(described(segment) | fields).encode()


FOREIGN: dict[str, Callable[[], bytes]] = {
    "no JSON": lambda: b"tolaria",
    "no UTF-8": lambda: b'{"at_ns":"\xff\xfe"}',
    "a list": lambda: b"[]",
    "null": lambda: b"null",
    "a number": lambda: b"5",
    "a text": lambda: b'"at_ns"',
    "no fields": lambda: b"{}",
    "nested too deeply": lambda: b"[" * 100_000,
    "values are a number": lambda: changed(values=5),
    "values are null": lambda: changed(values=None),
    "values are half a character": lambda: changed(values="\ud800"),
    "no time": lambda: changed(at_ns="yesterday"),
    "endless time": lambda: changed(at_ns=float("inf")),
    "position of one number": lambda: changed(position=[1]),
    "position of three": lambda: changed(position=[1, 2, 3]),
    "position is null": lambda: changed(position=None),
    "places are null": lambda: changed(places=None),
    "a place without specs": lambda: changed(places=[[0]]),
    "a missing segment": lambda: changed(places=[[99, []]]),
    "a segment that is a list": lambda: changed(places=[[[], []]]),
    "an unknown dtype": lambda: changed(places=[[0, [["a", "F99", [1]]]]]),
    "a tensor too large": lambda: changed(places=[[0, [["a", "F32", [10**6]]]]]),
    "a tensor far too large": lambda: changed(places=[[0, [["a", "F32", [10**30]]]]]),
    "a shape with halves": lambda: changed(places=[[0, [["a", "F32", [1.5]]]]]),
    "a shape of texts": lambda: changed(places=[[0, [["a", "F32", ["1"]]]]]),
    "an endless shape": lambda: changed(places=[[0, [["a", "F32", [float("inf")]]]]]),
    "names of two types": lambda: changed(places=[[0, [["a", "F32", [1]], [5, "F32", [1]]]]]),
    "digests of one part": lambda: changed(digests=[[]]),
    "digests are a text": lambda: changed(digests="abc"),
    "digests are a number": lambda: changed(digests=5),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_header_is_damage(foreign: str) -> None:
    """Bytes with a correct digest that describe no image raise the same error as damaged ones."""
    segment = with_header(FOREIGN[foreign]())
    with pytest.raises(ImageDamagedError, match="header"):
        open_image(segment, {})


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_changed_tensor_is_found_by_verification(name: str) -> None:
    """The digests of the header are those of the capture."""
    segment, _ = shared_image()
    image = open_image(segment, {}).image
    image.verify()
    segment.memory[PREAMBLE_BYTES + (0 if name == "a" else ALIGNMENT_BYTES)] ^= 1
    with pytest.raises(ImageDamagedError, match=f"^{name}:"):
        open_image(segment, {}).image.verify()


def lists_and_objects(children: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """What JSON nests."""
    return st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)


JSON_VALUES = st.recursive(
    st.text(max_size=20) | st.text('"\\\n\x7f', max_size=20) | st.integers() | st.booleans(),
    lists_and_objects,
    max_leaves=10,
)
NAMES = st.text(max_size=20) | st.text('"\\\x00\x7f\u20ac\U0001f600', max_size=20)
SHAPES = st.lists(st.integers(0, 2**63 - 1), max_size=6)
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(sorted(DTYPE_BYTES)), SHAPES.map(tuple)),
    max_size=12,
    unique_by=lambda spec: spec.name,
)


def fits(specs: Sequence[TensorSpec], values: bytes, places: Sequence[tuple[int, Sequence[TensorSpec]]]) -> bool:
    """Whether the header of a sealed image with these specs takes the reserved room at most."""
    image = StateImage(Position(2**62, 2**62), tuple(specs), {}, values)
    image.sealed = StateImage(image.position, (), {}, values).seal()
    digests = {spec.name: "f" * 32 for spec in specs}
    image.sealed = type(image.sealed)(digests, image.sealed.values, image.sealed.total)
    return len(image_header(image, places, at_ns=2**63)) <= header_bytes(specs, values)


@given(SPECS, JSON_VALUES)
def test_the_reserved_room_is_enough(specs: list[TensorSpec], value: object) -> None:
    """For odd names, long shapes, many kinds of values, and tensors that lie together or in segments of their own."""
    values = canonical_json(value)
    assert fits(specs, values, [(10**6, specs)])
    together, alone = specs[:4], [spec for spec in specs[4:] if spec.shape]
    assert fits([*together, *alone], values, [(10**6, together), *((10**6, [spec]) for spec in alone)])


@pytest.mark.parametrize("value", ['"' * 10_000, "\\" * 10_000, "\x00" * 1000, "\U0001f600" * 1000, ['\\"'] * 3000])
def test_the_reserved_room_is_enough_for_values_full_of_escapes(value: object) -> None:
    """Each escaped character takes one more byte for each of its quotes and backslashes."""
    assert fits([], canonical_json(value), [(1, [])])


def test_the_reserved_room_is_enough_for_many_tensors() -> None:
    """Thousands of short names leave nothing of the constant part for each."""
    specs = [TensorSpec(f"{index}", "F8_E4M3", (10**18,)) for index in range(5000)]
    assert fits(specs, b"{}", [(10**6, specs)])
    assert fits(specs, b"{}", [(10**6, [spec]) for spec in specs])


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), JSON_VALUES)
def test_odd_names_and_values_survive(names: list[str], value: object) -> None:
    """A shared image is opened with the same specs, values and fingerprint."""
    specs = tuple(TensorSpec(name, "U8", (3,)) for name in sorted(names))
    buffers = {spec.name: memoryview(bytearray([index, 1, 2])) for index, spec in enumerate(specs)}
    image = StateImage(Position(1, 1), specs, buffers, canonical_json(value))
    image.seal()
    opened = open_image(share(image), {}).image
    assert (opened.specs, opened.values, opened.position) == (specs, image.values, image.position)
    assert opened.verify() == image.seal()


def test_sharing_reports_missing_memory() -> None:
    """The image stays as it is, and nothing is left open."""
    before, image = open_descriptors(), new_image(canonical_json("x" * 2**21))
    with limited(resource.RLIMIT_FSIZE, 2**20), pytest.raises(MemoryError):
        share(image)
    assert open_descriptors() == before
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
