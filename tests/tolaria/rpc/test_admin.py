from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio
import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub, add_TolariaAdminServiceServicer_to_server
from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_UNSPECIFIED,
    ROLLBACK_TIER_FAST,
    EmergencyLevel,
    RollbackTier,
)
from support.answers import FakeAnswers
from tolaria.emergency import Acknowledgement, EmergencyState
from tolaria.emergency.protocol import require_level
from tolaria.errors import (
    CheckpointWriteError,
    IllegalEmergencyEventError,
    InvalidFieldError,
    NoCheckpointError,
    WrongStateError,
)
from tolaria.grpc_server import grpc_server
from tolaria.rpc import recovery
from tolaria.rpc.admin import AdminService
from tolaria.rpc.requests import RequestLedger
from tolaria.training.feed import StatusFeed
from tolaria.training.run_state import RunEvent, after

if TYPE_CHECKING:
    from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceAsyncStub  # in the types only

pytestmark = pytest.mark.anyio


class FakeRun:
    """A run without training: the real table of states, and a step count."""

    def __init__(self) -> None:
        self.feed = StatusFeed()
        self.global_step = 7
        self.state = admin.RUN_STATE_RUNNING
        self.reasons: list[str] = []
        self.level: EmergencyLevel.ValueType = EMERGENCY_LEVEL_UNSPECIFIED

    def status(self) -> admin.GetStatusResponse:
        return admin.GetStatusResponse(
            run_id="run", state=self.state, global_step=self.global_step, emergency_level=self.level
        )

    async def pause(self, reason: str) -> None:
        self._enter(RunEvent.PAUSED, reason)

    def resume(self, reason: str) -> None:
        self._enter(RunEvent.RESUMED, reason)

    async def stop(self, reason: str) -> None:
        self._enter(RunEvent.FINISHED, reason)

    async def adjust_rate(self, request: admin.AdjustLearningRateRequest) -> int:
        """Take every factor, refuse every value."""
        if request.WhichOneof("change") != "factor":
            raise InvalidFieldError("value", "must not be")
        return self.global_step

    async def trigger_rollback(self, request: admin.TriggerRollbackRequest) -> admin.TriggerRollbackResponse:
        """To the step that is asked for, if that is not too far."""
        if request.target_step > 7:
            raise NoCheckpointError("nothing to go back to")
        return admin.TriggerRollbackResponse(restored_step=request.target_step, tier=request.tier, coordinated=True)

    async def restore_points(self) -> admin.ListRestorePointsResponse:
        """One."""
        return admin.ListRestorePointsResponse(restore_points=[admin.RestorePoint(global_step=3)])

    async def create_checkpoint(self, request: admin.CreateCheckpointRequest) -> admin.CreateCheckpointResponse:
        """The disk is full."""
        raise CheckpointWriteError("write", "ENOSPC", request.reason)

    async def incidents(self, limit: int) -> admin.ListIncidentsResponse:
        """As many as are asked for."""
        return admin.ListIncidentsResponse(incidents=[admin.Incident(kind="rollback")] * limit)

    async def capture_profile(self, request: admin.CaptureProfileRequest) -> admin.CaptureProfileResponse:
        """Into the file that is named after the number of steps."""
        return admin.CaptureProfileResponse(path=f"{request.active_steps}.json")

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """One reason stands whatever is wished."""
        return ("operator", "breaker_open:tamiyo") if enabled else ("breaker_open:tamiyo",)

    async def raise_emergency(self, level: EmergencyLevel.ValueType, reason: str) -> EmergencyState:
        """Stands at once, acknowledged by itself."""
        require_level(level)
        self.reasons.append(reason)
        self.level = level
        return EmergencyState(level=level, acknowledgements=(Acknowledgement("tolaria", 1_500_000),))

    def clear_emergency(self, reason: str) -> None:
        """There must be one."""
        if not self.level:
            raise IllegalEmergencyEventError("there is none")
        self.level = EMERGENCY_LEVEL_UNSPECIFIED

    def _enter(self, event: RunEvent, reason: str) -> None:
        self.state = after(self.state, event)
        self.reasons.append(reason)
        self.feed.changed()


class Served:
    def __init__(self, run: FakeRun, stub: TolariaAdminServiceAsyncStub, closing: anyio.Event, address: str) -> None:
        self.run, self.stub, self.closing, self.address = run, stub, closing, address


@asynccontextmanager
async def served(interval_s: float = 60.0) -> AsyncIterator[Served]:
    """The service before a fake run, and a client of it."""
    run, closing = FakeRun(), anyio.Event()

    def complete(status: admin.GetStatusResponse) -> None:
        status.metrics_address = "m"

    def register(server: grpc.aio.Server) -> None:
        service = AdminService(
            run,
            safety=run,
            recovery=run,
            complete=complete,
            closing=closing,
            interval_s=interval_s,
            ledger=RequestLedger(100, FakeAnswers()),
        )
        add_TolariaAdminServiceServicer_to_server(service, server)

    async with (
        grpc_server("test", "127.0.0.1:0", register, service_names=["x"], grace_s=1.0) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        yield Served(run, TolariaAdminServiceStub(channel), closing, str(server.address))


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The stable reason in an error's details."""
    # The library asks for a call; an error of grpc.aio has the three methods that it reads.
    status = rpc_status.from_call(cast(grpc.Call, error))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    reason: str = info.reason
    return reason


async def test_status_holds_the_runs_part_and_the_services() -> None:
    """GetStatus is the run's message, completed by the service."""
    async with served() as it:
        status = await it.stub.GetStatus(admin.GetStatusRequest())
    assert (status.run_id, status.global_step, status.metrics_address) == ("run", 7, "m")


async def test_pause_resume_stop_tell_step_and_state() -> None:
    """Each mutating answer carries the step at which it took effect, and the new state."""
    async with served() as it:
        paused = await it.stub.PauseTraining(admin.PauseTrainingRequest(request_id="1", reason="look"))
        resumed = await it.stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="2", reason="fine"))
        stopped = await it.stub.StopTraining(admin.StopTrainingRequest(request_id="3", reason="enough"))
    assert [a.state for a in (paused, resumed, stopped)] == [
        admin.RUN_STATE_PAUSED, admin.RUN_STATE_RUNNING, admin.RUN_STATE_FINISHED,
    ]  # fmt: skip
    assert {a.global_step for a in (paused, resumed, stopped)} == {7}
    assert it.run.reasons == ["look", "fine", "enough"]


async def test_conservative_mode_is_switched_and_what_stands_is_told() -> None:
    """Switched off, a reason whose cause stands is still in the answer."""
    async with served() as it:
        on = await it.stub.SetConservativeMode(
            admin.SetConservativeModeRequest(request_id="1", reason="look", enabled=True)
        )
        off = await it.stub.SetConservativeMode(admin.SetConservativeModeRequest(request_id="2", reason="fine"))
    assert list(on.conservative_reasons) == ["operator", "breaker_open:tamiyo"]
    assert list(off.conservative_reasons) == ["breaker_open:tamiyo"]
    assert on.global_step == 7


async def test_an_emergency_is_raised_acknowledged_and_cleared() -> None:
    """The answer tells level, state and who has acknowledged how soon; clearing leaves none."""
    async with served() as it:
        raised = await it.stub.RaiseEmergency(
            admin.RaiseEmergencyRequest(request_id="1", reason="smoke", level=EMERGENCY_LEVEL_HALT)
        )
        cleared = await it.stub.ClearEmergency(admin.ClearEmergencyRequest(request_id="2", reason="no smoke"))
    assert (raised.level, raised.global_step) == (EMERGENCY_LEVEL_HALT, 7)
    assert [(a.participant, a.latency_ms) for a in raised.acknowledgements] == [("tolaria", 1.5)]
    assert cleared.level == EMERGENCY_LEVEL_UNSPECIFIED


async def test_emergencies_that_make_no_sense_are_refused() -> None:
    """A level that does not exist is a bad argument; clearing what does not stand fits no state."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await it.stub.RaiseEmergency(admin.RaiseEmergencyRequest(request_id="1", reason="smoke"))
        with pytest.raises(grpc.aio.AioRpcError) as none:
            await it.stub.ClearEmergency(admin.ClearEmergencyRequest(request_id="2", reason="x"))
    assert unknown.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(unknown.value) == "UNKNOWN_LEVEL"
    assert none.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(none.value) == "NO_SUCH_EMERGENCY"


async def test_a_repeated_request_is_carried_out_once() -> None:
    """The same request_id gets the first answer, though the run has moved on."""
    async with served() as it:
        request = admin.PauseTrainingRequest(request_id="1", reason="look")
        first = await it.stub.PauseTraining(request)
        it.run.global_step = 99
        assert await it.stub.PauseTraining(request) == first
    assert it.run.reasons == ["look"]


async def test_a_request_that_does_not_fit_the_state_is_refused() -> None:
    """FAILED_PRECONDITION with a stable reason, and nothing changed."""
    async with served() as it:
        it.run.state = admin.RUN_STATE_FINISHED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="1", reason="x"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(caught.value) == "WRONG_STATE"


async def test_a_missing_reason_is_named() -> None:
    """INVALID_ARGUMENT says which field."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match="reason: must not be empty") as caught:
            await it.stub.PauseTraining(admin.PauseTrainingRequest(request_id="1"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_FIELD"


async def test_calls_about_going_back_are_handed_over_and_answered() -> None:
    """Each reaches the run's recovery once, with its fields, and its answer comes back."""
    async with served() as it:
        asked = admin.TriggerRollbackRequest(request_id="a", reason="r", tier=ROLLBACK_TIER_FAST, target_step=5)
        for _ in range(2):
            back = await it.stub.TriggerRollback(asked)
            assert (back.restored_step, back.tier, back.coordinated) == (5, ROLLBACK_TIER_FAST, True)
        points = await it.stub.ListRestorePoints(admin.ListRestorePointsRequest())
        assert [point.global_step for point in points.restore_points] == [3]
        listed = await it.stub.ListIncidents(admin.ListIncidentsRequest(limit=2))
        assert len(listed.incidents) == 2
        profile = await it.stub.CaptureProfile(admin.CaptureProfileRequest(request_id="p", reason="r", active_steps=4))
        assert profile.path == "4.json"


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        (
            "TriggerRollback",
            admin.TriggerRollbackRequest(request_id="a", reason="r", target_step=8),
            grpc.StatusCode.NOT_FOUND,
            "nothing to go back to",
        ),
        (
            "TriggerRollback",
            admin.TriggerRollbackRequest(request_id="a", reason="r", tier=cast("RollbackTier.ValueType", 9)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "tier",
        ),
        ("TriggerRollback", admin.TriggerRollbackRequest(reason="r"), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        (
            "CreateCheckpoint",
            admin.CreateCheckpointRequest(request_id="a", reason="r"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "ENOSPC",
        ),
        ("ListIncidents", admin.ListIncidentsRequest(limit=1001), grpc.StatusCode.INVALID_ARGUMENT, "limit"),
    ],
)
async def test_calls_about_going_back_say_why_not(
    method: str, request_: object, code: grpc.StatusCode, words: str
) -> None:
    """The status tells what kind of reason it is, the message which."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await getattr(it.stub, method)(request_)
    assert caught.value.code() is code


async def test_the_telemetry_stream_is_not_served_either() -> None:
    """A stream is refused as a call is."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match="StreamTelemetry is not served"):
            async for _ in it.stub.StreamTelemetry(admin.StreamTelemetryRequest()):
                pass


async def test_a_watch_tells_every_change_at_once_and_ends_with_the_service() -> None:
    """The status now, one more after a change, the last one when the service closes; then the stream ends."""
    async with served() as it:
        states = []
        with anyio.fail_after(5):
            async for answer in it.stub.WatchStatus(admin.WatchStatusRequest()):
                states.append(answer.status.state)
                if len(states) == 1:
                    await it.run.pause("look")
                elif len(states) == 2:
                    it.closing.set()
                    it.run.feed.changed()
    assert states == [admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_PAUSED]


async def test_a_watch_keeps_its_pace_without_changes() -> None:
    """Between changes the status comes every interval, no faster than the client asked."""
    async with served(interval_s=0.01) as it:
        with anyio.fail_after(5):
            count = 0
            async for _ in it.stub.WatchStatus(admin.WatchStatusRequest(interval_ms=20)):
                count += 1
                if count == 4:
                    break
    assert count == 4


METHODS = [m.name for m in admin.DESCRIPTOR.services_by_name["TolariaAdminService"].methods if not m.server_streaming]


@given(calls=st.lists(st.tuples(st.sampled_from(METHODS), st.binary(max_size=40)), max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_never_breaks_the_server(calls: list[tuple[str, bytes]]) -> None:
    """Whatever bytes arrive for whatever method: an answer or an error of the caller's making, never a crash."""
    crashes = []

    async def send() -> None:
        async with served() as it, grpc.aio.insecure_channel(it.address) as channel:
            for method, raw in calls:
                path = f"/leyline.v1.TolariaAdminService/{method}"
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
                try:
                    await call(raw, timeout=5)
                except grpc.aio.AioRpcError as error:
                    if error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}:
                        crashes.append(f"{method}: {error.details()}")
            await it.stub.GetStatus(admin.GetStatusRequest(), timeout=5)

    anyio.run(send)
    assert crashes == []


async def test_a_refused_move_changes_nothing() -> None:
    """The fake uses the real table: a wrong state raises before anything is noted."""
    run = FakeRun()
    run.state = admin.RUN_STATE_FAILED
    with pytest.raises(WrongStateError):
        await run.pause("x")
    assert run.reasons == []


LATE = ("FAILED_PRECONDITION", "; the request remains in effect")


@pytest.mark.parametrize(
    ("method", "asked", "code", "said"),
    [
        ("restore_points", admin.ListRestorePointsRequest(), "UNAVAILABLE", "did not answer within"),
        ("incidents", admin.ListIncidentsRequest(), "UNAVAILABLE", "did not answer within"),
        (
            "create_checkpoint",
            admin.CreateCheckpointRequest(request_id="1", reason="r"),
            "FAILED_PRECONDITION",
            "stands",
        ),
        ("trigger_rollback", admin.TriggerRollbackRequest(request_id="1", reason="r"), "FAILED_PRECONDITION", "stands"),
    ],
)
async def test_no_call_about_going_back_waits_for_ever(
    method: str, asked: Message, code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind each is a bound, also where the client has none, and an error that says what did not happen."""
    for bound in ("READ_S_MAX", "CHECKPOINT_TIMEOUT_S", "ROLLBACK_TIMEOUT_S"):
        monkeypatch.setattr(recovery, bound, 0.05)

    async def never(_asked: object = None) -> Message:
        await anyio.sleep_forever()
        return asked

    async with served() as it:
        monkeypatch.setattr(it.run, method, never)
        call = getattr(it.stub, type(asked).__name__.removesuffix("Request"))
        with anyio.fail_after(10), pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(asked)
    assert caught.value.code().name == code
    assert said in str(caught.value.details())
