"""How the event loop has the lane keep its state for a checkpoint. Must not know what becomes of the image."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from tolaria.errors import LaneError
from tolaria.images.pool import Lease
from tolaria.training.fence_desk import FenceDesk
from tolaria.training.fences import FenceReport, Keep
from tolaria.training.recovery.keeper import Kept


async def kept_image(desk: FenceDesk, on_kept: Callable[[], None] = lambda: None) -> Lease:
    """A lease of the state as it is at the next fence; also while the lane stands. The caller's from then on.

    `on_kept` is called when the lane's answer comes, in its order among the lane's reports.

    Raises:
        LaneStoppedError: there is no lane any more.
        TolariaError: the state cannot be kept.
    """
    given_up = False
    delivered: Lease | None = None

    def take(report: FenceReport) -> None:
        nonlocal delivered
        if isinstance(report.result, Kept):
            delivered = report.result.lease
            on_kept()
            if given_up:
                delivered.release()

    try:
        report = await desk.carry_out(Keep(), on_done=take)
    except anyio.get_cancelled_exc_class():
        given_up = True  # the lane keeps it all the same, or has, and nobody will come for it
        if delivered is not None:
            delivered.release()
        raise
    if delivered is None:
        raise LaneError(f"the lane answered with a {type(report.result).__name__}, not with an image")
    return delivered
