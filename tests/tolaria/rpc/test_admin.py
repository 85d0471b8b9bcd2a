from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
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
from leyline.v1.enums_pb2 import (
    EMERGENCY_LEVEL_HALT,
    EMERGENCY_LEVEL_UNSPECIFIED,
    ROLLBACK_TIER_FAST,
    EmergencyLevel,
    RollbackTier,
)
from support.admin import SERVICE, MemoryJournal, serving_parts, stub_of
from tolaria.config import TelemetrySettings
from tolaria.emergency import Acknowledgement, EmergencyState
from tolaria.emergency.protocol import require_level
from tolaria.errors import (
    CheckpointWriteError,
    ConfigurationError,
    IllegalEmergencyEventError,
    InvalidFieldError,
    NoCheckpointError,
    UnknownGroupError,
    WrongStateError,
)
from tolaria.journal.rows import CheckpointRow, Incident
from tolaria.lane.messages import TraceWritten
from tolaria.rollback.protocol import Ending, Rollback
from tolaria.rpc import admin as rpc_admin
from tolaria.rpc.admin import AdminParts
from tolaria.rpc.audit import AuditTrail
from tolaria.rpc.requests import RequestLedger
from tolaria.run.data_skips import DataSkip
from tolaria.run.profiling import ProfileTaken
from tolaria.run.restore_points import RestorePoints
from tolaria.run.run import TrainingRun
from tolaria.run.run_state import RunEvent, after
from tolaria.run.safety import Safety
from tolaria.run.status import RunStatus
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.subscriptions import TelemetryStream
from tolaria.values.optimization import Adjustment
from tolaria.values.training import BatchRange

if TYPE_CHECKING:
    from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceAsyncStub  # in the type stubs only

pytestmark = pytest.mark.anyio

COMMITTED = CheckpointRow("c3", 1, "run", 3, 1, 300, "digest", None)


def new_status() -> RunStatus:
    """Returns the status of a run at step 7."""
    status = RunStatus("run", "job", "test", epochs=1, started_at_s=0.0)
    status.state, status.global_step = admin.RUN_STATE_RUNNING, 7
    return status


class FakeRun:
    """A run without training: the real state machine, and operations that succeed or fail by their arguments."""

    def __init__(self, status: RunStatus) -> None:
        self.state = status
        self.reasons: list[str] = []
        self.rollbacks: list[Rollback] = []
        self.adjustments: list[Adjustment] = []

    @property
    def global_step(self) -> int:
        return self.state.global_step

    def status(self) -> admin.GetStatusResponse:
        return admin.GetStatusResponse(run_id="run", state=self.state.state, global_step=self.global_step)

    async def pause(self, reason: str) -> None:
        self._enter(RunEvent.PAUSED, reason)

    async def resume(self, reason: str) -> None:
        self._enter(RunEvent.RESUMED, reason)

    async def stop(self, reason: str) -> None:
        self._enter(RunEvent.FINISHED, reason)

    @property
    def skips(self) -> FakeRun:
        """The data that are left out: none at first."""
        return self

    all = ()

    def ranges_of_steps(self, first: int, last: int) -> tuple[BatchRange, ...]:
        return (BatchRange(1, first, last),)

    def passed(self, skip: DataSkip) -> int:
        return 0

    async def skip_data(
        self, skip_id: str, reason: str, ranges: tuple[BatchRange, ...], steps: tuple[int, int] | None = None
    ) -> DataSkip:
        return DataSkip(skip_id, 1, reason, ranges, steps)

    async def stop_skipping(self, skip_id: str) -> DataSkip:
        raise InvalidFieldError("remove", f"there is no skip {skip_id}")

    def require_adjustable(self) -> None:
        after(self.state.state, RunEvent.FINISHED)

    async def adjust_learning_rate(self, adjustment: Adjustment) -> int:
        """Knows the group "host" only."""
        self.adjustments.append(adjustment)
        if adjustment.group not in {None, "host"}:
            raise UnknownGroupError(adjustment.group or "", ("host",))
        return self.global_step

    async def roll_back(self, rollback: Rollback) -> Rollback:
        """Restores any target up to step 7."""
        self.rollbacks.append(rollback)
        if (rollback.target_step or 0) > 7:
            raise NoCheckpointError("nothing to go back to")
        rollback.restored_step = rollback.destination
        rollback.state_digest = rollback.expected_digest = "digest"
        rollback.left_step, rollback.left_checkpoint_id, rollback.kept_ms = 7, "c7", 2.5
        rollback.end(Ending.RESTORED)
        return rollback

    async def checkpoint(self, reason: str) -> CheckpointRow:
        """Fails for the reason "full"."""
        if reason == "full":
            raise CheckpointWriteError("write", "ENOSPC", reason)
        return COMMITTED

    async def capture_profile(self, active_steps: int, rank: int = 0) -> ProfileTaken:
        """Writes a file with the number of steps as its name."""
        return ProfileTaken(9, TraceWritten(f"{active_steps}.json", 10, active_steps, 0.1, 0))

    def _enter(self, event: RunEvent, reason: str) -> None:
        self.state.state = after(self.state.state, event)
        self.reasons.append(reason)
        self.state.feed.changed()


class FakeSafety:
    """Safety with one reason for conservative mode that stays, and an emergency that is acknowledged at once."""

    def __init__(self) -> None:
        self.level: EmergencyLevel.ValueType = EMERGENCY_LEVEL_UNSPECIFIED

    @property
    def controller(self) -> SimpleNamespace:
        return SimpleNamespace(state=EmergencyState(level=self.level))

    def set_conservative(self, *, enabled: bool) -> tuple[str, ...]:
        """The breaker stays open."""
        return ("operator", "breaker_open:tamiyo") if enabled else ("breaker_open:tamiyo",)

    async def raise_emergency(self, level: EmergencyLevel.ValueType, reason: str, status: RunStatus) -> EmergencyState:
        """Raises it."""
        del reason, status
        require_level(level)
        self.level = level
        return EmergencyState(level=level, acknowledgements=(Acknowledgement("tolaria", 1_500_000),))

    def clear_emergency(self, reason: str) -> None:
        """Clears it if there is one."""
        if not self.level:
            raise IllegalEmergencyEventError("there is none")
        self.level = EMERGENCY_LEVEL_UNSPECIFIED


class Served:
    """The admin service around a fake run, and a client of it."""

    def __init__(self) -> None:
        self.status = new_status()
        self.run = FakeRun(self.status)
        self.journal = MemoryJournal()
        self.closing = anyio.Event()
        self.telemetry = TelemetryStream(TelemetrySettings(), Metrics())
        self.reloads: list[str] = []
        self.channel: grpc.aio.Channel
        self.stub: TolariaAdminServiceAsyncStub

    async def reload(self, origin: str) -> admin.ReloadConfigResponse:
        """Finds one change; of the third file the settings are wrong."""
        self.reloads.append(origin)
        if len(self.reloads) == 3:
            raise ConfigurationError(["checkpoint.keep_last: is no number (tolaria.toml)"])
        return admin.ReloadConfigResponse(changed=[admin.SettingChange(name="checkpoint.keep_last")])


@asynccontextmanager
async def served(interval_s: float = 60.0) -> AsyncIterator[Served]:
    """Serves the admin service around a fake run."""

    def complete(status: admin.GetStatusResponse) -> None:
        status.metrics_address = "m"

    it = Served()
    async with anyio.create_task_group() as operations:
        parts = AdminParts(
            run=cast("TrainingRun", it.run),
            status=it.status,
            points=RestorePoints(),
            safety=cast("Safety", FakeSafety()),
            journal=it.journal,
            ledger=RequestLedger(100, it.journal, it.status, operations),
            audit=AuditTrail(it.journal, it.status),
            complete=complete,
            closing=it.closing,
            interval_s=interval_s,
            state_dir=Path("unused"),
            telemetry=it.telemetry,
            reload=it.reload,
        )
        async with serving_parts(parts) as it.channel:
            it.stub = stub_of(it.channel)
            yield it
        operations.cancel_scope.cancel()


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Returns the stable reason in an error's details."""
    # The library expects a call; an error of grpc.aio has the three methods that it uses.
    status = rpc_status.from_call(cast("grpc.Call", error))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    reason: str = info.reason
    return reason


async def test_the_service_completes_the_status_of_the_run() -> None:
    """GetStatus is the run's message with the service's own fields."""
    async with served() as it:
        status = await it.stub.GetStatus(admin.GetStatusRequest())
    assert (status.run_id, status.global_step, status.metrics_address) == ("run", 7, "m")


async def test_pause_resume_and_stop_return_step_and_state() -> None:
    """Each answer has the step at which the request took effect, and the new state."""
    async with served() as it:
        paused = await it.stub.PauseTraining(admin.PauseTrainingRequest(request_id="1", reason="look"))
        resumed = await it.stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="2", reason="fine"))
        stopped = await it.stub.StopTraining(admin.StopTrainingRequest(request_id="3", reason="enough"))
    assert [a.state for a in (paused, resumed, stopped)] == [
        admin.RUN_STATE_PAUSED, admin.RUN_STATE_RUNNING, admin.RUN_STATE_FINISHED,
    ]  # fmt: skip
    assert {a.global_step for a in (paused, resumed, stopped)} == {7}
    assert it.run.reasons == ["look", "fine", "enough"]


async def test_the_answer_has_the_remaining_reasons_for_conservative_mode() -> None:
    """Switching the mode off leaves reasons whose cause persists."""
    async with served() as it:
        on = await it.stub.SetConservativeMode(
            admin.SetConservativeModeRequest(request_id="1", reason="look", enabled=True)
        )
        off = await it.stub.SetConservativeMode(admin.SetConservativeModeRequest(request_id="2", reason="fine"))
    assert list(on.conservative_reasons) == ["operator", "breaker_open:tamiyo"]
    assert list(off.conservative_reasons) == ["breaker_open:tamiyo"]
    assert on.global_step == 7


async def test_an_emergency_is_raised_acknowledged_and_cleared() -> None:
    """The answer has the level and each acknowledgement with its latency; after the clearance there is no level."""
    async with served() as it:
        raised = await it.stub.RaiseEmergency(
            admin.RaiseEmergencyRequest(request_id="1", reason="smoke", level=EMERGENCY_LEVEL_HALT)
        )
        cleared = await it.stub.ClearEmergency(admin.ClearEmergencyRequest(request_id="2", reason="no smoke"))
    assert (raised.level, raised.global_step) == (EMERGENCY_LEVEL_HALT, 7)
    assert [(a.participant, a.latency_ms) for a in raised.acknowledgements] == [("tolaria", 1.5)]
    assert cleared.level == EMERGENCY_LEVEL_UNSPECIFIED


async def test_invalid_emergency_requests_are_refused() -> None:
    """An unknown level is an invalid argument; a clearance without an emergency does not fit the state."""
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
    """The same request_id gets the first answer, although the run has moved on."""
    async with served() as it:
        request = admin.PauseTrainingRequest(request_id="1", reason="look")
        first = await it.stub.PauseTraining(request)
        it.status.global_step = 99
        assert await it.stub.PauseTraining(request) == first
    assert it.run.reasons == ["look"]


async def test_a_request_that_does_not_fit_the_state_is_refused() -> None:
    """FAILED_PRECONDITION with a stable reason, and nothing has changed."""
    async with served() as it:
        it.status.state = admin.RUN_STATE_FINISHED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="1", reason="x"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(caught.value) == "WRONG_STATE"
    assert it.run.reasons == []


async def test_a_missing_reason_is_an_invalid_field() -> None:
    """INVALID_ARGUMENT names the field."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match="reason: must not be empty") as caught:
            await it.stub.PauseTraining(admin.PauseTrainingRequest(request_id="1"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_FIELD"


async def test_learning_rates_are_adjusted() -> None:
    """The request reaches the run with all its fields, once."""
    async with served() as it:
        request = admin.AdjustLearningRateRequest(
            request_id="a", reason="calm", group="host", factor=0.5, expires_after_steps=9
        )
        for _ in range(2):
            assert (await it.stub.AdjustLearningRate(request)).global_step == 7
    assert it.run.adjustments == [
        Adjustment(
            group="host",
            factor=0.5,
            value=None,
            expires_after_steps=9,
            origin="operator",
            request_id="a",
            reason="calm",
        )
    ]


@pytest.mark.parametrize(
    ("fields", "field"), [({}, "value"), ({"value": -1.0}, "value"), ({"factor": 0.5, "group": "head"}, "group")]
)
async def test_an_invalid_adjustment_names_the_field(fields: dict[str, float], field: str) -> None:
    """A missing or negative rate and an unknown group are invalid arguments."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
            await it.stub.AdjustLearningRate(
                admin.AdjustLearningRateRequest(request_id="a", reason="r", **fields)  # type: ignore[arg-type]
            )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_FIELD"


async def test_an_ended_run_refuses_also_an_invalid_adjustment_for_its_state() -> None:
    """The state is checked before the fields."""
    async with served() as it:
        it.status.state = admin.RUN_STATE_FINISHED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.AdjustLearningRate(admin.AdjustLearningRateRequest(request_id="a", reason="r"))
    assert reason_of(caught.value) == "WRONG_STATE"


async def test_a_rollback_is_carried_out_once_and_answered() -> None:
    """The request reaches the run with its fields; the answer has what was restored."""
    async with served() as it:
        request = admin.TriggerRollbackRequest(request_id="a", reason="r", tier=ROLLBACK_TIER_FAST, target_step=5)
        for _ in range(2):
            back = await it.stub.TriggerRollback(request)
            assert (back.restored_step, back.tier, back.rollback_id) == (5, ROLLBACK_TIER_FAST, "a")
            assert back.state_digest == back.expected_digest == "digest"
            assert (back.left_step, back.left_checkpoint_id, back.left_not_kept, back.kept_ms) == (7, "c7", "", 2.5)
    (rollback,) = it.run.rollbacks
    assert (rollback.reason, rollback.origin) == ("r", "operator")


async def test_a_long_request_id_fits_on_the_board() -> None:
    """The rollback_id has at most 64 bytes."""
    async with served() as it:
        back = await it.stub.TriggerRollback(admin.TriggerRollbackRequest(request_id="long" * 32, reason="r"))
    assert 0 < len(back.rollback_id) <= 64


async def test_a_rollback_whose_caller_goes_away_is_one_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is cancelled, the repeat waits for the same rollback; another target is another request."""
    async with served() as it:
        proceed, roll_back = anyio.Event(), it.run.roll_back

        async def slow(rollback: Rollback) -> Rollback:
            await proceed.wait()
            return await roll_back(rollback)

        monkeypatch.setattr(it.run, "roll_back", slow)
        request = admin.TriggerRollbackRequest(request_id="a", reason="r", target_step=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.TriggerRollback(request, timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        proceed.set()
        assert (await it.stub.TriggerRollback(request)).restored_step == 5
        request.target_step = 3
        with pytest.raises(grpc.aio.AioRpcError, match="request_id"):
            await it.stub.TriggerRollback(request)
    assert len(it.run.rollbacks) == 1


async def test_checkpoints_and_profiles_are_answered() -> None:
    """The answers have what identifies the checkpoint and the trace."""
    async with served() as it:
        made = await it.stub.CreateCheckpoint(admin.CreateCheckpointRequest(request_id="c", reason="r"))
        profile = await it.stub.CaptureProfile(admin.CaptureProfileRequest(request_id="p", reason="r", active_steps=4))
    assert (made.global_step, made.checkpoint_id, made.digest, made.size_bytes) == (3, "c3", "digest", 300)
    assert (profile.global_step, profile.path, profile.size_bytes) == (9, "4.json", 10)


async def test_restore_points_are_listed() -> None:
    """They are the journal's committed checkpoints and the snapshots in memory."""
    async with served() as it:
        it.journal.checkpoints = (COMMITTED,)
        points = await it.stub.ListRestorePoints(admin.ListRestorePointsRequest())
    assert [point.global_step for point in points.restore_points] == [3]


@pytest.mark.parametrize(("limit", "listed"), [(0, 100), (1, 1), (1000, 1000)])
async def test_the_number_of_incidents_is_bounded(limit: int, listed: int) -> None:
    """Without a limit there are at most 100."""
    async with served() as it:
        it.journal.listed = (Incident("i", "rollback", 1, 1, "odd", {}),) * 2000
        answer = await it.stub.ListIncidents(admin.ListIncidentsRequest(limit=limit))
    assert len(answer.incidents) == listed
    assert it.journal.limits == [listed]


async def test_calls_that_change_something_are_listed() -> None:
    """Repeats and refusals too, newest first; the limit applies."""
    async with served() as it:
        for _ in range(2):
            await it.stub.PauseTraining(admin.PauseTrainingRequest(request_id="p", reason="look"))
        with pytest.raises(grpc.aio.AioRpcError):
            await it.stub.StopTraining(admin.StopTrainingRequest(request_id="s"))
        listed = (await it.stub.ListAdminCalls(admin.ListAdminCallsRequest())).calls
        assert len((await it.stub.ListAdminCalls(admin.ListAdminCallsRequest(limit=2))).calls) == 2
        with pytest.raises(grpc.aio.AioRpcError, match="limit"):
            await it.stub.ListAdminCalls(admin.ListAdminCallsRequest(limit=1001))
    assert [(call.method, call.request_id, call.reason, call.outcome) for call in listed] == [
        ("StopTraining", "s", "", "INVALID_ARGUMENT"),
        ("PauseTraining", "p", "look", "OK"),
        ("PauseTraining", "p", "look", "OK"),
    ]
    assert {call.caller for call in listed} == {"anonymous"}


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
            admin.CreateCheckpointRequest(request_id="a", reason="full"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "ENOSPC",
        ),
        ("ListIncidents", admin.ListIncidentsRequest(limit=1001), grpc.StatusCode.INVALID_ARGUMENT, "limit"),
    ],
)
async def test_refused_calls_have_a_code_and_a_message(
    method: str, request_: object, code: grpc.StatusCode, words: str
) -> None:
    """The code is the kind of reason, the message the reason."""
    async with served() as it:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await getattr(it.stub, method)(request_)
    assert caught.value.code() is code


async def test_a_watch_sends_every_change_at_once_and_ends_with_the_service() -> None:
    """The status now, one after a change, and the last one when the service closes."""
    async with served() as it:
        states = []
        with anyio.fail_after(180):
            async for answer in it.stub.WatchStatus(admin.WatchStatusRequest()):
                states.append(answer.status.state)
                if len(states) == 1:
                    await it.run.pause("look")
                elif len(states) == 2:
                    it.closing.set()
                    it.status.feed.changed()
    assert states == [admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_PAUSED]


async def test_a_watch_sends_the_status_at_its_interval() -> None:
    """Between changes there is one message for each interval, which is not shorter than the client's."""
    async with served(interval_s=0.01) as it:
        with anyio.fail_after(180):
            count = 0
            async for _ in it.stub.WatchStatus(admin.WatchStatusRequest(interval_ms=20)):
                count += 1
                if count == 4:
                    break
    assert count == 4


METHODS = [method.name for method in SERVICE.methods if not method.server_streaming]


@given(calls=st.lists(st.tuples(st.sampled_from(METHODS), st.binary(max_size=40)), max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_never_crash_the_server(calls: list[tuple[str, bytes]]) -> None:
    """For every method the answer is a response or an error of the caller."""
    crashes = []

    async def send() -> None:
        async with served() as it:
            for method, raw in calls:
                path = f"/{SERVICE.full_name}/{method}"
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = it.channel.unary_unary(path)
                try:
                    await call(raw, timeout=5)
                except grpc.aio.AioRpcError as error:
                    if error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}:
                        crashes.append(f"{method}: {error.details()}")
            await it.stub.GetStatus(admin.GetStatusRequest(), timeout=5)

    anyio.run(send)
    assert crashes == []


async def test_the_fake_run_refuses_what_a_run_refuses() -> None:
    """It uses the real state machine: an event that does not fit the state raises and changes nothing."""
    status = new_status()
    status.state = admin.RUN_STATE_FAILED
    run = FakeRun(status)
    with pytest.raises(WrongStateError):
        await run.pause("x")
    assert run.reasons == []


LATE_READ = (grpc.StatusCode.UNAVAILABLE, "did not answer within")
LATE_EFFECT = (grpc.StatusCode.FAILED_PRECONDITION, "the request remains in effect")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (admin.ListRestorePointsRequest(), LATE_READ),
        (admin.ListIncidentsRequest(), LATE_READ),
        (admin.CreateCheckpointRequest(request_id="1", reason="r"), LATE_EFFECT),
        (admin.TriggerRollbackRequest(request_id="1", reason="r"), LATE_EFFECT),
    ],
)
async def test_long_calls_time_out(
    request_: Message, expected: tuple[grpc.StatusCode, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a deadline of the client; the error says what has not happened."""
    for bound in ("READ_S", "CHECKPOINT_S", "ROLLBACK_S"):
        monkeypatch.setattr(rpc_admin, bound, 0.05)

    async def never(_argument: object) -> None:
        await anyio.sleep_forever()

    async with served() as it:
        it.journal.hangs = True
        for method in ("checkpoint", "roll_back"):
            monkeypatch.setattr(it.run, method, never)
        call: Callable[[Message], grpc.aio.UnaryUnaryCall[Message, Message]]
        call = getattr(it.stub, type(request_).__name__.removesuffix("Request"))
        with anyio.fail_after(180), pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request_)
    assert caught.value.code() is expected[0]
    assert expected[1] in str(caught.value.details())


async def test_settings_are_read_again_once_for_each_request() -> None:
    """The answer of a repeat is the first one; a wrong file is an error that names the setting; both are audited."""
    async with served() as it:
        first = await it.stub.ReloadConfig(admin.ReloadConfigRequest(request_id="1", reason="more"))
        again = await it.stub.ReloadConfig(admin.ReloadConfigRequest(request_id="1", reason="more"))
        assert (first.changed[0].name, first.global_step) == ("checkpoint.keep_last", it.status.global_step)
        assert again == first
        await it.stub.ReloadConfig(admin.ReloadConfigRequest(request_id="2", reason="more"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.ReloadConfig(admin.ReloadConfigRequest(request_id="3", reason="wrong"))
        assert "checkpoint.keep_last: is no number" in (caught.value.details() or "")
        assert it.reloads == ["anonymous"] * 3
        calls = {call.request_id: call for call in it.journal.calls.values()}
        assert [calls[name].outcome for name in "123"] == ["OK", "OK", "INVALID_ARGUMENT"]


async def test_a_service_that_stops_takes_no_further_operation() -> None:
    """UNAVAILABLE with the reason; reads, repeats and a halt are answered, and nothing else has happened."""
    async with served() as it:
        pause = admin.PauseTrainingRequest(request_id="1", reason="look")
        await it.stub.PauseTraining(pause)
        stopped = await it.stub.Shutdown(admin.ShutdownRequest(request_id="2", reason="new kernel"))
        assert stopped.state == admin.RUN_STATE_DRAINING
        assert it.status.draining == "new kernel (Shutdown by anonymous)"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.ResumeTraining(admin.ResumeTrainingRequest(request_id="3", reason="go on"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "DRAINING"
        assert "the service is stopping: new kernel" in (caught.value.details() or "")
        assert it.run.reasons == ["look"]
        assert (await it.stub.PauseTraining(pause)).state == admin.RUN_STATE_PAUSED
        await it.stub.GetStatus(admin.GetStatusRequest())
        halt = admin.RaiseEmergencyRequest(request_id="4", reason="fire", level=EmergencyLevel.EMERGENCY_LEVEL_HALT)
        assert (await it.stub.RaiseEmergency(halt)).level == halt.level
