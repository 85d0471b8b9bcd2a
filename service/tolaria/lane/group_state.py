"""`GroupRestore`: how all ranks of a group restore the same image, or none of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from tolaria.errors import (
    ImageDamagedError,
    OptimizationError,
    PeerLostError,
    RestoreAbandonedError,
    RollbackError,
    SeedError,
)
from tolaria.images import StateImage
from tolaria.lane.messages import Restored
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.ranks.group import Group
from tolaria.ranks.images import receive_image, send_image
from tolaria.segments import open_image

_IMAGE: Final = b"I"
_SHOWN: Final = b"S"
_NO_IMAGE: Final = b"N"


class GroupRestore:
    """Restores on all ranks: they get the leader's image, and each rank refuses it if another one does.

    They map one that lies in its memory where all are on one machine; else the leader sends it.

    In an operation of all ranks, `begin` comes first; then the leader restores, and the others `follow`.
    """

    def __init__(self, group: Group, snapshots: SnapshotManager) -> None:
        self._group = group
        self._snapshots = snapshots
        self._sent = self._voted = self._shown = False
        snapshots.prove = self._proven
        snapshots.restore_staged = self._agreed
        snapshots.restore_failed = self._vote_against
        if group.leads:
            snapshots.before_restore = self._send

    def begin(self) -> None:
        """Starts the next restore."""
        self._sent = self._voted = False

    def follow(self) -> Restored:
        """Restores what the leader restores. Raises as `SnapshotManager.restore_image` does."""
        if (image := self._received()) is None:
            raise RestoreAbandonedError("before it began")
        return self._restore(image)

    def give_up(self) -> None:
        """Has the other ranks abandon the restore too, after an error on this one."""
        if self._group.leads and not self._sent:
            self._group.broadcast_bytes(_NO_IMAGE)

    def start(self, restore: Callable[[], object]) -> None:
        """Runs `restore` on the leader, which may restore any number of images; the others restore each of them, too.

        Raises what it raises, on the leader only.
        """
        if not self._group.leads:
            while (image := self._received()) is not None:
                with suppress(RollbackError, SeedError, OptimizationError):  # the leader's restore fails, too
                    self._restore(image)
            return
        try:
            restore()
        finally:
            self._group.broadcast_bytes(_NO_IMAGE)

    def _received(self) -> StateImage | None:
        """Returns the image that the leader restores; None if it restores none."""
        image = None
        while image is None:
            if (said := self._group.broadcast_bytes()) == _NO_IMAGE:
                return None
            self._shown = said == _SHOWN
            image = self._mapped() if self._shown else receive_image(self._group, self._snapshots.state)
        self._sent, self._voted = True, False
        return image

    def _mapped(self) -> StateImage | None:
        """Returns the image in the leader's memory; None if a rank cannot map it."""
        if (segments := self._group.segments) is None:
            raise PeerLostError("the leader shares its memory, to which this rank is not connected")
        number, image = int(segments.receive()), None
        with suppress(KeyError, ImageDamagedError):
            image = open_image(segments.held[number], segments.held).image
        segments.release()
        return image if self._group.all(image is not None) else None

    def _restore(self, image: StateImage) -> Restored:
        return self._snapshots.restore_image(image, lambda: self._refused_anywhere(refused=False))

    def _send(self, image: StateImage, refused: Callable[[], bool] | None) -> Callable[[], bool]:
        """Gives all ranks the image that is about to be restored; returns what decides whether it is."""
        self._shown = self._all_mapped(image)
        if not self._shown:
            self._group.broadcast_bytes(_IMAGE)
            send_image(self._group, image)
        self._sent, self._voted = True, False
        return lambda: self._refused_anywhere(refused is not None and refused())

    def _all_mapped(self, image: StateImage) -> bool:
        """Has the other ranks map an image; returns False if one cannot."""
        segments, memory = self._group.segments, self._snapshots.memory
        if segments is None or memory is None or not (place := memory.place_of(image)):
            return False
        self._group.broadcast_bytes(_SHOWN)
        segments.send(str(image.segment).encode(), place)
        segments.release()
        return self._group.all(value=True)

    def _proven(self, image: StateImage, parts: Collection[str]) -> str:
        """Returns the digest of the restored state: the image's, if every rank has proven its parts."""
        state, expected = self._snapshots.state, image.seal().total
        if not self._shown:
            return state.fingerprint(only=parts).total
        found = ""
        try:
            found = state.proof(image, parts).total
        finally:  # also if the state cannot be listed: the others wait
            of_ranks = self._group.all_gather_text(found)
        return next((each for each in of_ranks if each != expected), expected)

    def _agreed(self) -> bool:
        """Whether all ranks can begin: a change of seeds is an operation of all of them, which none must miss."""
        if not self._sent:
            return True
        if not self._group.all(value=True):
            self._voted = True  # the others know
        return not self._voted

    def _refused_anywhere(self, refused: bool) -> bool:
        self._voted = True
        return not self._group.all(not refused)

    def _vote_against(self) -> None:
        if self._sent and not self._voted:
            self._voted = True
            self._group.all(value=False)
