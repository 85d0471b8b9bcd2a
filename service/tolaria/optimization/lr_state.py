"""The learning-rate controller's state as plain data, and back. Knows nothing of optimizers or schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tolaria.errors import AdjustmentRefusedError, ControllerStateError
from tolaria.values.optimization import ActiveAdjustment, Adjustment, GroupRole

_VERSION = 1


@dataclass(frozen=True, slots=True)
class GovernedGroup:
    """A registered param group: its role, what the schedule's factor multiplies, and since which global step."""

    role: GroupRole
    base_lr: float
    registered_at: int


def write_state(groups: Mapping[str, GovernedGroup], living: Sequence[ActiveAdjustment]) -> dict[str, Any]:
    """Numbers, strings, lists and dicts only."""
    return {
        "version": _VERSION,
        "groups": {name: asdict(group) | {"role": group.role.value} for name, group in groups.items()},
        "adjustments": [{"at_step": live.at_step, "adjustment": asdict(live.adjustment)} for live in living],
    }


def read_state(state: Mapping[str, Any], *, ceiling: float) -> tuple[dict[str, GovernedGroup], list[ActiveAdjustment]]:
    """What `write_state` wrote, checked.

    Raises:
        ControllerStateError: when it is of another version, incomplete, of wrong types or out of bounds.
    """
    if state.get("version") != _VERSION:
        raise ControllerStateError(f"learning-rate state is of version {state.get('version')!r}, not {_VERSION}")
    try:
        groups = {str(name): _read_group(entry, ceiling) for name, entry in state["groups"].items()}
        living = [
            ActiveAdjustment(Adjustment(**entry["adjustment"]), int(entry["at_step"])) for entry in state["adjustments"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, AdjustmentRefusedError) as error:
        raise ControllerStateError(f"learning-rate state is damaged: {type(error).__name__}: {error}") from error
    return groups, living


def _read_group(entry: Mapping[str, Any], ceiling: float) -> GovernedGroup:
    base_lr = float(entry["base_lr"])
    if not 0.0 <= base_lr <= ceiling:
        raise ValueError(f"base_lr {base_lr} is not between 0 and {ceiling}")
    return GovernedGroup(GroupRole(entry["role"]), base_lr, int(entry["registered_at"]))
