"""The part of the admin servicer that is about going back: rollbacks, checkpoints, incidents, and profiles.

Checks a request, hands it over, answers. Takes no decisions; must not know how any of it is done.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, Protocol, TypeVar

import anyio

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import RollbackTier
from tolaria.errors import InvalidFieldError, JournalUnavailableError, TolariaError
from tolaria.rpc.ledgered import Context, LedgeredService, bounded
from tolaria.rpc.requests import RequestLedger
from tolaria.rpc.status import abort

INCIDENTS_MAX = 1000

# A thousand slow steps, or a pause in between; the command line waits longer.
PROFILE_TIMEOUT_S = 600.0

# A full rollback's budget and the restoring of what belongs around it, several times over.
ROLLBACK_TIMEOUT_S = 60.0

# Many times the largest state that a disk takes in its stride; the writing goes on.
CHECKPOINT_TIMEOUT_S = 300.0

# A thousand rows are read in tens of milliseconds.
READ_S_MAX: Final = 10.0

_Read = TypeVar("_Read")


class Recovery(Protocol):
    """What operators can have done about the state of a run. All raise `TolariaError`s that say why not."""

    async def trigger_rollback(self, request: admin.TriggerRollbackRequest) -> admin.TriggerRollbackResponse:
        """Go back; returns when the state is back."""

    async def restore_points(self) -> admin.ListRestorePointsResponse:
        """Where one can go back to, newest first."""

    async def create_checkpoint(self, request: admin.CreateCheckpointRequest) -> admin.CreateCheckpointResponse:
        """Write one now; returns when it is committed."""

    async def incidents(self, limit: int) -> admin.ListIncidentsResponse:
        """The newest so many things that have gone wrong, newest first; 0: as many as is usual."""

    async def capture_profile(self, request: admin.CaptureProfileRequest) -> admin.CaptureProfileResponse:
        """Take a trace; returns when it is written."""


class RecoveryService(LedgeredService):
    """Serves the calls about going back."""

    def __init__(self, ledger: RequestLedger, recovery: Recovery) -> None:
        super().__init__(ledger)
        self._recovery = recovery

    async def TriggerRollback(
        self, request: admin.TriggerRollbackRequest, context: Context
    ) -> admin.TriggerRollbackResponse:
        """Go back to a restore point; the answer proves by two digests that it was bit-exact."""

        async def carry_out() -> admin.TriggerRollbackResponse:
            if request.tier not in RollbackTier.values():
                raise InvalidFieldError("tier", f"must be auto (0), fast (1) or full (2), is {request.tier}")
            going = self._recovery.trigger_rollback(request)
            return await bounded(going, timeout_s=ROLLBACK_TIMEOUT_S, missed="the rollback was not over")

        return await self._once("TriggerRollback", request, context, carry_out)

    async def ListRestorePoints(
        self, request: admin.ListRestorePointsRequest, context: Context
    ) -> admin.ListRestorePointsResponse:
        """Where one can go back to."""
        try:
            return await _read(self._recovery.restore_points())
        except TolariaError as error:
            await abort(context, error)

    async def CreateCheckpoint(
        self, request: admin.CreateCheckpointRequest, context: Context
    ) -> admin.CreateCheckpointResponse:
        """Write a durable checkpoint now."""

        async def carry_out() -> admin.CreateCheckpointResponse:
            writing = self._recovery.create_checkpoint(request)
            return await bounded(writing, timeout_s=CHECKPOINT_TIMEOUT_S, missed="the checkpoint was not written")

        return await self._once("CreateCheckpoint", request, context, carry_out)

    async def ListIncidents(self, request: admin.ListIncidentsRequest, context: Context) -> admin.ListIncidentsResponse:
        """What has gone wrong."""
        try:
            if request.limit > INCIDENTS_MAX:
                raise InvalidFieldError("limit", f"must not be more than {INCIDENTS_MAX}, is {request.limit}")
            return await _read(self._recovery.incidents(request.limit))
        except TolariaError as error:
            await abort(context, error)

    async def CaptureProfile(
        self, request: admin.CaptureProfileRequest, context: Context
    ) -> admin.CaptureProfileResponse:
        """Take a trace of the next steps."""

        async def carry_out() -> admin.CaptureProfileResponse:
            taking = self._recovery.capture_profile(request)
            return await bounded(taking, timeout_s=PROFILE_TIMEOUT_S, missed="the steps of the profile were not done")

        return await self._once("CaptureProfile", request, context, carry_out)


async def _read(reading: Awaitable[_Read]) -> _Read:
    """What is read from the journal. Raises JournalUnavailableError: it does not answer."""
    with anyio.move_on_after(READ_S_MAX):
        return await reading
    raise JournalUnavailableError(f"the journal did not answer within {READ_S_MAX:g} s")
