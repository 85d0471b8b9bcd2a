"""The lane's page: a few words of shared memory between the service and the process of its lane.

They work while the lane holds its GIL, and without the connection: the lane's heartbeat, that of its process, which is
due also while the lane rests, what the lane does, the batch that it takes, whether it is to be held, and whether a
restore may change its live state. Each word is one aligned 8-byte store, atomic on 64-bit machines.
"""

from __future__ import annotations

import signal
import time
from typing import Final

from tolaria.config import EmergencySettings
from tolaria.segments import PREAMBLE_BYTES, Segment
from tolaria.signals.lane_pulse import LanePulse, described
from tolaria.signals.layout import LanePhase, LaneWork
from tolaria.signals.mapping import locked_fence

SILENT_SIGNAL: Final = signal.SIGURG
"""By which a rank that gives no heartbeat says so to its agent. Ignored by default."""

SILENT_ENDS_S: Final = 6.0
"""Seconds that such a rank leaves the service for collecting stacks; then it ends itself if it is still silent."""

_BEAT, _WORK, _SINCE, _RESTS, _GRANTED, _FORBIDDEN, _HOLD, _EPOCH, _PLACE, _ALIVE, _AGENT, _SILENT = range(12)
_WORDS: Final = 16


class LanePage:
    """The page, for both sides. `beat_lane` and `show_lane_work` make it the `PulseWords` of the lane's process."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._words = memoryview(segment.memory)[PREAMBLE_BYTES : PREAMBLE_BYTES + 8 * _WORDS].cast("Q")

    @classmethod
    def create(cls) -> LanePage:
        """Returns a new page, of a lane that rests. Raises MemoryError."""
        page = cls(Segment.create(0, 8 * _WORDS))
        page.show_rest(1)
        return page

    # -- the lane ----------------------------------------------------------------------------------------------------

    def beat_lane(self) -> None:
        """Stores the time as the lane's heartbeat."""
        self._words[_BEAT] = time.monotonic_ns()

    def show_lane_work(self, work: int) -> None:
        """Stores what the lane does, a `LaneWork.word`, from now on."""
        self._words[_SINCE] = time.monotonic_ns()
        self._words[_WORK] = work

    def beat_process(self) -> None:
        """Stores the time as the heartbeat of the lane's process, from another thread than the lane's."""
        self._words[_ALIVE] = time.monotonic_ns()

    def beat_agent(self) -> None:
        """Stores the time as the heartbeat of the agent that watches the ranks of a group."""
        self._words[_AGENT] = time.monotonic_ns()

    def show_silent_rank(self) -> None:
        """Stores the time at which a rank has said that it gives no heartbeat and will end."""
        self._words[_SILENT] = time.monotonic_ns()

    def show_rest(self, silence_ms: int) -> None:
        """Stores whether the lane rests: not 0, for how many milliseconds the process may be silent meanwhile."""
        self._words[_RESTS] = silence_ms

    def show_batch(self, epoch: int, place: int) -> None:
        """Stores which batch the lane takes; epoch 0: none."""
        self._words[_PLACE] = place
        self._words[_EPOCH] = epoch

    def hold_number(self) -> int:
        """Returns the number of the hold that the service wants; 0 if it wants none."""
        return self._words[_HOLD]

    def grant(self, command_id: int) -> bool:
        """Begins the change of live state by that restore, unless the service has forbidden it."""
        self._words[_GRANTED] = command_id
        locked_fence()
        if not self.forbidden(command_id):
            return True
        self._words[_GRANTED] = 0
        return False

    def forbidden(self, command_id: int) -> bool:
        """Whether the service has forbidden the restore."""
        return self._words[_FORBIDDEN] == command_id

    # -- the service -------------------------------------------------------------------------------------------------

    def forbid(self, command_id: int) -> bool:
        """Forbids the restore; False if its change of live state may have begun."""
        self._words[_FORBIDDEN] = command_id
        locked_fence()
        return self._words[_GRANTED] != command_id

    def hold(self, number: int) -> None:
        """Has the lane held between two microbatches; 0 ends the hold."""
        self._words[_HOLD] = number

    @property
    def batch(self) -> tuple[int, int] | None:
        """The batch that the lane takes, as (epoch, place); None if it takes none."""
        epoch, place = self._words[_EPOCH], self._words[_PLACE]
        return (epoch, place) if epoch else None

    @property
    def work(self) -> LaneWork:
        """What the lane does."""
        return LaneWork.of_word(self._words[_WORK])

    def phase(self) -> tuple[str, float]:
        """Returns what the lane does, as `lane_pulse.described` does."""
        work, since_ns = self.work, self._words[_SINCE]
        return described(LanePhase(work.phase), (time.monotonic_ns() - since_ns) / 1e9 if since_ns else 0.0)

    def silent_s(self) -> float:
        """Returns for how many seconds the lane has given no heartbeat that was due."""
        return 0.0 if self._words[_RESTS] else self._since_s(_BEAT)

    def agent_silent_s(self) -> float:
        """Returns for how many seconds the agent has given no heartbeat; 0 before the first one."""
        return self._since_s(_AGENT)

    @property
    def silent_rank_ns(self) -> int:
        """When a rank has said most recently that it gives no heartbeat, in ns of the monotonic clock; 0: never."""
        return self._words[_SILENT]

    def overdue_s(self) -> float:
        """Returns for how many seconds it, or at rest its process, has been silent if that is too long; else 0."""
        if rest_ms := self._words[_RESTS]:
            silent_s, silence_ms = self._since_s(_ALIVE), rest_ms
        else:
            silent_s, silence_ms = self._since_s(_BEAT), self.work.silence_ms
        return silent_s if silence_ms and silent_s * 1000 > silence_ms else 0.0

    def _since_s(self, beat: int) -> float:
        """Returns the seconds since a beat; 0 before the first one."""
        beat_ns = self._words[beat]
        return max(0.0, (time.monotonic_ns() - beat_ns) / 1e9) if beat_ns else 0.0


class PagePulse(LanePulse):
    """The heartbeat of a lane in a separate process: every change of phase or rest is shown at once."""

    def __init__(self, page: LanePage, limits: EmergencySettings) -> None:
        self._page = page
        super().__init__(page, limits)
        self.rest(rests=True)

    def enter_phase(self, phase: LanePhase) -> LanePhase:
        """Begins a phase, shows it, and returns the one before."""
        before = super().enter_phase(phase)
        self.show_work()
        return before

    def lane_batch(self, epoch: int, place: int) -> None:
        """Shows which batch the lane takes."""
        self._page.show_batch(epoch, place)

    def rest(self, *, rests: bool) -> None:
        """Begins or ends a time in which no beat is due, and shows it."""
        super().rest(rests=rests)
        self._page.show_rest(self.rest_ms if rests else 0)
