"""What operators ask about the state of a run, in the contract's messages. Must not know how a request reached it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from leyline.v1 import admin_service_pb2 as admin
from tolaria.images.image import SnapshotInfo
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import CheckpointRow
from tolaria.rollback.orders import RollbackOutcome
from tolaria.training.profile_desk import ProfileTaken
from tolaria.training.recovery.listing import (
    checkpoint_created,
    incident_limit,
    list_incidents,
    list_restore_points,
)
from tolaria.training.recovery.rollbacks import Asked

_OPERATOR = "operator"


class Health(Protocol):
    """Knows how far training is known to be well."""

    @property
    def healthy_step(self) -> int | None:
        """The newest such step; None: nothing has ever gone wrong."""


class Revertible(Protocol):
    """A run that can go back, be kept, and be profiled."""

    @property
    def rollbacks(self) -> Health:
        """Where it goes back."""

    async def roll_back(self, asked: Asked) -> RollbackOutcome:
        """Go back and wait for it."""

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """Have one written and wait for it."""

    async def capture_profile(self, request_id: str, active_steps: int) -> ProfileTaken:
        """Take a profile and wait for its trace."""


class RecoveryDesk:
    """Serves operators. Used on the event loop only.

    Args:
        run: whose state it is.
        archive: the journal and the durable points.
        points: those in memory.
    """

    def __init__(self, run: Revertible, archive: AsyncJournal, points: Callable[[], tuple[SnapshotInfo, ...]]) -> None:
        self._run = run
        self._archive = archive
        self._points = points

    async def trigger_rollback(self, request: admin.TriggerRollbackRequest) -> admin.TriggerRollbackResponse:
        """Go back; returns when the state is back. A caller who went away gets, or waits for, the same by asking again.

        Raises:
            RestoreUnprovenError: the live state was overwritten and is not what was captured; the run is halted.
            TolariaError: why nothing was restored; the live state is as it was.
        """
        target = request.target_step if request.HasField("target_step") else None
        asked = Asked(request.tier, target, request.reason, _OPERATOR, request_id=request.request_id)
        outcome = await self._run.roll_back(asked)
        return admin.TriggerRollbackResponse(
            rollback_id=outcome.rollback_id,
            tier=outcome.tier,
            restored_step=outcome.restored_step,
            state_digest=outcome.state_digest,
            expected_digest=outcome.expected_digest,
            latency_ms=outcome.latency_ms,
            global_step=outcome.restored_step,
            coordinated=outcome.coordinated,
        )

    async def restore_points(self) -> admin.ListRestorePointsResponse:
        """Where one can go back to, newest first. Raises JournalError."""
        rows = await self._archive.restore_points()
        return list_restore_points(rows, self._points(), healthy_step=self._run.rollbacks.healthy_step)

    async def create_checkpoint(self, request: admin.CreateCheckpointRequest) -> admin.CreateCheckpointResponse:
        """Write one now; returns when it is committed. Raises TolariaError: there is none."""
        return checkpoint_created(await self._run.checkpoint(request.reason))

    async def incidents(self, limit: int) -> admin.ListIncidentsResponse:
        """The newest so many things that have gone wrong, newest first; 0: as many as is usual. Raises JournalError."""
        return list_incidents(await self._archive.incidents(incident_limit(limit)))

    async def capture_profile(self, request: admin.CaptureProfileRequest) -> admin.CaptureProfileResponse:
        """Take a trace; returns when it is written.

        Raises:
            TolariaError: why there is none; training goes on.
        """
        taken = await self._run.capture_profile(request.request_id, request.active_steps)
        return admin.CaptureProfileResponse(
            global_step=taken.global_step, path=str(taken.trace.path), size_bytes=taken.trace.size_bytes
        )
