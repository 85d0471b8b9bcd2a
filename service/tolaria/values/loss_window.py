"""`LossWindow`: the latest losses of a run, and the rule by which new ones are an explosion. Pure; knows no torch.

The rule compares ranks, so that neither the sign nor the scale of a loss matters. *top* is the largest loss of the
window, *spread* the distance from its median to the top, and the *limit* is top + spread.

The lane keeps one as a part of the training state, the run a copy that follows the lane's events.
"""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any, Final, Literal

from pydantic import JsonValue

EWMA_WEIGHT: Final = 0.05
"""Weight of the newest step in the moving averages: about the last twenty steps count."""

QUARANTINE: Final = 64
"""Losses after which one above the top enters the window: by then, an explosion would have been recognized."""

CERTAIN_SPREADS: Final = 100.0
"""Spreads above the top beyond which two losses in a row are enough."""

_FAST: Final = (5, 8)
_SLOW: Final = (28, 32)
_SUSPECT: Final = (2, 8)
_FLOOR: Final = 0.001
_FIRST: Final = 64
_SETTLED: Final = 8

EXTREME_SPREADS: Final = 20.0
"""Spreads above the top beyond which the step of a single loss is skipped: sound runs stay below 6."""

_EXTREMES: Final = 3
"""Extreme losses of the last 64 from which on further ones are no longer extreme, but belong to the task."""

_UNJUDGED: Final = 16
"""Losses in the window below which it judges none: a first loss near zero says nothing about the next ones."""

ExplosionKind = Literal["fast", "certain", "slow"]


@dataclass(frozen=True, slots=True)
class Explosion:
    """An explosion.

    Attributes:
        kind: the rule that it meets.
        limit: what the losses of the evidence exceed.
        evidence: the losses that prove it, as numbers of losses before the newest, in order of time.
        onset: the losses before those, in the same way, from the first one that was above the window's limit already:
            they prove nothing, but may have made an explosion that is certain. Eight losses in a row that are not above
            the limit end it.
    """

    kind: ExplosionKind
    limit: float
    evidence: tuple[int, ...]
    onset: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Averages:
    """Exponentially weighted averages and variances over finite steps (Finch 2009, section 9)."""

    loss: float = 0.0
    loss_variance: float = 0.0
    gradient_norm: float = 0.0
    gradient_norm_variance: float = 0.0
    loss_delta: float = 0.0
    finite_steps: int = 0

    def after(self, loss: float, gradient_norm: float) -> Averages:
        """Returns the averages with one more finite step."""
        if not self.finite_steps:
            return Averages(loss, 0.0, gradient_norm, 0.0, 0.0, 1)
        off, norm_off = loss - self.loss, gradient_norm - self.gradient_norm
        return Averages(
            self.loss + EWMA_WEIGHT * off,
            (1.0 - EWMA_WEIGHT) * (self.loss_variance + EWMA_WEIGHT * off * off),
            self.gradient_norm + EWMA_WEIGHT * norm_off,
            (1.0 - EWMA_WEIGHT) * (self.gradient_norm_variance + EWMA_WEIGHT * norm_off * norm_off),
            off,
            self.finite_steps + 1,
        )


class LossWindow:
    """The last `size` healthy losses. A loss above the top enters it `QUARANTINE` losses later.

    Attributes:
        averages: of the losses and gradient norms of all finite steps.
        above: whether the newest loss was above the top; None before the first one.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.averages = Averages()
        self._clear_all()

    def _clear_all(self) -> None:
        self._count = 0
        self._first: list[float] = []
        self._scale = 0.0
        self._clear(())

    def _clear(self, kept: Iterable[float]) -> None:
        self.above: bool | None = None
        self._order = deque(kept)
        self._sorted = sorted(self._order)
        self._waiting: deque[tuple[int, float]] = deque()
        self._recent: deque[float] = deque(maxlen=_SLOW[1])
        self._extremes: deque[int] = deque(maxlen=_EXTREMES)
        self._again: deque[int] = deque(maxlen=_SLOW[1])
        self._best: tuple[float, float] | None = None  # median and limit of the window with the lowest median

    @property
    def full(self) -> bool:
        """Whether the window has all its losses; before that, only a certain explosion is one."""
        return len(self._sorted) >= self._size

    @property
    def median(self) -> float:
        """The median of the window, the upper one of two. Raises IndexError for an empty window."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def limit(self) -> float:
        """Above it are the losses of a fast explosion. Raises IndexError for an empty window."""
        return self._limit(1.0)

    @property
    def relative_spread(self) -> float:
        """The distance from the median to the top, relative to the median; 0 for an empty window."""
        return _relative_spread(self._sorted, self._scale) if self._sorted else 0.0

    @property
    def suspect(self) -> bool:
        """Whether two of the last eight losses are above the limit: what is captured now may be ill."""
        return len(self.latest_above) >= _SUSPECT[0]

    @property
    def latest_above(self) -> tuple[int, ...]:
        """Which of the last eight losses are above the limit, as numbers of losses before the newest, oldest first."""
        return self._proving(self._above(self._limit(1.0), _SUSPECT[1])) if self._sorted else ()

    @property
    def scale(self) -> float:
        """The median magnitude of the first 64 losses of the run."""
        return self._scale

    def extreme(self, loss: float) -> bool:
        """Whether a loss is so large that its step is skipped: alone it may ruin an optimizer's averages.

        Only the first of several in a row is extreme; see `extreme_again` for the next ones.
        """
        if not self._far_above(loss) or (self._recent and self._far_above(self._recent[-1])):
            return False
        return len(self._extremes) < _EXTREMES or self._count - self._extremes[0] >= QUARANTINE

    def extreme_again(self, loss: float) -> bool:
        """Whether a loss is as large directly after a step that was skipped because its loss was extreme.

        If the parameters, which have not changed since, are sound, the data are ill.
        """
        return bool(self._extremes) and self._extremes[-1] == self._count and self._far_above(loss)

    def _far_above(self, loss: float) -> bool:
        return len(self._sorted) >= min(_UNJUDGED, self._size) and loss > self._limit(EXTREME_SPREADS)

    def pass_over(self, loss: float) -> None:
        """Adds the loss of a step that was skipped because it is extreme. It never enters the window itself.

        After the first one in a row, they say nothing about the parameters, and are no evidence.
        """
        if self.extreme_again(loss):
            self._again.append(self._count + 1)
        self._count += 1
        self._recent.append(loss)
        self._extremes.append(self._count)
        self.above = True

    def add(self, loss: float) -> Explosion | None:
        """Adds a finite loss, judged by the window before it; returns the explosion of which it is a part, if any."""
        self._count += 1
        self._recent.append(loss)
        alarm = None
        count = len(self._sorted)
        if not count or loss <= self._sorted[-1]:
            self.above = False
            if self._best is not None and loss > self._best[1]:
                alarm = self._alarm("slow", self._best[1], *_SLOW)
            self._enter(loss)
        elif count < min(_UNJUDGED, self._size):
            self.above = True
            self._enter(loss)
        else:
            self.above = True
            alarm = self._judge(loss)
            self._waiting.append((self._count + QUARANTINE, loss))
        while self._waiting and self._waiting[0][0] <= self._count:
            self._enter(self._waiting.popleft()[1])
        if len(self._first) < _FIRST:
            self._first.append(abs(loss))
            self._scale = median(self._first)
        return alarm

    def note(self, loss: float, gradient_norm: float) -> None:
        """Adds a finite step to the averages."""
        self.averages = self.averages.after(loss, gradient_norm)

    def begin_regime(self, *, keep_waiting: bool) -> None:
        """Empties the window for a changed task; the losses that wait to enter it enter now, if they are kept."""
        self._clear([loss for _, loss in self._waiting] if keep_waiting else ())

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns the state; {} before the first loss. Losses are packed as base64 of little-endian float64."""
        if not (self._count or self.averages.finite_steps):
            return {}
        again = [count for count in self._again if count > self._count - _SLOW[1]]
        known: dict[str, JsonValue] = {"again": _packed(again)} if again else {}  # which earlier versions do not have
        return known | {
            "count": self._count,
            "above": self.above,
            "averages": _packed(astuple(self.averages)),
            "best": _packed(self._best or ()),
            "extremes": _packed(self._extremes),
            "first": _packed(self._first),
            "recent": _packed(self._recent),
            "waiting": _packed(value for entry in self._waiting for value in entry),
            "window": _packed(self._order),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, also for another size. Raises KeyError, TypeError or ValueError."""
        if not state:
            self.averages = Averages()
            self._clear_all()
            return
        count, above = int(state["count"]), state["above"]
        averages, best, first, recent, waiting, window = (
            _unpacked(state[name]) for name in ("averages", "best", "first", "recent", "waiting", "window")
        )
        loss, loss_variance, norm, norm_variance, delta, steps = averages
        self.averages = Averages(loss, loss_variance, norm, norm_variance, delta, int(steps))
        self._count = count
        self._first, self._scale = list(first), median(first) if first else 0.0
        self._clear(window)
        self.above = above
        self._recent.extend(recent)
        self._extremes.extend(int(count) for count in _unpacked(state.get("extremes", "")))
        self._again.extend(int(count) for count in _unpacked(state.get("again", "")))
        self._waiting.extend((int(due), loss) for due, loss in zip(waiting[::2], waiting[1::2], strict=True))
        self._best = (best[0], best[1]) if best else None

    def _judge(self, loss: float) -> Explosion | None:
        certain = self._limit(CERTAIN_SPREADS)
        if loss > certain and (alarm := self._alarm("certain", certain, 2, 2)):
            return alarm
        if not self.full:
            return None
        limit = self._limit(1.0)
        if loss > limit and (alarm := self._alarm("fast", limit, *_FAST)):
            return alarm
        if self._best is not None and loss > self._best[1]:
            return self._alarm("slow", self._best[1], *_SLOW)
        return None

    def _alarm(self, kind: ExplosionKind, limit: float, least: int, last: int) -> Explosion | None:
        evidence = self._proving(self._above(limit, last))
        if len(evidence) < least:
            return None
        return Explosion(kind, limit, evidence, self._onset(evidence[0]) if kind == "certain" else ())

    def _onset(self, first: int) -> tuple[int, ...]:
        """Returns the losses before the one with the number `first`, from the one with which the rise began."""
        begin = first
        for number in reversed(self._above(self._limit(1.0), len(self._recent))):
            if begin < number <= begin + _SETTLED:
                begin = number
        return tuple(range(begin, first, -1))

    def _proving(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Returns those of the losses with these numbers that are evidence."""
        return tuple(number for number in numbers if self._count - number not in self._again)

    def _above(self, limit: float, last: int) -> tuple[int, ...]:
        """Returns which of the last losses are above the limit, as numbers of losses before the newest."""
        newest = len(self._recent) - 1
        first = max(0, newest + 1 - last)
        return tuple(newest - place for place in range(first, newest + 1) if self._recent[place] > limit)

    def _limit(self, spreads: float) -> float:
        top = self._sorted[-1]
        if self.full:
            return top + spreads * max(top - self.median, _FLOOR * abs(top), _FLOOR * self._scale)
        return top + spreads * max(top - self.median, abs(top), self._scale)

    def _enter(self, loss: float) -> None:
        self._order.append(loss)
        insort(self._sorted, loss)
        while len(self._order) > self._size:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        if self.full and (self._best is None or self.median < self._best[0]):
            self._best = self.median, self._limit(1.0)


def rise_begins(losses: Sequence[float], first: int, level: float) -> int:
    """Returns the place at which the losses began to rise that led to an explosion at place `first`.

    The rise is a stretch in which no eight losses in a row have a median of at most `level`. A jump begins at, or a few
    places before, the first loss of the explosion; a slow divergence began long before.
    """
    begin = first
    while begin >= _SETTLED and median(losses[begin - _SETTLED : begin]) > level:
        begin -= 1
    return begin


def relative_spread(losses: Iterable[float], scale: float) -> float:
    """Returns the distance from the median to the largest loss, relative to the median's magnitude.

    A thousandth of `scale` replaces a smaller magnitude.
    """
    return _relative_spread(sorted(losses), scale)


def _relative_spread(ascending: Sequence[float], scale: float) -> float:
    middle = ascending[len(ascending) // 2]
    return (ascending[-1] - middle) / max(abs(middle), _FLOOR * scale, 1e-300)


def _packed(values: Iterable[float]) -> str:
    listed = list(values)
    return b64encode(struct.pack(f"<{len(listed)}d", *listed)).decode()


def _unpacked(packed: str) -> tuple[float, ...]:
    data = b64decode(packed, validate=True)
    return struct.unpack(f"<{len(data) // 8}d", data)
