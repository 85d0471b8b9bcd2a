"""Advances the alphas of blending seeds, their weights in the model's output, with the global step."""

from __future__ import annotations

from collections.abc import Iterable

from leyline.v1.enums_pb2 import SEED_STAGE_CULLED
from tolaria.seeds.plan import Change, GraftedSeed
from tolaria.seeds.slots import Graft
from tolaria.values.seeds import FULL_STRENGTH


class BlendingSeeds:
    """The seeds whose alpha changes with the step, with their grafts. `GraftedSeed.alpha` gives the value at a step."""

    def __init__(self) -> None:
        self._blending: tuple[tuple[GraftedSeed, Graft], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._blending)

    def reset(self, grafted: Iterable[tuple[GraftedSeed, Graft]], global_step: int) -> None:
        """Sets the alpha of every grafted seed, and keeps those that blend."""
        known = tuple(grafted)
        self._blending = tuple(
            (seed, graft) for seed, graft in known if seed.ramp is not None and seed.stage not in FULL_STRENGTH
        )
        for seed, graft in known:
            graft.alpha = seed.alpha(global_step)

    def advance(self, global_step: int) -> None:
        """Sets the alphas for the forward passes after `global_step` steps. Never synchronises."""
        for seed, graft in self._blending:
            graft.alpha = seed.alpha(global_step)

    def faded(self, global_step: int) -> list[Change]:
        """Returns the removal of each culled seed that has faded out."""
        culled = (seed for seed, _ in self._blending if seed.stage == SEED_STAGE_CULLED)
        return [Change(seed, None) for seed in culled if seed.alpha(global_step) == 0.0]
