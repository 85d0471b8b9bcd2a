"""What the process of a lane is ordered to build, and what it goes on from. Imports neither torch nor an event loop."""

from __future__ import annotations

from dataclasses import dataclass

from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.training import BatchRange


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a lane that has been built goes on from.

    The first snapshot in memory that can be restored, of those with these digests, else a checkpoint that comes along,
    else, without either, the state in which it was built. `left_out` are batches to skip, as (epoch, place), `ranges`
    those that operators have named; `decided` are the run's adjustments of learning rates.
    """

    targets: tuple[str, ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    decided: tuple[ActiveAdjustment, ...] = ()
    ranges: tuple[BatchRange, ...] = ()


@dataclass(frozen=True, slots=True)
class LaneOrder:
    """What the process of a lane builds: the settings, as JSON, and the snapshots of an earlier one to take over.

    `digests` are those of the snapshots that are valid; `next_segment` is the lowest number that no segment has.
    `image_id` is that of the checkpoint that belongs to the plan; 0: none.
    """

    settings: str
    digests: tuple[str, ...]
    next_segment: int
    plan: RestorePlan
    image_id: int = 0
    run_id: str = ""
