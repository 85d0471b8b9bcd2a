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

_FILL, _GATHER, _GIVE_UP, _DONE, _FORGET = b"F", b"G", b"R", b"D", b"X"
"""What the ranks do next: copy their parts, send them, give up memory, nothing more, nor keep anything mapped."""


class Gathering:
    """One rank's side of captures: the leader fills its images, and the others take part until it is done.

    Where the leader shows its segments (`Group.segments`), each rank copies its parts to where they belong in them;
    else the leader gathers one tensor after the other.

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
        return self.group.broadcast_bytes(_FILL if due else _DONE) == _FILL

    def done(self, *, forget: bool = False) -> None:
        """Ends a capture for the ranks that take part, and if its memory is not used again, their part in that."""
        self.group.broadcast_bytes(_FORGET if forget else _DONE)
        if forget:
            self._forget()

    def take_part(self) -> None:
        """Takes part in one capture of the leader's. Raises PeerLostError."""
        segments = self.group.segments
        while (said := self.group.broadcast_bytes()) not in {_DONE, _FORGET}:
            if said == _GATHER or segments is None:
                self._state.gather()
            else:
                self.group.first_text(self._copied(segments.hear(), segments.held))
        if said == _FORGET:
            self._forget()

    def _fill(self, sharded: Mapping[str, tuple[Tensor, Tensor]], arena: Arena) -> None:
        """Copies as a `FillSharded`."""
        segments, segment = self.group.segments, arena.segment
        if segments is None or segment is None:
            self.group.broadcast_bytes(_GATHER)
            gather_whole(sharded, arena)
            return
        self.group.broadcast_bytes(_FILL)
        offsets = {spec.name: offset for spec, offset in placed(arena.specs) if spec.name in sharded}
        segments.say(json.dumps([segment.number, offsets]).encode(), [segment])
        with torch.no_grad():
            for tensor, target in sharded.values():
                part_of(target, tensor).copy_(local(tensor))
        if problem := self.group.first_text(""):
            raise MemoryError(problem)

    def _copied(self, said: bytes, held: Mapping[int, Segment]) -> str:
        """Copies this rank's parts to where the leader says; returns why it cannot."""
        if not said:
            return ""
        number, offsets = json.loads(said)
        if number not in held:
            return f"rank {self.group.rank} has no room to map the leader's memory"
        self._copy_to(held[number], offsets)
        return ""

    def _copy_to(self, segment: Segment, offsets: Mapping[str, int]) -> None:
        tensors = self._state.survey().tensors
        content = self._content_of(segment, pinned=any(tensors[name].is_cuda for name in offsets))
        with torch.no_grad():
            for name, offset in offsets.items():
                tensor = tensors[name]
                whole = (
                    content[offset : offset + tensor.numel() * tensor.element_size()]
                    .view(tensor.dtype)
                    .view(tensor.shape)
                )
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
        """Has the others unmap segments that are gone, so that their memory is free for the next ones."""
        if self.group.segments is not None and self.group.segments.some_gone:
            self.group.broadcast_bytes(_GIVE_UP)
            self.group.segments.say(b"")
            self.group.first_text("")

    def _forget(self) -> None:
        if self.group.segments is not None:
            self.group.segments.forget()
