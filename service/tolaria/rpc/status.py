"""The gRPC status of each error: one table, with google.rpc details."""

from __future__ import annotations

from typing import Final, NoReturn

import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tolaria import errors
from tolaria.errors import TolariaError

DOMAIN: Final = "tolaria"

STATUSES: Final[tuple[tuple[type[TolariaError], int, str], ...]] = (
    (errors.InvalidFieldError, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD"),
    (errors.NotAuthenticatedError, code_pb2.UNAUTHENTICATED, "NOT_AUTHENTICATED"),
    (errors.NotPermittedError, code_pb2.PERMISSION_DENIED, "NOT_PERMITTED"),
    (errors.TooManyCallsError, code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
    (errors.ServiceDrainingError, code_pb2.UNAVAILABLE, "DRAINING"),
    (errors.WrongStateError, code_pb2.FAILED_PRECONDITION, "WRONG_STATE"),
    (errors.UnknownLevelError, code_pb2.INVALID_ARGUMENT, "UNKNOWN_LEVEL"),
    (errors.IllegalEmergencyEventError, code_pb2.FAILED_PRECONDITION, "NO_SUCH_EMERGENCY"),
    (errors.ClearanceRefusedError, code_pb2.FAILED_PRECONDITION, "CLEARANCE_REFUSED"),
    (errors.ProfileFailedError, code_pb2.RESOURCE_EXHAUSTED, "PROFILE_NOT_WRITTEN"),
    (errors.TooManySubscribersError, code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_SUBSCRIBERS"),
    (errors.SubscriberTooSlowError, code_pb2.RESOURCE_EXHAUSTED, "SUBSCRIBER_TOO_SLOW"),
    (errors.CommandRejectedError, code_pb2.INVALID_ARGUMENT, "COMMAND_REJECTED"),
    (errors.PeerTimeoutError, code_pb2.DEADLINE_EXCEEDED, "PEER_TIMEOUT"),
    (errors.BreakerOpenError, code_pb2.UNAVAILABLE, "BREAKER_OPEN"),
    (errors.CallRefusedError, code_pb2.UNAVAILABLE, "CALL_REFUSED"),
    (errors.PeerUnavailableError, code_pb2.UNAVAILABLE, "PEER_UNAVAILABLE"),
    (errors.LaneLostError, code_pb2.ABORTED, "LANE_LOST"),
    (errors.LaneError, code_pb2.ABORTED, "LANE_ENDED"),
    (errors.NoCheckpointError, code_pb2.NOT_FOUND, "NO_RESTORE_POINT"),
    (errors.ExportRefusedError, code_pb2.FAILED_PRECONDITION, "EXPORT_REFUSED"),
    (errors.ExportError, code_pb2.RESOURCE_EXHAUSTED, "EXPORT_NOT_WRITTEN"),
    (errors.RestoreAbandonedError, code_pb2.DEADLINE_EXCEEDED, "ROLLBACK_DEADLINE"),
    (errors.RestoreUnprovenError, code_pb2.DATA_LOSS, "RESTORE_UNPROVEN"),
    (errors.ImageDamagedError, code_pb2.DATA_LOSS, "IMAGE_DAMAGED"),
    (errors.StateMismatchError, code_pb2.FAILED_PRECONDITION, "STATE_MISMATCH"),
    (errors.StateUnsupportedError, code_pb2.FAILED_PRECONDITION, "STATE_UNSUPPORTED"),
    (errors.CheckpointWriteError, code_pb2.RESOURCE_EXHAUSTED, "CHECKPOINT_NOT_WRITTEN"),
    (errors.CheckpointError, code_pb2.DATA_LOSS, "CHECKPOINT_DAMAGED"),
    (errors.JournalError, code_pb2.UNAVAILABLE, "JOURNAL_UNAVAILABLE"),
    (errors.BindError, code_pb2.UNAVAILABLE, "BIND"),
    (errors.CredentialsError, code_pb2.FAILED_PRECONDITION, "CREDENTIALS"),
    (errors.ConfigurationError, code_pb2.INVALID_ARGUMENT, "CONFIGURATION"),
    (errors.JobError, code_pb2.FAILED_PRECONDITION, "JOB"),
    (errors.TolariaError, code_pb2.UNKNOWN, "TOLARIA"),
)
"""Status code (google.rpc.Code) and stable reason of each error; the first matching class applies."""


def status_of(error: TolariaError) -> status_pb2.Status:
    """Returns the google.rpc.Status for `error`: with ErrorInfo, and BadRequest if a field is invalid."""
    code, reason = next((code, reason) for kind, code, reason in STATUSES if isinstance(error, kind))
    status = status_pb2.Status(code=code, message=str(error))
    _attach(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if isinstance(error, errors.InvalidFieldError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    return status


async def abort(context: grpc.aio.ServicerContext[object, object], error: TolariaError) -> NoReturn:
    """Ends the call with the status of `error`."""
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")


def _attach(status: status_pb2.Status, detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
