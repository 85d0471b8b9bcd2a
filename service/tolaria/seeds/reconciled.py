"""What a reconciliation did to a model, and which parameters an optimizer must take or drop because of it.

Must not know optimizers: it names parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from tolaria.seeds.ownership import NamedParameters
from tolaria.seeds.plan import Change, Refusal

Holdings: TypeAlias = dict[str, list[tuple[str, nn.Parameter, bool]]]
"""Of each seed in the model: names and parameters, and whether each is trained."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What was done, what was refused, and what becomes of parameters, by seed.

    Attributes:
        changes: in the order in which they were made.
        refusals: wishes, or parts of them, that were not met.
        added: parameters that are trained from now on. A seed's come when it begins to train, not when it germinates,
            so that a warm-up of its group does not pass while it is silent.
        frozen: parameters that are in the model but trained no more: of fossilized seeds, and of culled ones that ramp
            down. Their `.grad` is None.
        removed: parameters that have left the model. An optimizer drops those that it still holds, before it takes the
            added ones: a seed that germinates anew has parameters of the same names.
    """

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    added: Mapping[str, NamedParameters]
    frozen: Mapping[str, NamedParameters]
    removed: Mapping[str, NamedParameters]


def reconciled(
    changes: tuple[Change, ...], refusals: tuple[Refusal, ...], before: Holdings, after: Holdings
) -> Reconciled:
    """Tell what became of parameters between two looks at the model. They are compared by identity, not by name."""
    trained_before, trained_after = _ids(before, trained_only=True), _ids(after, trained_only=True)
    here_after = _ids(after, trained_only=False)
    return Reconciled(
        changes,
        refusals,
        added=_chosen(after, trained_after - trained_before),
        frozen=_chosen(after, trained_before - trained_after),
        removed=_chosen(before, _ids(before, trained_only=False) - here_after),
    )


def _ids(holdings: Holdings, *, trained_only: bool) -> set[int]:
    return {id(p) for held in holdings.values() for _, p, trained in held if trained or not trained_only}


def _chosen(holdings: Holdings, ids: set[int]) -> dict[str, NamedParameters]:
    chosen = {
        seed_id: [(name, parameter) for name, parameter, _ in held if id(parameter) in ids]
        for seed_id, held in holdings.items()
    }
    return {seed_id: parameters for seed_id, parameters in chosen.items() if parameters}
