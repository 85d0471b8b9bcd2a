"""What each source's row weighs at a step: a table of stages, and the alpha schedule. Pure; holds no tensors.

Knows nothing of how seeds get from stage to stage, nor of their modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from leyline.v1 import enums_pb2
from tolaria.errors import GradientWeightError
from tolaria.gradients.weighted import check_weight
from tolaria.values.training import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leyline.v1.enums_pb2 import SeedLifecycleStage
    from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState

STAGE_WEIGHTS: Final[Mapping[SeedLifecycleStage.ValueType, float | None]] = {
    enums_pb2.SEED_STAGE_UNKNOWN: 0.0,
    enums_pb2.SEED_STAGE_DORMANT: 0.0,
    enums_pb2.SEED_STAGE_GERMINATED: 0.01,
    enums_pb2.SEED_STAGE_TRAINING: 0.1,
    enums_pb2.SEED_STAGE_BLENDING: None,  # its alpha
    enums_pb2.SEED_STAGE_SHADOWING: 0.5,
    enums_pb2.SEED_STAGE_PROBATIONARY: 1.0,
    enums_pb2.SEED_STAGE_FOSSILIZED: 0.0,
    enums_pb2.SEED_STAGE_CULLED: 0.0,
    enums_pb2.SEED_STAGE_EMBARGOED: 0.0,
    enums_pb2.SEED_STAGE_RESETTING: 0.0,
    enums_pb2.SEED_STAGE_TERMINATED: 0.0,
}
"""Weight of a seed's row by its stage; None is its alpha."""

ISOLATED: Final = frozenset({enums_pb2.SEED_STAGE_GERMINATED, enums_pb2.SEED_STAGE_TRAINING})
"""Stages whose gradient reaches the seed's own parameters only while seeds are isolated: they have no row then."""


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """One source at one step. It has a row when its weight is above zero."""

    name: str
    stage: SeedLifecycleStage.ValueType
    weight: float
    alpha: float
    attribution: float

    @property
    def has_row(self) -> bool:
        """Whether its loss may move shared parameters now."""
        return self.weight > 0


class SeedWeightResolver:
    """Reads SeedState messages into weights of rows."""

    def __init__(self, *, isolation: bool) -> None:
        self._isolation = isolation

    def resolve(self, states: Sequence[SeedState], step: int) -> tuple[SourceWeight, ...]:
        """The host, then every seed in the order given, with its weight at the global step.

        Raises:
            GradientWeightError: an alpha that is not finite, or an attribution that is not finite or negative. The
                index is the seed's position in `states`; the message names it.
        """
        host = SourceWeight(HOST, enums_pb2.SEED_STAGE_UNKNOWN, weight=1.0, alpha=1.0, attribution=0.0)
        return (host, *(self._resolve_seed(index, state, step) for index, state in enumerate(states)))

    def _resolve_seed(self, index: int, state: SeedState, step: int) -> SourceWeight:
        alpha = seed_alpha(state, step)
        if not math.isfinite(alpha):
            raise GradientWeightError(index, f"alpha {alpha} (of {state.seed_id}) is not finite")
        check_weight(index, state.attribution, whose=f"attribution of {state.seed_id}")
        alpha = min(max(alpha, 0.0), 1.0)
        weight = self._stage_weight(state.stage, alpha)
        return SourceWeight(state.seed_id, state.stage, weight, alpha, state.attribution)

    def _stage_weight(self, stage: SeedLifecycleStage.ValueType, alpha: float) -> float:
        if self._isolation and stage in ISOLATED:
            return 0.0
        weight = STAGE_WEIGHTS.get(stage, 0.0)  # a stage newer than this table trains nothing
        return alpha if weight is None else weight


def seed_alpha(state: SeedState, step: int) -> float:
    """A seed's alpha at a global step: by its schedule, else as an older peer sends it in `metrics`, else 0."""
    if state.HasField("alpha"):
        return alpha_at(state.alpha, step)
    return state.metrics["alpha"] if "alpha" in state.metrics else 0.0  # noqa: SIM401 # a protobuf map's get() takes no default of its own


def alpha_at(schedule: AlphaSchedule, step: int) -> float:
    """Linear from `start` at `begin_step` to `end` at `begin_step + duration_steps`, constant outside.

    Without a duration it jumps from `start` to `end` at `begin_step`.
    """
    if step < schedule.begin_step:
        return schedule.start
    if step >= schedule.begin_step + schedule.duration_steps:
        return schedule.end
    passed = (step - schedule.begin_step) / schedule.duration_steps
    return schedule.start + (schedule.end - schedule.start) * passed
