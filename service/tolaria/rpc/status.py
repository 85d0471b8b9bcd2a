"""How errors leave as gRPC statuses: one table, with google.rpc details. Must not know which call failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tolaria.errors import (
    BindError,
    BreakerOpenError,
    CallRefusedError,
    CheckpointError,
    CheckpointWriteError,
    ClearanceRefusedError,
    CommandRejectedError,
    ConfigurationError,
    IllegalEmergencyEventError,
    ImageDamagedError,
    InvalidFieldError,
    JobError,
    JournalError,
    LaneError,
    NoCheckpointError,
    NotImplementedYetError,
    PeerTimeoutError,
    PeerUnavailableError,
    ProfileFailedError,
    RestoreAbandonedError,
    RestoreUnprovenError,
    StateMismatchError,
    StateUnsupportedError,
    TolariaError,
    UnknownLevelError,
    WrongStateError,
)

DOMAIN = "tolaria"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status code (google.rpc.Code) and the stable reason that goes into ErrorInfo."""

    code: int
    reason: str


# The first class that an error is an instance of decides; special before general.
ANSWERS: tuple[tuple[type[TolariaError], Answer], ...] = (
    (InvalidFieldError, Answer(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD")),
    (WrongStateError, Answer(code_pb2.FAILED_PRECONDITION, "WRONG_STATE")),
    (UnknownLevelError, Answer(code_pb2.INVALID_ARGUMENT, "UNKNOWN_LEVEL")),
    (IllegalEmergencyEventError, Answer(code_pb2.FAILED_PRECONDITION, "NO_SUCH_EMERGENCY")),
    (ClearanceRefusedError, Answer(code_pb2.FAILED_PRECONDITION, "CLEARANCE_REFUSED")),
    (ProfileFailedError, Answer(code_pb2.RESOURCE_EXHAUSTED, "PROFILE_NOT_WRITTEN")),
    (NotImplementedYetError, Answer(code_pb2.UNIMPLEMENTED, "NOT_IMPLEMENTED")),
    (CommandRejectedError, Answer(code_pb2.INVALID_ARGUMENT, "COMMAND_REJECTED")),
    (PeerTimeoutError, Answer(code_pb2.DEADLINE_EXCEEDED, "PEER_TIMEOUT")),
    (BreakerOpenError, Answer(code_pb2.UNAVAILABLE, "BREAKER_OPEN")),
    (CallRefusedError, Answer(code_pb2.UNAVAILABLE, "CALL_REFUSED")),
    (PeerUnavailableError, Answer(code_pb2.UNAVAILABLE, "PEER_UNAVAILABLE")),
    (LaneError, Answer(code_pb2.ABORTED, "LANE_ENDED")),
    (NoCheckpointError, Answer(code_pb2.NOT_FOUND, "NO_RESTORE_POINT")),
    (RestoreAbandonedError, Answer(code_pb2.DEADLINE_EXCEEDED, "ROLLBACK_DEADLINE")),
    (RestoreUnprovenError, Answer(code_pb2.DATA_LOSS, "RESTORE_UNPROVEN")),
    (ImageDamagedError, Answer(code_pb2.DATA_LOSS, "IMAGE_DAMAGED")),
    (StateMismatchError, Answer(code_pb2.FAILED_PRECONDITION, "STATE_MISMATCH")),
    (StateUnsupportedError, Answer(code_pb2.FAILED_PRECONDITION, "STATE_UNSUPPORTED")),
    (CheckpointWriteError, Answer(code_pb2.RESOURCE_EXHAUSTED, "CHECKPOINT_NOT_WRITTEN")),
    (CheckpointError, Answer(code_pb2.DATA_LOSS, "CHECKPOINT_DAMAGED")),
    (JournalError, Answer(code_pb2.UNAVAILABLE, "JOURNAL_UNAVAILABLE")),
    (BindError, Answer(code_pb2.UNAVAILABLE, "BIND")),
    (ConfigurationError, Answer(code_pb2.INVALID_ARGUMENT, "CONFIGURATION")),
    (JobError, Answer(code_pb2.FAILED_PRECONDITION, "JOB")),
    (TolariaError, Answer(code_pb2.UNKNOWN, "TOLARIA")),
)


def status_of(error: TolariaError) -> status_pb2.Status:
    """The google.rpc.Status for `error`: ErrorInfo always, BadRequest with the field where one is to blame."""
    answer = next(answer for kind, answer in ANSWERS if isinstance(error, kind))
    status = status_pb2.Status(code=answer.code, message=str(error))
    _attach(status, error_details_pb2.ErrorInfo(reason=answer.reason, domain=DOMAIN))
    if isinstance(error, InvalidFieldError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    return status


async def abort(context: grpc.aio.ServicerContext[object, object], error: TolariaError) -> NoReturn:
    """End the call with the status of `error`."""
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")


def _attach(status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
