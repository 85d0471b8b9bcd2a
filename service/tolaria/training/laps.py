"""Which epoch the run has come to, and how the one that the lane has been given ends.

Owns the waiting for the lane. Must not know what an epoch's figures are worth.
"""

from __future__ import annotations

import anyio

from tolaria.errors import LaneFailedError
from tolaria.training.place import EpochPlace
from tolaria.training.reports import EpochReport, LaneEnded


class Laps:
    """Used on the event loop only. `place` is where the run begins."""

    def __init__(self, place: EpochPlace) -> None:
        self.next_epoch = place.number + place.over
        """The epoch that the lane is to be given, or to be given the rest of."""
        self._over = anyio.Event()
        self._report: EpochReport | None = None
        self._ended: LaneEnded | None = None

    @property
    def lane_ended(self) -> bool:
        """Whether there is no lane any more."""
        return self._ended is not None

    def begin(self) -> None:
        """The lane is about to be given an epoch: what was told of earlier ones is forgotten."""
        self._over, self._report = anyio.Event(), None

    async def over(self) -> EpochReport | None:
        """Wait until the lane is done with what it was given; None when it was stopped in it, or went back.

        Raises:
            LaneFailedError: the lane has ended by an error.
        """
        await self._over.wait()
        self._raise_if_failed()
        return self._report

    async def lane_over(self) -> None:
        """Wait until the lane has ended, which it has been told to. Raises LaneFailedError when it did by an error."""
        while self._ended is None:
            self._over = anyio.Event()
            await self._over.wait()
        self._raise_if_failed()

    def reported(self, report: EpochReport) -> None:
        """The lane has finished an epoch."""
        self._report = report
        self.next_epoch = report.epoch + 1
        self._over.set()

    def stands(self, report: EpochReport) -> bool:
        """Whether this is still the last epoch: not once the run has gone back behind its end."""
        return self._report is report

    def went_back(self, place: EpochPlace, *, given_up: bool) -> None:
        """The lane is at an earlier place; `given_up`: it does not work on what it was given last any more."""
        self.next_epoch = place.number + place.over
        self._report = None
        if given_up:
            self._over.set()  # nobody will report the epoch that is waited for: it has to be ordered anew

    def ended(self, report: LaneEnded) -> None:
        """The lane has ended."""
        self._ended = report
        self._over.set()

    def _raise_if_failed(self) -> None:
        if self._ended is not None and self._ended.error is not None:
            error = self._ended.error
            raise LaneFailedError(f"{type(error).__name__}: {error}") from error
