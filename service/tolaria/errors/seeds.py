"""Why seeds cannot be grown as asked. Must not know models."""

from __future__ import annotations

from tolaria.errors.base import TolariaError


class SeedError(TolariaError):
    """Base of why seeds cannot be grown, or not in this way."""


class SlotError(SeedError):
    """Raised when a host's slot is declared wrongly, or is given activations that it was not declared for."""


class UnknownBlueprintError(SeedError):
    """Raised when no blueprint of that name is registered; the message lists those that are."""


class BlueprintError(SeedError):
    """Raised when a blueprint cannot be imported or built, or its branch breaks its promises."""


class BlueprintMisfitError(BlueprintError):
    """Raised when a blueprint cannot make a branch for a slot. `blueprint` and `slot` name both."""

    def __init__(self, blueprint: str, slot: str, detail: str) -> None:
        self.blueprint = blueprint
        self.slot = slot
        super().__init__(f"blueprint {blueprint!r} does not fit slot {slot!r}: {detail}")


class OwnershipError(SeedError):
    """Raised when a parameter belongs to two owners, or to none."""


class TopologyStateError(SeedError):
    """Raised when a saved topology cannot be brought back in this model; nothing has changed."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the saved topology cannot be loaded: {detail}")
