"""A fake admin service over loopback gRPC, in threads, not on the event loop of the client under test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from leyline.v1.admin_service_pb2 import (
    CaptureProfileRequest,
    CaptureProfileResponse,
    CreateCheckpointRequest,
    CreateCheckpointResponse,
    ExportModelRequest,
    ExportModelResponse,
    GetStatusRequest,
    GetStatusResponse,
    Incident,
    ListIncidentsRequest,
    ListIncidentsResponse,
    ListRestorePointsRequest,
    ListRestorePointsResponse,
    PauseTrainingRequest,
    PauseTrainingResponse,
    ReloadConfigRequest,
    ReloadConfigResponse,
    RestorePoint,
    RunState,
    SettingChange,
    ShutdownRequest,
    ShutdownResponse,
    TriggerRollbackRequest,
    TriggerRollbackResponse,
    WatchStatusRequest,
    WatchStatusResponse,
)
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceServicer, add_TolariaAdminServiceServicer_to_server
from leyline.v1.enums_pb2 import CircuitBreakerState, RollbackTier, SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState

DIGEST = "0123456789abcdef0123456789abcdef"


class FakeAdmin(TolariaAdminServiceServicer):
    """Streams `statuses` and keeps the stream open unless `ends` is set; accepts a pause, and refuses to resume.

    A rollback answers with `restored_digest`, and with DIGEST as that of the capture. `timeout_s` is the
    timeout of the latest slow call.
    """

    def __init__(self, statuses: list[GetStatusResponse], *, ends: bool = False) -> None:
        self.statuses = statuses
        self.ends = ends
        self.silent = False
        self.hangs = threading.Event()
        self.requests: list[Any] = []
        self.restored_digest = DIGEST
        self.coordinated = True
        self.restore_points: list[RestorePoint] = []
        self.incidents: list[Incident] = []
        self.timeout_s = 0.0

    def GetStatus(self, request: GetStatusRequest, context: grpc.ServicerContext) -> GetStatusResponse:  # noqa: N802
        self.requests.append(request)
        if self.hangs.is_set():
            _until_cancelled(context)
        return self.statuses[-1]

    def WatchStatus(  # noqa: N802
        self, request: WatchStatusRequest, context: grpc.ServicerContext
    ) -> Iterator[WatchStatusResponse]:
        self.requests.append(request)
        if not self.silent:
            yield from (WatchStatusResponse(status=status) for status in self.statuses)
        if not self.ends:
            _until_cancelled(context)

    def PauseTraining(  # noqa: N802
        self, request: PauseTrainingRequest, context: grpc.ServicerContext
    ) -> PauseTrainingResponse:
        self.requests.append(request)
        if not request.reason:
            violation = error_details_pb2.BadRequest.FieldViolation(field="reason", description="must not be empty")
            detail = error_details_pb2.BadRequest(field_violations=[violation])
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid request", detail)
        return PauseTrainingResponse(global_step=41, state=RunState.RUN_STATE_PAUSED)

    def ResumeTraining(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        info = error_details_pb2.ErrorInfo(reason="WRONG_STATE", domain="tolaria")
        _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "the run is\nnot held\x1b[31m", info)

    def TriggerRollback(  # noqa: N802
        self, request: TriggerRollbackRequest, context: grpc.ServicerContext
    ) -> TriggerRollbackResponse:
        self._record(request, context)
        if request.reason == "too late":
            info = error_details_pb2.ErrorInfo(reason="ROLLBACK_DEADLINE", domain="tolaria")
            _refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "the restore was abandoned", info)
        return TriggerRollbackResponse(
            rollback_id="rollback-1",
            tier=request.tier or RollbackTier.ROLLBACK_TIER_FAST,
            restored_step=min(40, request.target_step) if request.HasField("target_step") else 40,
            state_digest=self.restored_digest,
            expected_digest=DIGEST,
            latency_ms=12.34,
            global_step=57,
            coordinated=self.coordinated,
            waited_ms=700.0,
            restored_ms=12.34,
            superseded=2,
            attempt=3,
            chosen="the newest proven one: the snapshot",
            left_step=57,
            left_checkpoint_id="" if request.reason == "no room" else "000000000057-0badcafe",
            left_not_kept="the disk is\nfull" if request.reason == "no room" else "",
            kept_ms=31.4,
            left_kept_until=None if request.reason == "no room" else Timestamp(seconds=1_800_000_000),
            superseded_kept=2,
        )

    def CreateCheckpoint(  # noqa: N802
        self, request: CreateCheckpointRequest, context: grpc.ServicerContext
    ) -> CreateCheckpointResponse:
        self._record(request, context)
        return CreateCheckpointResponse(
            global_step=57, checkpoint_id="000000000057-0badcafe", digest=DIGEST, size_bytes=1_572_864
        )

    def CaptureProfile(  # noqa: N802
        self, request: CaptureProfileRequest, context: grpc.ServicerContext
    ) -> CaptureProfileResponse:
        self._record(request, context)
        return CaptureProfileResponse(global_step=62, path="/state/traces/trace-1.json", size_bytes=2048)

    def ReloadConfig(  # noqa: N802
        self, request: ReloadConfigRequest, context: grpc.ServicerContext
    ) -> ReloadConfigResponse:
        self._record(request, context)
        return ReloadConfigResponse(
            global_step=57,
            changed=[SettingChange(name="checkpoint.keep_last", before="3", after="5")],
            waiting=[SettingChange(name="training.epochs", before="20", after="30")],
            notices=["rollback.loss_factor is retired and has no effect: remove it"],
        )

    def Shutdown(  # noqa: N802
        self, request: ShutdownRequest, context: grpc.ServicerContext
    ) -> ShutdownResponse:
        self._record(request, context)
        if request.reason == "again":
            info = error_details_pb2.ErrorInfo(reason="DRAINING", domain="tolaria")
            _refuse(context, grpc.StatusCode.UNAVAILABLE, "the service is stopping: SIGTERM", info)
        return ShutdownResponse(global_step=57, state=RunState.RUN_STATE_DRAINING)

    def ExportModel(  # noqa: N802
        self, request: ExportModelRequest, context: grpc.ServicerContext
    ) -> ExportModelResponse:
        self._record(request, context)
        card = (
            '{"version": 1, "format": "torch", "run_id": "r", "checkpoint_id": "c1", "global_step": 57, "epoch": 2, '
            '"created_at": "", "digest": "d", "metrics": {"loss": 0.5}, "evaluated_step": 57, "seeds": [], '
            '"slots": {}, "tied": {}, "weights": ["model.pt"], "left_out": []}'
        )
        return ExportModelResponse(global_step=62, path="/state/exports/mine", checkpoint_id="c1", card=card)

    def ListRestorePoints(  # noqa: N802
        self, request: ListRestorePointsRequest, context: grpc.ServicerContext
    ) -> ListRestorePointsResponse:
        return ListRestorePointsResponse(restore_points=self.restore_points)

    def ListIncidents(  # noqa: N802
        self, request: ListIncidentsRequest, context: grpc.ServicerContext
    ) -> ListIncidentsResponse:
        self.requests.append(request)
        return ListIncidentsResponse(incidents=self.incidents[: request.limit or None])

    def _record(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.timeout_s = context.time_remaining() or 0.0


def fake_admin(statuses: list[GetStatusResponse], *, ends: bool = False) -> FakeAdmin:
    """Returns a fake that refuses all other calls as unimplemented."""
    return FakeAdmin(statuses, ends=ends)  # type: ignore[abstract] # abstract in the stub only


@contextmanager
def serving(admin: FakeAdmin, listen: str = "127.0.0.1:0") -> Iterator[str]:
    """Serves `admin`; yields its address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    add_TolariaAdminServiceServicer_to_server(admin, server)
    port = server.add_insecure_port(listen)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@contextmanager
def serving_nothing() -> Iterator[str]:
    """Yields the address of a gRPC server without any service."""
    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def status_of(epoch: int, *, state: int = RunState.RUN_STATE_RUNNING, epochs: int = 3) -> GetStatusResponse:
    """Returns the status of a run of 45 steps per epoch at the beginning of `epoch`."""
    return GetStatusResponse(
        run_id="run-1",
        state=state,  # type: ignore[arg-type] # a plain number, such as a newer service could send
        job="digits",
        epoch=epoch,
        epochs=epochs,
        epoch_step=45 if state == RunState.RUN_STATE_FINISHED else 0,
        steps_per_epoch=45,
        global_step=45 * (epoch if state == RunState.RUN_STATE_FINISHED else epoch - 1),
        training_loss=1.0 / epoch,
        validation_loss=0.5 / epoch,
        validation_accuracy=0.9 + epoch / 100,
        last_boundary_ms=4.25,
        boundary_ms_p50=4.0,
        boundary_ms_p99=6.5,
        boundary_budget_ms=25.0,
        tamiyo_answer=f"germinate after epoch {epoch - 1}",
        kasmina_answer="germinated [bold]seed-1",
        commands_accepted=2,
        commands_rejected=1,
        rollbacks=1,
        learning_rates={"host": 0.001},
        breakers={"tamiyo": CircuitBreakerState.CIRCUIT_STATE_CLOSED},
        seeds=[SeedState(seed_id="seed-1", stage=SeedLifecycleStage.SEED_STAGE_TRAINING, blueprint_id="conv")],
        metrics_address="127.0.0.1:9464",
        version="0.1.0",
    )


def whole_run() -> list[GetStatusResponse]:
    """Returns statuses of three epochs and of the finished run."""
    return [status_of(1), status_of(2), status_of(3), status_of(3, state=RunState.RUN_STATE_FINISHED)]


def run_with_a_seed() -> list[GetStatusResponse]:
    """Returns the same statuses with the stages of a seed that is fossilized."""
    stages = [
        SeedLifecycleStage.SEED_STAGE_GERMINATED,
        SeedLifecycleStage.SEED_STAGE_BLENDING,
        SeedLifecycleStage.SEED_STAGE_PROBATIONARY,
        SeedLifecycleStage.SEED_STAGE_FOSSILIZED,
    ]
    statuses = whole_run()
    for status, stage in zip(statuses, stages, strict=True):
        status.seeds[0].stage = stage
    return statuses


def restore_points(now_s: int) -> list[RestorePoint]:
    """Returns a restore point on disk, two hours old, and a new one in memory."""
    return [
        RestorePoint(
            tier=RollbackTier.ROLLBACK_TIER_FULL,
            global_step=45,
            epoch=1,
            size_bytes=1_572_864,
            digest=DIGEST,
            created_at=Timestamp(seconds=now_s - 7300),
            checkpoint_id="000000000045-0badcafe",
            stable=True,
            attempt=1,
        ),
        RestorePoint(
            tier=RollbackTier.ROLLBACK_TIER_FAST,
            global_step=57,
            epoch=2,
            size_bytes=1_572_864,
            digest=DIGEST[::-1],
            created_at=Timestamp(seconds=now_s),
            suspect=True,
            attempt=2,
        ),
    ]


def two_incidents() -> list[Incident]:
    """Returns unsorted incidents, with text that contains terminal control sequences."""
    return [
        Incident(
            incident_id="f1",
            kind="checkpoint_failed",
            occurred_at=Timestamp(seconds=1_800_000_000),
            global_step=45,
            reason="no space\nleft \x1b[2J[bold]here",
            details={"stage": "write"},
        ),
        Incident(
            incident_id="r1",
            kind="rollback",
            occurred_at=Timestamp(seconds=1_800_000_060, nanos=5),
            global_step=57,
            reason="loss exploded",
            details={
                "tier": "FAST",
                "outcome": "restored",
                "restored_step": "40",
                "cleared": "",
                "state_digest": DIGEST,
                "expected_digest": DIGEST,
            },
        ),
    ]


def _until_cancelled(context: grpc.ServicerContext) -> None:
    over = threading.Event()
    if context.add_callback(over.set):
        over.wait()


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
    context.abort_with_status(rpc_status.to_status(status))
