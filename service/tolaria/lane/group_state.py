"""`GroupRestore`: how all ranks of a group restore the same image, or none of them."""

from __future__ import annotations

from collections.abc import Callable
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
    """Restores on all ranks: the leader shows or sends the image, and each rank refuses it if another one does.

    It shows those that lie in its memory to ranks on the same machine.

    In an operation of all ranks, `begin` comes first; then the leader restores, and the others `follow`.
    """

    def __init__(self, group: Group, snapshots: SnapshotManager) -> None:
        self._group = group
        self._snapshots = snapshots
        self._sent = self._voted = False
        snapshots.restore_staged = self._agreed
        snapshots.restore_failed = self._vote_against
        if group.leads:
            snapshots.before_restore = self._send

    def begin(self) -> None:
        """Starts the next restore."""
        self._sent = self._voted = False

    def follow(self) -> Restored:
        """Restores what the leader sends. Raises as `SnapshotManager.restore_image` does."""
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
            ended = False
            while not ended:
                with suppress(RollbackError, SeedError, OptimizationError):  # the leader's restore fails, too
                    image = self._received()
                    ended = image is None
                    if image is not None:
                        self._restore(image)
            return
        try:
            restore()
        finally:
            self._group.broadcast_bytes(_NO_IMAGE)

    def _received(self) -> StateImage | None:
        """Returns the image that the leader restores; None if it restores none.

        Raises ImageDamagedError if it cannot be mapped here; the others know then.
        """
        if (said := self._group.broadcast_bytes()) == _NO_IMAGE:
            return None
        self._snapshots.on_every_rank = said == _SHOWN
        if said == _SHOWN:
            return self._mapped()
        image = receive_image(self._group, self._snapshots.state)
        self._sent, self._voted = True, False
        return image

    def _mapped(self) -> StateImage:
        segments = self._group.segments
        if segments is None:
            raise PeerLostError("the leader shows memory to ranks on another machine")
        number = int(segments.hear())
        self._sent, self._voted = True, False
        try:
            return open_image(segments.held[number], segments.held).image
        except (KeyError, ImageDamagedError):
            self._vote_against()
            raise ImageDamagedError("the leader's memory, which cannot be mapped") from None
        finally:
            segments.forget()

    def _restore(self, image: StateImage) -> Restored:
        return self._snapshots.restore_image(image, lambda: self._refused_anywhere(refused=False))

    def _send(self, image: StateImage, refused: Callable[[], bool] | None) -> Callable[[], bool]:
        """Shows or sends the image that is about to be restored; returns what decides whether it is."""
        segments, memory = self._group.segments, self._snapshots.memory
        shown = [] if segments is None or memory is None else memory.segments_of(image)
        self._snapshots.on_every_rank = bool(shown)
        if segments is not None and shown:
            self._group.broadcast_bytes(_SHOWN)
            segments.say(str(image.segment).encode(), shown)
            segments.forget()  # as the other ranks do, once they have mapped them for this image
        else:
            self._group.broadcast_bytes(_IMAGE)
            send_image(self._group, image)
        self._sent, self._voted = True, False
        return lambda: self._refused_anywhere(refused is not None and refused())

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
