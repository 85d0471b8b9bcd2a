"""Requests about data that training leaves out, and their answers."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import admin_service_pb2 as admin
from tolaria.errors import InvalidFieldError
from tolaria.run.data_skips import DataSkip, DataSkips, new_skip_id
from tolaria.run.run import TrainingRun


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
    batches = run.skips.batches_of_epoch(request.epoch, request.from_batch, request.to_batch)
    return await run.skip_data(skip_id, request.reason, batches)


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
