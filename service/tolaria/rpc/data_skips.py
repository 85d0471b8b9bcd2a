"""Requests about data that training leaves out, and their answers."""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import InvalidFieldError
from tolaria.run.data_skips import DataSkip, DataSkips, new_skip_id
from tolaria.run.run import TrainingRun
from tolaria.values.training import BatchRange

_PLACE_MAX: Final = 2**53


async def skip_data(run: TrainingRun, request: admin.SkipDataRequest) -> DataSkip:
    """Carries out a request: leaves batches out, or undoes that. Raises InvalidFieldError, and as `DataSkips` does."""
    named = {
        "from_step and to_step": request.HasField("from_step") or request.HasField("to_step"),
        "epoch": request.HasField("epoch"),
        "remove": bool(request.remove),
    }
    if sum(named.values()) != 1:
        given = ", ".join(name for name, is_given in named.items() if is_given) or "nothing"
        raise InvalidFieldError("from_step", f"name steps, or batches of an epoch, or a skip to remove, not {given}")
    if request.remove:
        return await run.stop_skipping(request.remove)
    skip_id = new_skip_id(request.request_id)
    if not request.HasField("epoch"):
        steps = request.from_step, request.to_step if request.HasField("to_step") else request.from_step
        return await run.skip_data(skip_id, request.reason, run.skips.ranges_of_steps(*steps), steps)
    if request.epoch < 1:
        raise InvalidFieldError("epoch", "is counted from 1")
    if not request.from_batch <= request.to_batch < _PLACE_MAX:
        raise InvalidFieldError("to_batch", f"must not be less than from_batch, is {request.to_batch}")
    return await run.skip_data(
        skip_id, request.reason, (BatchRange(request.epoch, request.from_batch, request.to_batch),)
    )


def skip_message(skip: DataSkip, skips: DataSkips) -> admin.DataSkip:
    """Returns a skip as a message."""
    message = admin.DataSkip(
        skip_id=skip.skip_id,
        reason=skip.reason,
        made_at=_timestamp(skip.at_ns),
        ranges=[admin.BatchRange(epoch=each.epoch, from_batch=each.first, to_batch=each.last) for each in skip.ranges],
        batches=sum(map(len, skip.ranges)),
        passed=skips.passed(skip),
    )
    if skip.steps is not None:
        message.from_step, message.to_step = skip.steps
    if skip.removed_at_ns is not None:
        message.removed_at.CopyFrom(_timestamp(skip.removed_at_ns))
    return message


def _timestamp(at_ns: int) -> Timestamp:
    moment = Timestamp()
    moment.FromNanoseconds(at_ns)
    return moment
