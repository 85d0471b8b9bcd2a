"""`GroupRestore`: how all ranks of a group restore the same image, or none of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tolaria.errors import OptimizationError, RestoreAbandonedError, RollbackError, SeedError
from tolaria.images import StateImage
from tolaria.lane.messages import Restored
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.ranks.group import Group
from tolaria.ranks.images import receive_image, send_image

_IMAGE: Final = b"I"
_NO_IMAGE: Final = b"N"


class GroupRestore:
    """Restores on all ranks: the leader sends the image, and each rank refuses it if another one does.

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
            while (image := self._received()) is not None:
                with suppress(RollbackError, SeedError, OptimizationError):  # the leader's restore fails, too
                    self._restore(image)
            return
        try:
            restore()
        finally:
            self._group.broadcast_bytes(_NO_IMAGE)

    def _received(self) -> StateImage | None:
        if self._group.broadcast_bytes() == _NO_IMAGE:
            return None
        image = receive_image(self._group, self._snapshots.state)
        self._sent, self._voted = True, False
        return image

    def _restore(self, image: StateImage) -> Restored:
        return self._snapshots.restore_image(image, lambda: self._refused_anywhere(refused=False))

    def _send(self, image: StateImage, refused: Callable[[], bool] | None) -> Callable[[], bool]:
        """Sends the image that is about to be restored; returns what decides whether it is."""
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
