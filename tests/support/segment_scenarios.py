"""What `run_on_ranks` runs: captures and restores in memory that the leader shows to the other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.tensor

from support.rank_scenarios import connect_segments
from tolaria.config import Settings
from tolaria.errors import RollbackError
from tolaria.lane.build import BuiltLane, build
from tolaria.lane.group_state import GroupRestore
from tolaria.lane.hosting import build_on_all_ranks
from tolaria.lane.step import train_step
from tolaria.ranks.group import Group
from tolaria.segments import Segment, mapped, open_image, share
from tolaria.shards import local
from tolaria.state.restore import StagedRestore
from tolaria.state.shared_memory import SharedMemory
from tolaria.state.snapshots import SnapshotRing


class Ranks:
    """One rank of a group that has trained a few steps, and does what the scenarios below say."""

    def __init__(
        self, group: Group, parallel: str = "fsdp", *, shows: bool = True, job: str = "UnevenJob", **options: object
    ) -> None:
        torch.set_num_threads(1)
        given = {"job": f"support.rank_jobs:{job}", "device": "cpu", "threads": 1, "options": options}
        lane, ring = {"mode": "torchrun", "parallel": parallel}, {"memory_mb": 8192, "snapshots_max": 2}
        settings = Settings.model_validate({"training": given, "lane": lane, "rollback": ring})
        self.group = group
        self.memory = SharedMemory(shows=True) if group.leads and shows else None
        connect_segments(group, shows=shows)
        make = lambda: build(settings, self.memory, group)  # noqa: E731
        self.built: BuiltLane = build_on_all_ranks(group, make, sharded=parallel == "fsdp")
        self.snapshots = self.built.snapshots
        self.restoring = GroupRestore(group, self.snapshots)
        self.given: Segment | None = None
        """A copy of the image that was captured last, as the service gives one to the leader."""
        self.train(3)

    def train(self, steps: int) -> None:
        """Trains a number of steps."""
        last = self.built.module.global_step + steps
        while self.built.module.global_step < last:
            self.built.module.begin_epoch()
            if train_step(self.built.module, lambda: True) is None:
                self.built.module.progress = self.built.module.progress.ended()

    def capture(self, *, beside: bool = False) -> str:
        """Captures the state on the leader; returns the digest of the image, or why there is none."""
        if not self.group.leads:
            self.snapshots.take_part()
            return ""
        try:
            with self.snapshots.capture_image(beside=beside) as image:
                self.given = share(image)
                if self.memory is not None:
                    self.memory.take_fresh()  # as the connection to the service does
                return image.seal().total
        except RollbackError as error:
            return str(error)

    def restore(self, step: int, given: Segment | None = None) -> list[str]:
        """Restores the snapshot of a step, or the leader's `given` image, on all ranks.

        Returns both digests, or what was raised on this one.
        """
        self.restoring.begin()
        try:
            if not self.group.leads:
                found = self.restoring.follow()
            elif given is None:
                found = self.snapshots.restore_snapshot(step, lambda: False)
            else:
                opened = open_image(given, {})
                image = opened.image if self.memory is None else self.memory.keep_with(opened)
                found = self.snapshots.restore_image(image, lambda: False)
        except RollbackError as error:
            return [type(error).__name__]
        return [found.state_digest, found.expected_digest]

    def digest(self) -> str:
        """The digest of the whole state without random numbers, which each rank has."""
        tensors = self.snapshots.state.fingerprint().tensors
        return str(sorted((name, each) for name, each in tensors.items() if not name.startswith("rng/")))

    @property
    def held(self) -> list[int]:
        """Numbers of the segments that are mapped here, though they are the leader's."""
        return [] if self.group.segments is None else sorted(self.group.segments.held)


def go_back(group: Group, *, parallel: str, shows: bool, full: bool = False) -> dict[str, Any]:
    """Captures, trains on, and restores, in full an image of the service's; says what was gathered and sent."""
    ranks = Ranks(group, parallel, shows=shows)
    before = ranks.digest()
    with counted() as calls:
        captured = ranks.capture()
        ranks.train(2)
        changed = ranks.digest() if not shows else ""
        found = ranks.restore(3, ranks.given if full else None)
    return {
        "captured": captured,
        "restored": found,
        "same": ranks.digest() == before != changed,
        "calls": calls,
        "held": ranks.held,
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts how often a tensor is gathered, and how often an image's memory is sent."""
    calls = {"gathered": 0, "sent": 0}
    gather, send = torch.distributed.tensor.DTensor.full_tensor, Group.broadcast_buffer

    def count_gather(*arguments: Any, **options: Any) -> Any:
        calls["gathered"] += 1
        return gather(*arguments, **options)

    def count_send(group: Group, content: memoryview) -> None:
        calls["sent"] += 1
        send(group, content)

    with (
        patch.object(torch.distributed.tensor.DTensor, "full_tensor", count_gather),
        patch.object(Group, "broadcast_buffer", count_send),
    ):
        yield calls


def without_room(group: Group) -> dict[str, Any]:
    """The last rank cannot map the leader's memory: what is captured and restored nevertheless."""
    ranks = Ranks(group)
    before = ranks.digest()
    blind = group.rank == group.world - 1
    with patch("tolaria.ranks.shared_segments.mapped", (lambda _: {}) if blind else mapped), counted() as calls:
        captured = ranks.capture()
        ranks.train(2)
        restored = ranks.restore(3)
    return {"captured": captured, "restored": restored, "same": ranks.digest() == before, "calls": calls}


def held_memory(group: Group) -> list[list[int]]:
    """What is mapped after a capture, after others whose memory the ring has given up, and after one beside it."""
    ranks = Ranks(group)
    found = list[list[int]]()
    for beside in (False, False, True):
        if group.leads:
            ranks.snapshots.forget_snapshots()
        ranks.train(1)
        ranks.capture(beside=beside)
        found.append(ranks.held)
    return found


def held_after_growth(group: Group) -> list[list[int]]:
    """What is mapped after a capture, and after one that is refused, since the state has become too large."""
    ranks = Ranks(group)
    ranks.capture()
    before = ranks.held
    with patch.object(SnapshotRing, "_make_room", lambda ring, *_: ring._drop_all()):  # noqa: SLF001 - its lock is held
        group.snapshot_agreed, ranks.snapshots.takes_snapshots = True, group.leads
        ranks.snapshots.step_done(0.1)
    return [before, ranks.held]


def altered(group: Group, *, start: bool) -> list[Any]:
    """Whether the live state is proven to be the image: as restored, and after a change of one element on one rank.

    By a rollback, or as a group starts.
    """
    ranks, found = Ranks(group), list[Any]()
    digest = ranks.capture()
    commit = StagedRestore.commit
    for spoils in (False, True):

        def changed(staged: StagedRestore, *rest: Any, spoils: bool = spoils) -> None:
            commit(staged, *rest)
            if spoils and group.rank == 1:
                parameter = next(p for p in ranks.built.module.model.parameters() if local(p).numel())
                with torch.no_grad():
                    local(parameter).view(-1)[0] += 1.0

        with patch.object(StagedRestore, "commit", changed):
            if start:
                proven = list[bool]()
                ranks.restoring.start(lambda p=proven: p.append(ranks.snapshots.restore_digest(digest, ())))  # type: ignore[misc]
                found.append(proven)
            else:
                state, expected = ranks.restore(3)
                found.append(state == expected)
    return found


def timed(group: Group, *, shows: bool, width: int, rounds: int) -> dict[str, Any]:
    """Takes and restores snapshots of a wide model; returns the size in bytes, and the seconds of each."""
    ranks = Ranks(group, shows=shows, job="WideJob", width=width)
    taken, restored = list[float](), list[float]()
    for number in range(rounds + 2):  # the first two fill the ring, whose memory is used again
        ranks.train(1)
        group.all(value=True)
        started_s = time.monotonic()
        if group.leads:
            with ranks.snapshots.capture_image() as image:
                size_bytes = image.size_bytes
        else:
            ranks.snapshots.take_part()
            size_bytes = 0
        group.all(value=True)
        taken.append(time.monotonic() - started_s)
        started_s = time.monotonic()
        state, expected = ranks.restore(ranks.built.module.global_step)
        group.all(value=True)
        restored.append(time.monotonic() - started_s)
        assert state == expected, number
    return {"bytes": size_bytes, "taken": taken[2:], "restored": restored[2:]}
