"""How long a rollback may take, and how much of that is whose. Pure; knows no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, RollbackTier

TOLARIA: Final = "tolaria"

SHARES: Final[Mapping[str, float]] = MappingProxyType({"tamiyo": 0.3, "kasmina": 0.5, TOLARIA: 0.2})
"""Of the whole: 150, 250 and 100 ms of the fast tier's 500."""


@dataclass(frozen=True, slots=True)
class RollbackBudgets:
    """Seconds from the trigger to the restored state, by tier, and each participant's share of all its calls together.

    What the peers leave of their shares is Tolaria's; its own share is what no peer can take from it.
    """

    fast_s: float = 0.5
    full_s: float = 12.0
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)

    def __post_init__(self) -> None:
        total = sum(self.shares.values())
        if TOLARIA not in self.shares or min(self.shares.values()) <= 0 or total > 1 + 1e-9:
            raise ValueError(f"shares must be positive, hold {TOLARIA!r} and be at most 1 together: {self.shares}")
        if min(self.fast_s, self.full_s) <= 0:
            raise ValueError(f"budgets must be positive: fast {self.fast_s} s, full {self.full_s} s")

    def total_s(self, tier: RollbackTier.ValueType) -> float:
        """The whole budget; of the full tier for one that has not been chosen yet."""
        return self.fast_s if tier == ROLLBACK_TIER_FAST else self.full_s

    def share_s(self, participant: str, tier: RollbackTier.ValueType) -> float:
        """A participant's part of it."""
        return self.shares[participant] * self.total_s(tier)
