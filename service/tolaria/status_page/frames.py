"""Frames: what the page's viewers are sent, as server-sent events. Each is rendered once, for all viewers.

A frame has the sections that have changed since the one before, and the new points of curves. The latest frames are
kept, so that a viewer that was away for a moment gets those that it missed; any other one gets a full frame.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import anyio
import anyio.lowlevel

from tolaria.status_page.curves import Curve, EncodedCurve
from tolaria.status_page.sections import Section

INTERVAL_S: Final = 1.0
"""Least time between two frames: fast enough to look at, and far less than 1 % of a core."""

FRAMES_MAX: Final = 16
"""Latest frames that are kept."""

ROWS_PER_TURN: Final = 8
"""Rows of a long section that are built and encoded before the event loop does other work: below a millisecond."""


class Frames:
    """Renders the frames of one run. Used on the event loop only; nothing is rendered unless a viewer asks.

    Args:
        builders: each builds a section, by name; one that is an iterator is built row by row, with pauses.
        curves: the curves by name; more may come.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        builders: Mapping[str, Callable[[], Section]],
        curves: Mapping[str, Curve],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._builders = builders
        self._curves = curves
        self._clock = clock
        self._process = secrets.token_hex(6)
        """Begins the ids of frames: those of another process say nothing here."""
        self._texts: dict[str, str] = {}
        self._encoded: dict[str, EncodedCurve] = {}
        self._latest: deque[bytes] = deque(maxlen=FRAMES_MAX)
        self._full = b""
        self._rendered_s = -INTERVAL_S
        self._rendering = anyio.Lock()
        self.number = 0
        """Number of the newest frame."""

    async def refresh(self, *, at_once: bool = False) -> None:
        """Renders a frame if the newest one is old enough, or `at_once`, and something has changed.

        The event loop does other work between two sections or curves, and within sections that are built row by row.
        """
        async with self._rendering:
            now_s = self._clock()
            if not at_once and now_s - self._rendered_s < INTERVAL_S:
                return
            self._rendered_s = now_s
            changed = {}
            for name, build in self._builders.items():
                text = await _encoded(build())
                if text != self._texts.get(name):
                    changed[name] = text
                await anyio.lowlevel.checkpoint()
            with anyio.CancelScope(shield=True):  # what a curve says once that it has changed, has to be in a frame
                curves = await self._changed_curves()
            if changed or curves:
                self._texts |= changed
                self.number += 1
                self._full = b""
                self._latest.append(self._event("update", changed, curves))

    def after(self, number: int) -> bytes:
        """Returns the frames after that of a number; a full one if they are not kept any more."""
        missed = self.number - number
        if not 0 <= missed <= len(self._latest):
            return self.full()
        return b"".join(list(self._latest)[len(self._latest) - missed :])

    def full(self) -> bytes:
        """Returns all sections and curves as of the newest frame."""
        if not self._full:
            curves = {name: encoded.whole() for name, encoded in self._encoded.items()}
            self._full = self._event("full", self._texts, curves)
        return self._full

    def number_of(self, event_id: str) -> int:
        """Returns the number in the id of an event, as Last-Event-ID has it; -1 for one of another process."""
        process, _, number = event_id.partition(".")
        return int(number) if process == self._process and number.isdecimal() and len(number) < 20 else -1

    async def _changed_curves(self) -> dict[str, str]:
        changes = {}
        for name, curve in tuple(self._curves.items()):
            encoded = self._encoded.setdefault(name, EncodedCurve(curve))
            if text := encoded.changes():
                changes[name] = text
            await anyio.lowlevel.checkpoint()
        return changes

    def _event(self, kind: str, sections: Mapping[str, str], curves: Mapping[str, str]) -> bytes:
        parts = [f"{json.dumps(name)}:{text}" for name, text in sections.items()]
        parts.append(f'"curves":{{{",".join(f"{json.dumps(name)}:{text}" for name, text in curves.items())}}}')
        data = ",".join(parts)
        return f"event: {kind}\nid: {self._process}.{self.number}\ndata: {{{data}}}\n\n".encode()


async def _encoded(section: Section) -> str:
    if not isinstance(section, Iterator):
        return _as_json(section)
    texts = list[str]()
    for row in section:
        texts.append(_as_json(row))
        if len(texts) % ROWS_PER_TURN == 0:
            await anyio.lowlevel.checkpoint()
    return f"[{','.join(texts)}]"


def _as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
