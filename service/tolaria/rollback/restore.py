"""Bringing an image back into the live training state: checked first, then one short copy into the live tensors.

Owns the order of a restore and its undoing. Must not know where the image comes from. torch's own
`Optimizer.load_state_dict` is not used: it makes the given tensors its own, so that training on would change the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, cast

from tolaria.errors import RestoreAbandonedError, StateMismatchError
from tolaria.rollback.encoding import decode_plain, encode_plain
from tolaria.rollback.restore_plan import plan_restore
from tolaria.rollback.rng import capture_rngs, restore_rngs

if TYPE_CHECKING:
    from pydantic import JsonValue

    from tolaria.rollback.state import StateImage, StatePart, TrainingState

_REFUSALS: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a part, a job's own cursor above all, may raise at a state that it does not know."""


def never() -> bool:
    """For restores and loads without a deadline."""
    return False


def stage_restore(state: TrainingState, image: StateImage, *, verify: bool) -> StagedRestore:
    """Check everything that can be checked while nothing changes.

    Args:
        state: the live state.
        image: what shall become of it. A ring's image must stay leased until the restore is over.
        verify: read the image once more and compare with its seal; an image just loaded from disk has been.

    Raises:
        ImageDamagedError: the image is not what was captured.
        StateMismatchError: the image does not fit. When the topology differs, this is found in `commit` instead.
    """
    if verify:
        image.verify()
    values = cast("dict[str, JsonValue]", json.loads(image.values))
    _check_parts(state, values)
    staged = StagedRestore(state, image, values)
    if not staged.changes_topology:
        plan_restore(state, image, values)
    return staged


class StagedRestore:
    """A restore that has been checked. Made by `stage_restore`; `commit` may be called once, at a fence."""

    def __init__(self, state: TrainingState, image: StateImage, values: Mapping[str, JsonValue]) -> None:
        self._state = state
        self._image = image
        self._values = values
        topology = state.topology
        self.changes_topology = (
            topology is not None and encode_plain(topology.state_dict(), "topology") != values["topology"]
        )

    def commit(self, expired: Callable[[], bool] = never) -> None:
        """Topology, then parts, then one copy into the live tensors, then the RNGs. On any error all is as it was.

        A changed topology costs one copy of the live state beforehand, to go back to. `expired` is asked last, right
        before tensors change. Prove the result by comparing `state.fingerprint().total` with `image.seal().total`.

        Raises:
            StateMismatchError: the image does not fit the live state, or not the topology that it names itself.
            RestoreAbandonedError: `expired` said so.
            TolariaError: whatever else the topology raised while loading.
            RuntimeError: a part takes neither the image's state nor its own of before: what is live now is not known.
        """
        with ExitStack() as undo:
            rng_tensors, rng_values = capture_rngs()
            undo.callback(restore_rngs, rng_tensors, rng_values)
            if self.changes_topology:
                self._change_topology(undo)
            plan = plan_restore(self._state, self._image, self._values)
            _load_parts(self._state.parts, cast("Mapping[str, JsonValue]", self._values["parts"]), undo)
            if expired():
                raise RestoreAbandonedError("about to copy")
            plan.apply()
            undo.pop_all()

    def _change_topology(self, undo: ExitStack) -> None:
        topology = self._state.topology
        if topology is None:
            return
        before = self._state.copy()
        undo.callback(_go_back, self._state, before)
        topology.load_state_dict(_part_state(self._values["topology"]))


def _check_parts(state: TrainingState, values: Mapping[str, JsonValue]) -> None:
    kept = set(cast("dict[str, JsonValue]", values["parts"]))
    live = set(state.parts)
    problems = [f"parts/{name}: in the image only" for name in sorted(kept - live)]
    problems += [f"parts/{name}: live only" for name in sorted(live - kept)]
    if (values["topology"] is None) != (state.topology is None):
        problems.append("topology: in one of the two only")
    if problems:
        raise StateMismatchError(problems)


def _load_parts(parts: Mapping[str, StatePart], wanted: Mapping[str, JsonValue], undo: ExitStack) -> None:
    for name, part in parts.items():
        before = encode_plain(part.state_dict(), f"parts/{name}")
        undo.callback(_put_back, name, part, before)
        _load_part(name, part, wanted[name])


def _load_part(name: str, part: StatePart, state: JsonValue) -> None:
    try:
        part.load_state_dict(_part_state(state))
    except _REFUSALS as error:
        raise StateMismatchError([f"parts/{name}: {type(error).__name__}: {error}"]) from error


def _put_back(name: str, part: StatePart, before: JsonValue) -> None:
    try:
        part.load_state_dict(_part_state(before))
    except _REFUSALS as error:  # no mismatch, which would say that nothing has changed
        raise RuntimeError(f"parts/{name} refuses the state that it had itself: {error}") from error


def _part_state(state: JsonValue) -> dict[str, JsonValue]:
    return cast("dict[str, JsonValue]", decode_plain(state))


def _go_back(state: TrainingState, before: StateImage) -> None:
    """Undo a changed topology: the old one, then everything as it was in it."""
    values = cast("dict[str, JsonValue]", json.loads(before.values))
    if state.topology is not None:
        state.topology.load_state_dict(_part_state(values["topology"]))
    plan_restore(state, before, values).apply()
