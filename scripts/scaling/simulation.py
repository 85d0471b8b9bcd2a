"""A group of ranks that fails and restarts, simulated: the share of time that is work which lasts.

Failures are a Poisson process, and also strike restarts. Runs are independent and seeded. The estimate is the ratio of
their sums, its interval that of a ratio (Cochran 1977, "Sampling Techniques", chapter 6).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scaling.formulas import goodput

RUNS: Final = 40
FAILURES: Final = 300
_Z: Final = 2.023
"""97.5 % quantile of Student's distribution with RUNS - 1 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Restart:
    """A kind of failure: how probable it is, how long training rests, and whether the newest saved state is left."""

    share: float
    duration_s: float
    leaves_state: bool = True


@dataclass(frozen=True, slots=True)
class Policy:
    """How states are saved and restored; times in seconds.

    Attributes:
        interval_s: work between two saved states.
        stall_s: time for which training stops to save one.
        lag_s: time after which it can be restored.
        restarts: kinds of failures; their shares add up to 1.
        fallback_s: work between two checkpoints, to which a failure that leaves no saved state goes back; 0 if saved
            states are the checkpoints.
        fallback_stall_s: time for which training stops to save a checkpoint.
    """

    interval_s: float
    stall_s: float
    lag_s: float
    restarts: tuple[Restart, ...]
    fallback_s: float = 0.0
    fallback_stall_s: float = 0.0

    @property
    def all_stalls_s(self) -> float:
        """Stalls for each interval, with its share of those for checkpoints."""
        share = self.interval_s / self.fallback_s if self.fallback_s else 0.0
        return self.stall_s + self.fallback_stall_s * share

    def expected(self, mean_s: float) -> float:
        """Returns the goodput by `formulas.goodput`: as if every failure left the newest saved state."""
        restarts = [(each.share, each.duration_s) for each in self.restarts]
        return goodput(self.interval_s, self.all_stalls_s, mean_s, restarts, self.lag_s)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A simulated goodput, and the half-width of its confidence interval of 95 %."""

    goodput: float
    error: float


def simulate(policy: Policy, mean_s: float, seed: str, runs: int = RUNS, failures: int = FAILURES) -> Estimate:
    """Returns the goodput of a group with that mean time between failures, from `runs` runs of `failures` failures."""
    found = [_run(policy, mean_s, random.Random(f"{seed}/{number}"), failures) for number in range(runs)]  # noqa: S311
    return _ratio(found)


def _run(policy: Policy, mean_s: float, draws: random.Random, failures: int) -> tuple[float, float]:
    """Returns the work that lasts, and the time, of one run."""
    period_s = policy.interval_s + policy.all_stalls_s
    work_s = time_s = durable_s = 0.0
    for _ in range(failures):
        up_s = draws.expovariate(1 / mean_s)
        saved = max(0, math.floor((up_s - policy.lag_s) / period_s))
        work_s += saved * policy.interval_s
        if policy.fallback_s:
            durable_s = max(durable_s, work_s // policy.fallback_s * policy.fallback_s)
        rested_s, left = _restart(policy.restarts, mean_s, draws)
        if not left:
            work_s = durable_s
        time_s += up_s + rested_s
    return work_s, time_s


def _restart(restarts: Sequence[Restart], mean_s: float, draws: random.Random) -> tuple[float, bool]:
    """Returns how long it takes until training goes on, and whether all failures left the newest saved state."""
    shares = [each.share for each in restarts]
    rested_s, left = 0.0, True
    while True:
        (kind,) = draws.choices(restarts, shares)
        left = left and kind.leaves_state
        next_s = draws.expovariate(1 / mean_s)
        if next_s >= kind.duration_s:
            return rested_s + kind.duration_s, left
        rested_s += next_s


def _ratio(runs: Sequence[tuple[float, float]]) -> Estimate:
    """Returns the ratio of the sums of pairs, and the half-width of its interval."""
    whole_s = sum(time_s for _, time_s in runs)
    ratio = sum(work_s for work_s, _ in runs) / whole_s
    squares = sum((work_s - ratio * time_s) ** 2 for work_s, time_s in runs)
    return Estimate(ratio, _Z * math.sqrt(squares * len(runs) / (len(runs) - 1)) / whole_s)
