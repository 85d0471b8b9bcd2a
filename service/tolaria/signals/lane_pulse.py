"""The lane's heartbeat: what shows that the lane works, and how long it may be silent with what it does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol

from tolaria.config import EmergencySettings
from tolaria.signals.layout import LanePhase, LaneWork

_LOADING_S: Final = 1.0
_SHORT_S: Final = 0.01
_STEPS_OF_SILENCE: Final = 10


class PulseWords(Protocol):
    """The words of shared memory that the lane's heartbeat consists of. Each method takes less than a microsecond."""

    def beat_lane(self) -> None:
        """Stores the time as the lane's heartbeat."""

    def show_lane_work(self, work: int) -> None:
        """Stores what the lane does, a `LaneWork.word`."""


class LanePulse:
    """Beats between microbatches, and knows the lane's phase. Its methods are for the lane's thread, except `phase`.

    The lane beats for itself while it works; while it is idle or paused, it needs no beat. So a lane that hangs during
    work is silent, but an idle one is not. How long it may be silent depends on its phase and its steps.
    """

    def __init__(self, words: PulseWords, limits: EmergencySettings) -> None:
        self._pulse_words = words
        self._rests, self._works = True, False
        self._phase, self._since_s = LanePhase.STEPPING, time.monotonic()
        long, usual = int(limits.phase_timeout_s * 1000), int(limits.heartbeat_timeout_s * 1000)
        self._usual_ms, self._long_ms = usual, max(long, usual)
        self._silence_ms = dict.fromkeys(LanePhase, max(long, usual)) | {LanePhase.STEPPING: usual}
        self._words = {phase: LaneWork(phase, ms).word for phase, ms in self._silence_ms.items()}
        self.show_work()

    @property
    def rests(self) -> bool:
        """Whether no beat is due."""
        return self._rests

    @property
    def rest_ms(self) -> int:
        """Milliseconds for which even the process may be silent while no beat is due: longer in the middle of work."""
        return self._long_ms if self._works else self._usual_ms

    def rest(self, *, rests: bool) -> None:
        """Begins or ends a time in which no beat is due."""
        self._rests = rests

    def phase(self) -> tuple[str, float]:
        """Returns what the lane does, as `described` does. Called from any thread."""
        return described(self._phase, time.monotonic() - self._since_s)

    def lane_beat(self) -> None:
        """Beats for the lane."""
        self._pulse_words.beat_lane()

    def lane_batch(self, epoch: int, place: int) -> None:
        """Records which batch the lane takes, from 0 within its epoch; epoch 0: none."""

    def lane_step(self, duration_s: float) -> None:
        """Records the duration of an ordinary step: ten times the longest one is no silence."""
        ms = int(duration_s * 1000 * _STEPS_OF_SILENCE)
        if ms > self._silence_ms[LanePhase.STEPPING]:
            self._silence_ms[LanePhase.STEPPING] = ms
            self._words[LanePhase.STEPPING] = LaneWork(LanePhase.STEPPING, ms).word

    def lane_phase(self, phase: LanePhase) -> AbstractContextManager[None]:
        """Returns the context of a block of the lane's work, in which another silence is permitted. Nests."""
        return _PhaseSpan(self, phase)

    def enter_phase(self, phase: LanePhase) -> LanePhase:
        """Begins a phase and returns the one before."""
        now_s = time.monotonic()
        if now_s - self._since_s >= _SHORT_S:
            self._pulse_words.beat_lane()  # first, so that silence permitted before does not count now
        before, self._phase, self._since_s = self._phase, phase, now_s
        return before

    def show_work(self) -> None:
        """Shows what the lane does, and for how long it may be silent meanwhile."""
        self._pulse_words.show_lane_work(self._words[self._phase])

    @contextmanager
    def lane_works(self) -> Iterator[None]:
        """Spans an epoch or a command, in which beats are due."""
        self._pulse_words.beat_lane()
        self._works = True
        self.rest(rests=False)
        try:
            yield
        finally:
            self._works = False
            self.rest(rests=True)

    @contextmanager
    def lane_rests(self) -> Iterator[None]:
        """Spans a wait or a long operation, in which no beat is due."""
        before = self._rests
        self.rest(rests=True)
        try:
            yield
        finally:
            self._pulse_words.beat_lane()  # first, so that the time at rest does not count as silence
            self.rest(rests=before)


def described(phase: LanePhase, seconds: float) -> tuple[str, float]:
    """Returns what the lane does other than steps, and for how many seconds; an empty text if it is stepping.

    The short waits for data between microbatches are part of a step.
    """
    stepping = phase is LanePhase.STEPPING or (phase is LanePhase.LOADING and seconds < _LOADING_S)
    return ("", 0.0) if stepping else (phase.name.lower(), seconds)


class _PhaseSpan:
    """A phase while its block runs, then the phase before."""

    __slots__ = ("_before", "_phase", "_pulse")

    def __init__(self, pulse: LanePulse, phase: LanePhase) -> None:
        self._pulse = pulse
        self._phase = self._before = phase

    def __enter__(self) -> None:
        self._before = self._pulse.enter_phase(self._phase)

    def __exit__(self, *_: object) -> None:
        self._pulse.enter_phase(self._before)
