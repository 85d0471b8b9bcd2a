"""The topology as JSON values: enough to bring a fresh model to the same structure before its tensors are loaded.

Owns the format. Must not know modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tolaria.errors import TopologyStateError
from tolaria.seeds.alpha import Ramp
from tolaria.seeds.plan import Standing
from tolaria.seeds.stages import stage_name, stage_named

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Structure:
    """Seeds in the order in which they were grafted, and the run seed that their first values came from."""

    seed: int
    standings: tuple[Standing, ...]


def dump(structure: Structure) -> dict[str, Any]:
    """JSON values; numbers come back as they are, to the last bit."""
    seeds = [{**asdict(standing), "stage": stage_name(standing.stage)} for standing in structure.standings]
    return {"version": VERSION, "seed": structure.seed, "seeds": seeds}


def parse(state: Mapping[str, Any]) -> Structure:
    """The structure that `dump` told.

    Raises:
        TopologyStateError: it is not one, or of another version.
    """
    if state.get("version") != VERSION:
        raise TopologyStateError(f"version {state.get('version')!r}; known is {VERSION}")
    try:
        standings = tuple(_standing(fields) for fields in state["seeds"])
        seed = int(state["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise TopologyStateError(f"malformed: {type(error).__name__}: {error}") from error
    _refuse_doubles([standing.seed_id for standing in standings])
    return Structure(seed, standings)


def _standing(fields: Mapping[str, Any]) -> Standing:
    ramps = {key: None if fields[key] is None else Ramp(**fields[key]) for key in ("ramp", "asked")}
    return Standing(**{**fields, **ramps, "stage": stage_named(fields["stage"])})


def _refuse_doubles(seed_ids: Sequence[str]) -> None:
    doubles = sorted({seed_id for seed_id in seed_ids if seed_ids.count(seed_id) > 1})
    if doubles:
        raise TopologyStateError(f"seed {doubles[0]!r} stands twice")
