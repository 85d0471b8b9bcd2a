"""The servicer of TolariaAdminService: checks requests, passes them to the run, returns answers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import anyio
import grpc.aio
from google.protobuf.message import Message

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceServicer
from leyline.v1.enums_pb2 import RollbackTier
from tolaria import errors
from tolaria.journal.async_journal import AsyncJournal
from tolaria.rollback.protocol import Rollback, rollback_id_of
from tolaria.rpc.audit import AuditTrail
from tolaria.rpc.callers import Caller, present_caller
from tolaria.rpc.data_skips import skip_data, skip_message
from tolaria.rpc.exports import Exports, export_answer
from tolaria.rpc.listing import limited, list_admin_calls, list_incidents, list_restore_points, timestamp
from tolaria.rpc.requests import Answer, MutatingRequest, RequestLedger
from tolaria.rpc.status import abort
from tolaria.rpc.telemetry import filter_of, responses
from tolaria.run.restore_points import RestorePoints
from tolaria.run.run import TrainingRun
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus
from tolaria.security.tokens import Role
from tolaria.telemetry.subscriptions import TelemetryStream
from tolaria.values.optimization import OPERATOR, Adjustment
from tolaria.values.spans import remote_parent, within

Context = grpc.aio.ServicerContext[object, object]
_Read = TypeVar("_Read")

# Longest waits in seconds; what takes longer still takes effect.
EFFECT_S, ROLLBACK_S, CHECKPOINT_S, PROFILE_S, EXPORT_S, READ_S = 60.0, 60.0, 300.0, 600.0, 1800.0, 10.0

_WHILE_DRAINING: Final = frozenset({"RaiseEmergency"})
_LATE_RELOAD: Final = "the settings were not read"


@dataclass(frozen=True, slots=True)
class AdminParts:
    """What the servicer passes requests to.

    `complete` adds the service's own fields to a status; `closing` is set when the service is about to end, so that
    streams end too; `interval_s` is the interval of WatchStatus without changes. Exports go below `state_dir`. `reload`
    reads the settings again, for an origin that it reports.
    """

    run: TrainingRun
    status: RunStatus
    points: RestorePoints
    safety: Safety
    journal: AsyncJournal
    ledger: RequestLedger
    audit: AuditTrail
    complete: Callable[[admin.GetStatusResponse], None]
    closing: anyio.Event
    interval_s: float
    state_dir: Path
    telemetry: TelemetryStream
    reload: Callable[[str], Awaitable[admin.ReloadConfigResponse]]


class AdminService(TolariaAdminServiceServicer):
    """Serves TolariaAdminService for one run."""

    def __init__(self, parts: AdminParts) -> None:
        self._parts = parts
        self._run, self._status, self._safety = parts.run, parts.status, parts.safety
        self._exports = Exports(parts.state_dir)

    # -- status ------------------------------------------------------------------------------------------------------

    async def GetStatus(self, request: admin.GetStatusRequest, context: Context) -> admin.GetStatusResponse:
        """Returns the status."""
        return self._message()

    async def WatchStatus(
        self, request: admin.WatchStatusRequest, context: Context
    ) -> AsyncIterator[admin.WatchStatusResponse]:
        """Yields the status now, after every change and at intervals; ends with the service."""
        interval_s = max(self._parts.interval_s, request.interval_ms / 1000)
        feed = self._status.feed
        while True:
            last, seen = self._parts.closing.is_set(), feed.version
            yield admin.WatchStatusResponse(status=self._message())
            if last:
                return
            if feed.version == seen:  # else something changed while the client was reading: send the newest at once
                with anyio.move_on_after(interval_s):
                    await feed.next()

    async def StreamTelemetry(
        self, request: admin.StreamTelemetryRequest, context: Context
    ) -> AsyncIterator[admin.StreamTelemetryResponse]:
        """Yields telemetry packets as they are published; ends with the service."""
        try:
            wanted = filter_of(request)
            replay = request.replay_critical if request.HasField("replay_critical") else None
            with self._parts.telemetry.subscribe(wanted, replay) as subscription:

                def remove(_: object) -> None:
                    self._parts.telemetry.remove(subscription)

                # gRPC cancels a stream while it waits for a slow reader without an end of the block below.
                context.add_done_callback(remove)  # type: ignore[arg-type] # any callable will do
                await context.send_initial_metadata(())  # nothing that happens from now on is missed
                async for response in responses(subscription):
                    yield response
        except errors.TolariaError as error:
            await abort(context, error)

    # -- the run -----------------------------------------------------------------------------------------------------

    async def PauseTraining(self, request: admin.PauseTrainingRequest, context: Context) -> admin.PauseTrainingResponse:
        """Holds the run within one microbatch."""

        async def operation() -> admin.PauseTrainingResponse:
            await self._run.pause(request.reason)
            return admin.PauseTrainingResponse(global_step=self._status.global_step, state=self._status.state)

        return await self._once(request, context, operation)

    async def ResumeTraining(
        self, request: admin.ResumeTrainingRequest, context: Context
    ) -> admin.ResumeTrainingResponse:
        """Resumes a held run; one that is halted on an ill state first goes back to a sound restore point."""

        async def operation() -> admin.ResumeTrainingResponse:
            await self._run.resume(request.reason)
            return admin.ResumeTrainingResponse(global_step=self._status.global_step, state=self._status.state)

        return await self._once(request, context, operation)

    async def StopTraining(self, request: admin.StopTrainingRequest, context: Context) -> admin.StopTrainingResponse:
        """Ends the run after its current step; the service keeps running."""

        async def operation() -> admin.StopTrainingResponse:
            await self._run.stop(request.reason)
            return admin.StopTrainingResponse(global_step=self._status.global_step, state=self._status.state)

        return await self._once(request, context, operation)

    async def AdjustLearningRate(
        self, request: admin.AdjustLearningRateRequest, context: Context
    ) -> admin.AdjustLearningRateResponse:
        """Adjusts learning rates at the next step boundary, permanently or for a number of steps."""

        async def operation() -> admin.AdjustLearningRateResponse:
            change = request.WhichOneof("change")
            self._run.require_adjustable()  # for an ended run, this error comes before that of an invalid adjustment
            try:
                adjustment = Adjustment(
                    group=request.group or None,
                    factor=request.factor if change == "factor" else None,
                    value=request.value if change == "value" else None,
                    expires_after_steps=request.expires_after_steps or None,
                    origin=OPERATOR,
                    request_id=request.request_id,
                    reason=request.reason,
                )
                step = await self._run.adjust_learning_rate(adjustment)
            except errors.AdjustmentRefusedError as error:
                raise errors.InvalidFieldError(error.field, str(error).removeprefix(f"{error.field}: ")) from None
            except errors.UnknownGroupError as error:
                raise errors.InvalidFieldError("group", str(error)) from None
            return admin.AdjustLearningRateResponse(global_step=step, learning_rates=self._status.learning_rates)

        return await self._once(request, context, operation)

    async def CaptureProfile(
        self, request: admin.CaptureProfileRequest, context: Context
    ) -> admin.CaptureProfileResponse:
        """Takes a trace of the next steps."""

        async def operation() -> admin.CaptureProfileResponse:
            taken = await self._run.capture_profile(request.active_steps, request.rank)
            return admin.CaptureProfileResponse(
                global_step=taken.global_step, path=taken.trace.path, size_bytes=taken.trace.size_bytes
            )

        late = "the steps of the profile were not done"
        return await self._once(request, context, operation, timeout_s=PROFILE_S, late=late)

    # -- restore points ----------------------------------------------------------------------------------------------

    async def TriggerRollback(
        self, request: admin.TriggerRollbackRequest, context: Context
    ) -> admin.TriggerRollbackResponse:
        """Rolls back to a restore point; two digests in the answer prove that the restore was bit-exact."""

        async def operation() -> admin.TriggerRollbackResponse:
            done = await self._run.roll_back(_rollback_of(request))
            return admin.TriggerRollbackResponse(
                rollback_id=done.rollback_id,
                tier=done.tier,
                restored_step=done.restored_step,
                state_digest=done.state_digest,
                expected_digest=done.expected_digest,
                latency_ms=done.latency_ms,
                global_step=done.restored_step,
                coordinated=done.coordinated,
                waited_ms=done.waited_ms,
                restored_ms=done.restored_ms,
                superseded=done.superseded,
                attempt=done.attempt,
                chosen=done.chosen,
                left_step=max(0, done.left_step),
                left_checkpoint_id=done.left_checkpoint_id,
                left_not_kept=done.left_not_kept,
                kept_ms=done.kept_ms,
                left_kept_until=timestamp(done.left_kept_until_ns) if done.left_checkpoint_id else None,
                superseded_kept=done.superseded_kept,
            )

        return await self._once(request, context, operation, timeout_s=ROLLBACK_S, late="the rollback was not over")

    async def CreateCheckpoint(
        self, request: admin.CreateCheckpointRequest, context: Context
    ) -> admin.CreateCheckpointResponse:
        """Writes a durable checkpoint now."""

        async def operation() -> admin.CreateCheckpointResponse:
            row = await self._run.checkpoint(request.reason)
            return admin.CreateCheckpointResponse(
                global_step=row.global_step,
                checkpoint_id=row.checkpoint_id,
                digest=row.digest,
                size_bytes=row.size_bytes,
            )

        late = "the checkpoint was not written"
        return await self._once(request, context, operation, timeout_s=CHECKPOINT_S, late=late)

    async def ExportModel(self, request: admin.ExportModelRequest, context: Context) -> admin.ExportModelResponse:
        """Takes the model out of a checkpoint, after earlier requests for that; training goes on meanwhile."""

        async def operation() -> admin.ExportModelResponse:
            card, place = await self._exports.carry_out(request)
            return export_answer(card, place, global_step=self._status.global_step)

        late = "the export was not written"
        return await self._once(request, context, operation, timeout_s=EXPORT_S, late=late)

    async def SkipData(self, request: admin.SkipDataRequest, context: Context) -> admin.SkipDataResponse:
        """Has training leave data out, or undoes that."""

        async def operation() -> admin.SkipDataResponse:
            skip = await skip_data(self._run, request)
            return admin.SkipDataResponse(
                global_step=self._status.global_step, skip=skip_message(skip, self._run.skips)
            )

        return await self._once(request, context, operation)

    async def ListDataSkips(self, request: admin.ListDataSkipsRequest, context: Context) -> admin.ListDataSkipsResponse:
        """Returns what is left out, the newest first."""
        skips = self._run.skips
        return admin.ListDataSkipsResponse(skips=[skip_message(each, skips) for each in skips.all])

    async def ListRestorePoints(
        self, request: admin.ListRestorePointsRequest, context: Context
    ) -> admin.ListRestorePointsResponse:
        """Returns the restore points, newest first, also superseded ones."""
        try:
            rows = await _read(self._parts.journal.kept_points())
        except errors.TolariaError as error:
            await abort(context, error)
        return list_restore_points(self._parts.points.of(self._status.snapshots, rows))

    async def ListIncidents(self, request: admin.ListIncidentsRequest, context: Context) -> admin.ListIncidentsResponse:
        """Returns the incidents, newest first."""
        try:
            return list_incidents(await _read(self._parts.journal.incidents(limited(request.limit))))
        except errors.TolariaError as error:
            await abort(context, error)

    async def ListAdminCalls(
        self, request: admin.ListAdminCallsRequest, context: Context
    ) -> admin.ListAdminCallsResponse:
        """Returns the calls that could change something, newest first."""
        try:
            limit = limited(request.limit)
            return list_admin_calls(await _read(self._parts.journal.admin_calls(limit)))
        except errors.TolariaError as error:
            await abort(context, error)

    # -- the service -------------------------------------------------------------------------------------------------

    async def ReloadConfig(self, request: admin.ReloadConfigRequest, context: Context) -> admin.ReloadConfigResponse:
        """Reads the settings again; what cannot change in a running service waits for its restart."""
        return await self._once(request, context, partial(self._reload, present_caller()), late=_LATE_RELOAD)

    async def reload_on_signal(self, name: str) -> None:
        """Reads the settings again for the signal `name`, recorded like a call."""
        request = admin.ReloadConfigRequest(request_id=f"{name}-{uuid.uuid4()}", reason=name)
        caller = Caller(name, Role.ADMIN)
        with suppress(errors.TolariaError), self._parts.audit.recorded("ReloadConfig", request, caller=caller):
            operation = partial(self._reload, caller)
            await self._parts.ledger.once("ReloadConfig", request, operation, timeout_s=EFFECT_S, late=_LATE_RELOAD)

    async def _reload(self, caller: Caller) -> admin.ReloadConfigResponse:
        answer = await self._parts.reload(caller.name)
        answer.global_step = self._status.global_step
        return answer

    async def Shutdown(self, request: admin.ShutdownRequest, context: Context) -> admin.ShutdownResponse:
        """Drains the service as SIGTERM does; the answer comes before the last checkpoint."""

        async def operation() -> admin.ShutdownResponse:
            self._status.draining = f"{request.reason} (Shutdown by {caller.name})"
            self._status.feed.changed()
            return admin.ShutdownResponse(global_step=self._status.global_step, state=admin.RUN_STATE_DRAINING)

        caller = present_caller()
        return await self._once(request, context, operation)

    # -- safety ------------------------------------------------------------------------------------------------------

    async def RaiseEmergency(
        self, request: admin.RaiseEmergencyRequest, context: Context
    ) -> admin.RaiseEmergencyResponse:
        """Raises an emergency; the answer contains the acknowledgements and their latencies."""

        async def operation() -> admin.RaiseEmergencyResponse:
            state = await self._safety.raise_emergency(request.level, request.reason, self._status)
            return admin.RaiseEmergencyResponse(
                global_step=self._status.global_step,
                level=state.level,
                state=self._status.state,
                acknowledgements=[
                    admin.EmergencyAcknowledgement(participant=given.participant, latency_ms=given.latency_ns / 1e6)
                    for given in state.acknowledgements
                ],
            )

        return await self._once(request, context, operation)

    async def ClearEmergency(
        self, request: admin.ClearEmergencyRequest, context: Context
    ) -> admin.ClearEmergencyResponse:
        """Clears the emergency; training that it halted goes on when it is resumed."""

        async def operation() -> admin.ClearEmergencyResponse:
            self._safety.clear_emergency(request.reason)
            return admin.ClearEmergencyResponse(
                global_step=self._status.global_step,
                level=self._safety.controller.state.level,
                state=self._status.state,
            )

        return await self._once(request, context, operation)

    async def SetConservativeMode(
        self, request: admin.SetConservativeModeRequest, context: Context
    ) -> admin.SetConservativeModeResponse:
        """Adds or removes the operator's reason for conservative mode; the answer contains the remaining reasons."""

        async def operation() -> admin.SetConservativeModeResponse:
            reasons = self._safety.set_conservative(enabled=request.enabled)
            return admin.SetConservativeModeResponse(global_step=self._status.global_step, conservative_reasons=reasons)

        return await self._once(request, context, operation)

    # -- common ------------------------------------------------------------------------------------------------------

    async def _once(
        self,
        request: MutatingRequest,
        context: Context,
        operation: Callable[[], Awaitable[Answer]],
        *,
        timeout_s: float = EFFECT_S,
        late: str = "the lane did not reach a step boundary",
    ) -> Answer:
        method, ledger = request.DESCRIPTOR.name.removesuffix("Request"), self._parts.ledger
        try:
            self._require_serving(method, request)
            with (
                within(remote_parent(context.invocation_metadata() or ())),
                self._parts.audit.recorded(method, request, repeat=ledger.knows(method, request)) as took_effect,
            ):
                answer = await ledger.once(method, request, operation, timeout_s=timeout_s, late=late)
                took_effect(_step_of(answer))
                return answer
        except errors.TolariaError as error:
            await abort(context, error)

    def _require_serving(self, method: str, request: MutatingRequest) -> None:
        """Raises ServiceDrainingError for a new operation while the service is stopping; a halt gets through."""
        if self._status.draining and method not in _WHILE_DRAINING and not self._parts.ledger.knows(method, request):
            raise errors.ServiceDrainingError(
                f"the service is stopping: {self._status.draining}; it takes no further operation"
            )

    def _message(self) -> admin.GetStatusResponse:
        message = self._run.status()
        self._parts.complete(message)
        return message


def _step_of(answer: Message) -> int:
    """Returns the step at which a request took effect, as its answer says."""
    return int(getattr(answer, "global_step"))  # noqa: B009 - the answers have no common base class with it


def _rollback_of(request: admin.TriggerRollbackRequest) -> Rollback:
    """Returns the rollback that an operator asks for. Raises InvalidFieldError."""
    if request.tier not in RollbackTier.values():
        raise errors.InvalidFieldError("tier", f"must be auto (0), fast (1) or full (2), is {request.tier}")
    if request.checkpoint_id and request.HasField("target_step"):
        raise errors.InvalidFieldError("target_step", "cannot be combined with checkpoint_id, which names a step")
    if request.checkpoint_id and request.tier == RollbackTier.ROLLBACK_TIER_FAST:
        raise errors.InvalidFieldError("tier", "cannot be fast with checkpoint_id: checkpoints are on disk")
    return Rollback(
        tier=request.tier,
        target_step=request.target_step if request.HasField("target_step") else None,
        reason=request.reason,
        origin=OPERATOR,
        rollback_id=rollback_id_of(request.request_id),
        checkpoint_id=request.checkpoint_id,
    )


async def _read(reading: Awaitable[_Read]) -> _Read:
    """Returns what is read from the journal. Raises JournalUnavailableError when it does not answer in time."""
    with anyio.move_on_after(READ_S):
        return await reading
    raise errors.JournalUnavailableError(f"the journal did not answer within {READ_S:g} s")
