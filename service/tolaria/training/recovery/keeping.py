"""How the event loop has the lane keep its state for a checkpoint. Must not know what becomes of the image."""

from __future__ import annotations

import anyio

from tolaria.errors import LaneError
from tolaria.rollback import Lease
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import FenceReport, Keep
from tolaria.training.recovery.keeper import Kept


async def kept_image(desk: FenceDesk) -> Lease:
    """A lease of the state as it is at the next fence; also while the lane stands. The caller's from then on.

    Raises:
        LaneError: there is no lane any more.
        TolariaError: the state cannot be kept.
    """
    given_up = False

    def give_back(report: FenceReport) -> None:
        if given_up and isinstance(report.result, Kept):
            report.result.lease.release()

    try:
        report = await desk.carry_out(Keep(), on_done=give_back)
    except anyio.get_cancelled_exc_class():
        given_up = True  # the lane keeps it all the same, and nobody will come for it
        raise
    if not isinstance(report.result, Kept):
        raise LaneError(f"the lane answered with a {type(report.result).__name__}, not with an image")
    return report.result.lease
