"""Segments: anonymous shared memory that outlives the process which filled it, and images that lie in them.

A segment has no name: it is a descriptor (`memfd_create`), which the service holds and passes to each process of the
lane. Its size cannot change, so that no access raises SIGBUS. It begins with a preamble of 64 bytes, followed by packed
tensors, each aligned to 64 bytes, and by the *header* of an image: JSON that says which tensors lie in which segments,
the image's digests and its other values. The preamble says where the header is, and its digest; it is written last and
cleared before the tensors are overwritten, so that an image that was not finished is not taken for one.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import mmap
import os
import resource
import struct
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from tolaria.errors import ImageDamagedError, WireError
from tolaria.images import Fingerprint, StateImage, TensorSpec
from tolaria.values.training import Position
from tolaria.wire import DESCRIPTORS_MAX, Frame, FrameKind

ALIGNMENT_BYTES: Final = 64
"""A cache line, and a multiple of every element size."""

PREAMBLE_BYTES: Final = 64
_DESCRIPTORS: Final = 2**16
_COPY_BYTES: Final = 2**22
_PREAMBLE: Final = struct.Struct("<QQ16s")  # offset of the header, its length, its digest
_EMPTY: Final = bytes(_PREAMBLE.size)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def allow_descriptors() -> int:
    """Raises the limit of open descriptors as far as the system lets this process; returns how many segments fit.

    Each large tensor that is not trained has a segment, which costs a descriptor here, two in a group, and one in the
    service.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted) // 3  # the service maps those of an image while it is being written


class Segment:
    """One piece of shared memory, mapped here. It is freed with the last process that maps it or holds a descriptor.

    Attributes:
        number: identifies it on both sides.
        memory: its content, from the preamble on; writable.
    """

    def __init__(self, number: int, descriptor: int) -> None:
        """Maps a segment and takes over its descriptor. Raises OSError, and ValueError for an empty file."""
        self.number, self.descriptor = number, descriptor
        self.size_bytes = os.fstat(descriptor).st_size
        self.memory = mmap.mmap(descriptor, self.size_bytes)

    @classmethod
    def create(cls, number: int, size_bytes: int) -> Segment:
        """Returns a new segment with room for `size_bytes` after the preamble. Raises MemoryError without room."""
        try:
            descriptor = os.memfd_create("tolaria", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise MemoryError(f"no shared memory: {error}") from error
        try:
            os.posix_fallocate(descriptor, 0, PREAMBLE_BYTES + size_bytes)  # or else a write might raise SIGBUS later
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(number, descriptor)
        except OSError as error:
            os.close(descriptor)
            raise MemoryError(f"no shared memory: {error}") from error

    def __del__(self) -> None:
        """Closes the descriptor. The memory stays mapped for as long as anything here refers to it."""
        if hasattr(self, "memory"):
            self.close_descriptor()

    def close_descriptor(self) -> None:
        """Closes the descriptor, which is needed only to pass the segment on; the mapping has one too."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def clear(self) -> None:
        """Marks the segment as one without a header."""
        self.memory[: _PREAMBLE.size] = _EMPTY

    def write_header(self, offset: int, header: bytes) -> bool:
        """Writes an image's header `offset` bytes after the preamble; returns whether there is room for it."""
        start = PREAMBLE_BYTES + offset
        if start + len(header) > self.size_bytes:
            return False
        self.memory[start : start + len(header)] = header
        digest = xxhash.xxh3_128_digest(header)
        self.memory[: _PREAMBLE.size] = _PREAMBLE.pack(start, len(header), digest)
        return True

    def header(self) -> bytes | None:
        """Returns the header of the image that begins here; None if there is none, or it was not finished."""
        if self.size_bytes < PREAMBLE_BYTES:
            return None
        start, length, digest = _PREAMBLE.unpack_from(self.memory)
        if not length or start + length > self.size_bytes:
            return None
        header = bytes(self.memory[start : start + length])
        return header if xxhash.xxh3_128_digest(header) == digest else None


def placed(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, int]]:
    """Yields each spec with its offset, in bytes, in memory where the tensors follow each other."""
    offsets = itertools.accumulate((padded(spec.size_bytes) for spec in specs), initial=0)
    return zip(specs, offsets, strict=False)


def placed_bytes(specs: Sequence[TensorSpec]) -> int:
    """Returns the bytes of tensors that follow each other, alignment included."""
    return sum(padded(spec.size_bytes) for spec in specs)


def padded(size_bytes: int) -> int:
    """Returns the size with the padding that follows it."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def places_of(first: Segment) -> list[int]:
    """Returns the numbers of the segments in which the image lies that begins there. Raises ImageDamagedError."""
    try:
        return [number for number, _ in json.loads(first.header() or b"")["places"]]
    except (LookupError, ValueError, TypeError) as error:
        raise ImageDamagedError("header") from error


def image_header(image: StateImage, places: Sequence[tuple[int, Sequence[TensorSpec]]], at_ns: int = 0) -> bytes:
    """Returns the header of an image whose tensors lie in these segments, each by its number and specs.

    It records the digests if the image is sealed. `at_ns` is its capture in Unix nanoseconds.
    """
    sealed = image.sealed
    description = {
        "at_ns": at_ns,
        "position": [image.position.global_step, image.position.epoch],
        "places": [[number, [[s.name, s.dtype, s.shape] for s in specs]] for number, specs in places],
        "digests": None if sealed is None else [[*sealed.tensors.items()], sealed.values, sealed.total],
        "values": image.values.decode(),
    }
    return json.dumps(description, separators=(",", ":")).encode()


def header_bytes(specs: Sequence[TensorSpec], values: bytes) -> int:
    """Returns an upper bound of the size of an image's header."""
    names = sum(2 * len(json.dumps(spec.name)) + 22 * len(spec.shape) + 64 for spec in specs)
    escapes = values.count(b'"') + values.count(b"\\")
    return padded(len(values) + escapes + names + 512)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image in segments, the tensors that lie in each, and its capture in Unix nanoseconds."""

    image: StateImage
    places: tuple[tuple[Segment, tuple[TensorSpec, ...]], ...]
    at_ns: int


def open_image(first: Segment, others: Mapping[int, Segment]) -> OpenedImage:
    """Returns the image that begins in a segment, without a copy of its tensors.

    Its digests are as recorded; `StateImage.verify` proves them. `first` may be among `others`, and has number 0 where
    it is the only one.

    Raises:
        ImageDamagedError: no finished image begins there, or one of its segments is missing.
    """
    header = first.header()
    if header is None:
        raise ImageDamagedError("header")
    try:
        return _opened(json.loads(header), first, ChainMap({first.number: first}, others))  # type: ignore[arg-type]
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise ImageDamagedError("header") from error


def share(image: StateImage) -> Segment:
    """Copies an image into one new segment, numbered 0. Raises MemoryError if there is no room."""
    size_bytes, image_values = placed_bytes(image.specs), image.values
    segment = Segment.create(0, size_bytes + header_bytes(image.specs, image_values))
    content = memoryview(segment.memory)[PREAMBLE_BYTES:]
    for spec, offset in placed(image.specs):
        for start in range(0, spec.size_bytes, _COPY_BYTES):  # each copy holds the GIL
            stop = min(start + _COPY_BYTES, spec.size_bytes)
            content[offset + start : offset + stop] = image.buffers[spec.name][start:stop]
    if not segment.write_header(size_bytes, image_header(image, [(0, image.specs)])):
        raise MemoryError("the image's header is larger than the room reserved for it")
    return segment


def _opened(description: Mapping[str, Any], first: Segment, segments: Mapping[int, Segment]) -> OpenedImage:
    places, buffers = [], dict[str, memoryview]()
    for number, listed in description["places"]:
        segment, specs = segments[number], tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in listed)
        content = memoryview(segment.memory)[PREAMBLE_BYTES:]
        for spec, offset in placed(specs):
            if offset + spec.size_bytes > len(content):
                raise ValueError(f"{spec.name} is larger than its segment")
            buffers[spec.name] = content[offset : offset + spec.size_bytes]
        places.append((segment, specs))
    sealed = None
    if (digests := description["digests"]) is not None:
        sealed = Fingerprint(dict(digests[0]), digests[1], digests[2])
    ordered = tuple(sorted((spec for _, specs in places for spec in specs), key=lambda spec: spec.name))
    if sealed is not None and sealed.tensors.keys() != {spec.name for spec in ordered}:
        raise ValueError("the digests are not those of the tensors")
    position, values = Position(*description["position"]), description["values"].encode()
    image = StateImage(position, ordered, buffers, values, sealed, segment=first.number)
    return OpenedImage(image, tuple(places), int(description["at_ns"]))


def segments_frames(descriptors: Sequence[tuple[int, int]], owner: object = None) -> Iterator[Frame]:
    """Yields frames with segments, given as pairs of number and descriptor, which stay this process's own too."""
    for start in range(0, len(descriptors), DESCRIPTORS_MAX):
        part = descriptors[start : start + DESCRIPTORS_MAX]
        numbers = json.dumps([number for number, _ in part]).encode()
        yield Frame(FrameKind.SEGMENTS, numbers, tuple(descriptor for _, descriptor in part), owner=owner)


def numbers_frame(kind: FrameKind, numbers: Sequence[int]) -> Frame:
    """Returns a frame with numbers of segments."""
    return Frame(kind, json.dumps(numbers).encode())


def numbers_of(frame: Frame, lowest: int = 1) -> list[int]:
    """Returns the numbers of the segments in a frame. Raises WireError if there are none, or other values."""
    numbers = json.loads(frame.content)
    if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= lowest for number in numbers):
        raise WireError(f"a {frame.kind.name.lower()} frame holds no numbers of segments")
    return numbers


def segments_of(frame: Frame) -> dict[int, Segment]:
    """Returns the segments of a frame by number, mapped here; their descriptors are open."""
    return {number: Segment(number, fd) for number, fd in zip(numbers_of(frame), frame.descriptors, strict=True)}


def mapped(frame: Frame) -> dict[int, Segment]:
    """Returns the segments of a frame by number that can be mapped here; their descriptors are closed.

    Number 0 is that of one that holds a whole image.
    """
    found = dict[int, Segment]()
    for number, descriptor in zip(numbers_of(frame, 0), frame.descriptors, strict=True):
        try:
            found[number] = Segment(number, descriptor)
        except (OSError, ValueError):
            os.close(descriptor)
        else:
            found[number].close_descriptor()  # its sender holds it
    return found
