"""The admin servicer: checks a request, hands it to the run, answers. Takes no decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import NoReturn, Protocol

import anyio

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.emergency import EmergencyState
from tolaria.errors import NotImplementedYetError
from tolaria.rpc.ledgered import Context, bounded
from tolaria.rpc.recovery import Recovery, RecoveryService
from tolaria.rpc.requests import RequestLedger
from tolaria.rpc.status import abort


class Feed(Protocol):
    """Tells that something has changed."""

    version: int

    async def next(self) -> None:
        """Wait for the next change."""


class Run(Protocol):
    """What operators can see of the run and do to it."""

    @property
    def feed(self) -> Feed:
        """Tells of every change."""

    @property
    def global_step(self) -> int:
        """Updates done."""

    def status(self) -> admin.GetStatusResponse:
        """How the run stands."""

    async def pause(self, reason: str) -> None:
        """Hold the run; returns when it stands."""

    def resume(self, reason: str) -> None:
        """Go on."""

    async def stop(self, reason: str) -> None:
        """Finish the step and end the run; returns when it has ended."""

    async def adjust_rate(self, request: admin.AdjustLearningRateRequest) -> int:
        """Change learning rates at a fence; returns the step at which it took effect."""


class Safety(Protocol):
    """What operators can do about the safeguards of a run."""

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """Switch conservative mode; the reasons that stand then."""

    async def raise_emergency(self, level: EmergencyLevel.ValueType, reason: str) -> EmergencyState:
        """Raise a level; returns when it is answered or overdue."""

    def clear_emergency(self, reason: str) -> None:
        """End the emergency."""


class AdminService(RecoveryService):
    """Serves TolariaAdminService for one run.

    Args:
        run: whom to hand requests to.
        safety: whom to hand those about safeguards to.
        recovery: whom to hand those about going back to.
        complete: adds to a status what only the service knows.
        closing: set when the service is about to end, so that streams end too.
        interval_s: pace of WatchStatus between changes.
        ledger: of requests that change something.
    """

    def __init__(
        self,
        run: Run,
        *,
        safety: Safety,
        recovery: Recovery,
        complete: Callable[[admin.GetStatusResponse], None],
        closing: anyio.Event,
        interval_s: float,
        ledger: RequestLedger,
    ) -> None:
        super().__init__(ledger, recovery)
        self._run = run
        self._safety = safety
        self._complete = complete
        self._closing = closing
        self._interval_s = interval_s

    async def GetStatus(self, request: admin.GetStatusRequest, context: Context) -> admin.GetStatusResponse:
        """How the run stands."""
        return self._status()

    async def WatchStatus(
        self,
        request: admin.WatchStatusRequest,
        context: Context,
    ) -> AsyncIterator[admin.WatchStatusResponse]:
        """The status now, after every change, and every so often; ends with the service."""
        interval_s = max(self._interval_s, request.interval_ms / 1000)
        while True:
            last, seen = self._closing.is_set(), self._run.feed.version
            yield admin.WatchStatusResponse(status=self._status())
            if last:
                return
            if self._run.feed.version == seen:  # else something changed while the client read: newest at once
                with anyio.move_on_after(interval_s):
                    await self._run.feed.next()

    async def PauseTraining(self, request: admin.PauseTrainingRequest, context: Context) -> admin.PauseTrainingResponse:
        """Hold the run within one microbatch."""

        async def carry_out() -> admin.PauseTrainingResponse:
            await bounded(self._run.pause(request.reason))
            return admin.PauseTrainingResponse(global_step=self._run.global_step, state=self._run.status().state)

        return await self._once("PauseTraining", request, context, carry_out)

    async def ResumeTraining(
        self, request: admin.ResumeTrainingRequest, context: Context
    ) -> admin.ResumeTrainingResponse:
        """Let a held run go on."""

        async def carry_out() -> admin.ResumeTrainingResponse:
            self._run.resume(request.reason)
            return admin.ResumeTrainingResponse(global_step=self._run.global_step, state=self._run.status().state)

        return await self._once("ResumeTraining", request, context, carry_out)

    async def StopTraining(self, request: admin.StopTrainingRequest, context: Context) -> admin.StopTrainingResponse:
        """End the run after its step; the service stays."""

        async def carry_out() -> admin.StopTrainingResponse:
            await bounded(self._run.stop(request.reason))
            return admin.StopTrainingResponse(global_step=self._run.global_step, state=self._run.status().state)

        return await self._once("StopTraining", request, context, carry_out)

    async def RaiseEmergency(
        self, request: admin.RaiseEmergencyRequest, context: Context
    ) -> admin.RaiseEmergencyResponse:
        """Raise an emergency; the answer tells who has acknowledged it, and how soon."""

        async def carry_out() -> admin.RaiseEmergencyResponse:
            state = await self._safety.raise_emergency(request.level, request.reason)
            return admin.RaiseEmergencyResponse(
                global_step=self._run.global_step,
                level=state.level,
                state=self._run.status().state,
                acknowledgements=[
                    admin.EmergencyAcknowledgement(participant=given.participant, latency_ms=given.latency_ns / 1e6)
                    for given in state.acknowledgements
                ],
            )

        return await self._once("RaiseEmergency", request, context, carry_out)

    async def ClearEmergency(
        self, request: admin.ClearEmergencyRequest, context: Context
    ) -> admin.ClearEmergencyResponse:
        """End an emergency; training that it halted goes on when it is resumed."""

        async def carry_out() -> admin.ClearEmergencyResponse:
            self._safety.clear_emergency(request.reason)
            status = self._run.status()
            return admin.ClearEmergencyResponse(
                global_step=self._run.global_step, level=status.emergency_level, state=status.state
            )

        return await self._once("ClearEmergency", request, context, carry_out)

    async def SetConservativeMode(
        self, request: admin.SetConservativeModeRequest, context: Context
    ) -> admin.SetConservativeModeResponse:
        """Leave seeds and the controller alone, or no longer; the answer tells the reasons that stand."""

        async def carry_out() -> admin.SetConservativeModeResponse:
            reasons = self._safety.set_conservative(enabled=request.enabled)
            return admin.SetConservativeModeResponse(global_step=self._run.global_step, conservative_reasons=reasons)

        return await self._once("SetConservativeMode", request, context, carry_out)

    async def AdjustLearningRate(
        self, request: admin.AdjustLearningRateRequest, context: Context
    ) -> admin.AdjustLearningRateResponse:
        """Change learning rates at the next fence, for good or for some steps."""

        async def carry_out() -> admin.AdjustLearningRateResponse:
            step = await bounded(self._run.adjust_rate(request))
            return admin.AdjustLearningRateResponse(global_step=step, learning_rates=self._run.status().learning_rates)

        return await self._once("AdjustLearningRate", request, context, carry_out)

    # grpc.aio takes a coroutine for a stream as well; the generated type knows generators only.
    async def StreamTelemetry(  # type: ignore[override]
        self, request: admin.StreamTelemetryRequest, context: Context
    ) -> NoReturn:
        """Not served yet."""
        await _not_yet(context, "StreamTelemetry", "this version logs its events; metrics are on the metrics server")

    def _status(self) -> admin.GetStatusResponse:
        status = self._run.status()
        self._complete(status)
        return status


async def _not_yet(context: Context, method: str, why: str) -> NoReturn:
    await abort(context, NotImplementedYetError(f"{method} is not served: {why}"))
