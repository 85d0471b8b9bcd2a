"""`Gathering`: how the ranks' parts of sharded tensors come into the leader's images."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from tolaria.ranks.group import Group
from tolaria.segments import Segment, placed
from tolaria.shards import local, part_of
from tolaria.state.arenas import Arena
from tolaria.state.shared_memory import SharedMemory, content_of
from tolaria.state.training_state import TrainingState, gather_whole

_DUE = b"C"
_FILL, _GATHER, _GIVE_UP, _DONE, _RELEASE = b"F", b"G", b"U", b"D", b"R"
"""What the ranks do next: copy their parts, send them, unmap what is gone, nothing more, or unmap everything."""


class Gathering:
    """One rank's side of captures: the leader fills its images, and the others take part until it is done.

    Where all ranks can map the leader's segments (`Group.segments`), each copies its parts to where they belong in
    them; else the leader gathers one tensor after the other.

    Args:
        group: all ranks; an attribute, too.
        state: of this rank.
        memory: where the leader's images lie; None elsewhere.
    """

    def __init__(self, group: Group, state: TrainingState, memory: SharedMemory | None) -> None:
        self.group = group
        self._state = state
        self._contents: weakref.WeakKeyDictionary[Segment, Tensor] = weakref.WeakKeyDictionary()
        if group.leads:
            state.fill_sharded = self._fill
            if memory is not None:
                memory.before_allocation = self._give_up

    def agreed(self, due: bool) -> bool:
        """Returns whether a capture is due, as the leader says. Every rank has to call this."""
        return self.group.broadcast_bytes(_DUE if due else _DONE) == _DUE

    def done(self, *, release: bool = False) -> None:
        """Ends a capture for the ranks that take part; with `release` they unmap its memory, which is used once."""
        self._give_up()
        self.group.broadcast_bytes(_RELEASE if release else _DONE)
        if release:
            self._release()

    def take_part(self) -> None:
        """Takes part in one capture of the leader's. Raises PeerLostError."""
        segments = self.group.segments
        while (said := self.group.broadcast_bytes()) not in {_DONE, _RELEASE}:
            if said == _GATHER or segments is None:
                self._state.gather()
            else:
                self.group.all(self._copied(segments.receive(), segments.held))
        if said == _RELEASE:
            self._release()

    def _fill(self, sharded: Mapping[str, tuple[Tensor, Tensor]], arena: Arena) -> None:
        """Copies as a `FillSharded`."""
        if arena.segment is None or not self._filled_in_place(sharded, arena, arena.segment):
            self.group.broadcast_bytes(_GATHER)
            gather_whole(sharded, arena)

    def _filled_in_place(self, sharded: Mapping[str, tuple[Tensor, Tensor]], arena: Arena, segment: Segment) -> bool:
        """Has each rank copy its parts; returns False if one cannot."""
        if (segments := self.group.segments) is None:
            return False
        self.group.broadcast_bytes(_FILL)
        offsets = {spec.name: offset for spec, offset in placed(arena.specs) if spec.name in sharded}
        segments.send(json.dumps([segment.number, offsets]).encode(), [segment])
        with torch.no_grad():
            for tensor, target in sharded.values():
                part_of(target, tensor).copy_(local(tensor))
        return self.group.all(value=True)

    def _copied(self, said: bytes, held: Mapping[int, Segment]) -> bool:
        """Copies this rank's parts to where the leader says, if it says that; returns False if it is not mapped."""
        if not said:
            return True
        number, offsets = json.loads(said)
        if number not in held:
            return False
        self._copy_to(held[number], offsets)
        return True

    def _copy_to(self, segment: Segment, offsets: Mapping[str, int]) -> None:
        tensors = self._state.survey().tensors
        content = self._content_of(segment, pinned=any(tensors[name].is_cuda for name in offsets))
        with torch.no_grad():
            for name, offset in offsets.items():
                tensor = tensors[name]
                size_bytes = tensor.numel() * tensor.element_size()
                whole = content[offset : offset + size_bytes].view(tensor.dtype).view(tensor.shape)
                part_of(whole, tensor).copy_(local(tensor))

    def _content_of(self, segment: Segment, *, pinned: bool) -> Tensor:
        """Returns the memory of a segment, which is pinned once where that can be done."""
        if (content := self._contents.get(segment)) is None:
            try:
                content = content_of(segment, pinned=pinned)
            except MemoryError:  # copies are slower then
                content = content_of(segment, pinned=False)
            self._contents[segment] = content
        return content

    def _give_up(self) -> None:
        """Has the others unmap segments that are gone, so that their memory is free."""
        if self.group.segments is not None and self.group.segments.some_gone:
            self.group.broadcast_bytes(_GIVE_UP)
            self.group.segments.send(b"")
            self.group.all(value=True)

    def _release(self) -> None:
        if self.group.segments is not None:
            self.group.segments.release()
