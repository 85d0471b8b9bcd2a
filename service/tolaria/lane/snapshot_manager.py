"""`SnapshotManager`: takes snapshots as often as their cost allows, captures images for checkpoints, restores both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from pydantic import JsonValue

from tolaria.config import RollbackSettings
from tolaria.errors import NoCheckpointError, StateMismatchError, StateUnsupportedError, TopologyStateError
from tolaria.images.image import StateImage
from tolaria.images.pool import Lease
from tolaria.lane.messages import Restored, SnapshotsChanged, SnapshotsUnavailable
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.train_module import TrainModule
from tolaria.optimization import GroupPlan
from tolaria.state.encoding import decode_plain
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import Cadence, Declined, SnapshotRing
from tolaria.state.training_state import StatePart, TrainingState
from tolaria.values.optimization import GroupRole
from tolaria.values.training import EpochProgress, Position

_MIB: Final = 2**20
_NO_LIMIT_BYTES: Final = 2**62

_SPARE_IMAGES: Final = 2
"""Images beside the ring: one is being written as a checkpoint while the next one waits."""


class SnapshotManager:
    """Captures and restores the state of one module. Used in the lane's thread, or before the lane has started.

    Args:
        module: whose state is captured.
        settings: memory and frequency of snapshots.

    Raises:
        StateUnsupportedError: the model has state that cannot be captured.
    """

    def __init__(self, module: TrainModule, settings: RollbackSettings) -> None:
        self._module = module
        self._every_steps = settings.every_steps
        self._structure = SeedStructure(module.seeds)
        self.state = training_state(module, self._structure)
        self._ring = SnapshotRing(bytes_max=settings.memory_mb * _MIB, entries_max=settings.snapshots_max, seal=True)
        # For checkpoints of states that are too large for the ring; memory is allocated at the first one.
        self._spare = SnapshotRing(bytes_max=_NO_LIMIT_BYTES, entries_max=_SPARE_IMAGES, seal=False)
        self._cadence = Cadence(overhead_max=settings.overhead_max)
        self._unavailable = ""
        self._events: list[SnapshotsChanged | SnapshotsUnavailable] = []
        self._reported: SnapshotsChanged | None = None
        self._ring_used = True

    def take_events(self) -> list[SnapshotsChanged | SnapshotsUnavailable]:
        """Returns the events since the last call. Costs almost nothing if the ring has not been used since."""
        events, self._events = self._events, []
        if self._ring_used:
            self._ring_used = False
            current = SnapshotsChanged(self._ring.snapshots(), self._ring.statistics())
            if current != self._reported:
                self._reported = current
                events.append(current)
        return events

    def epoch_begins(self) -> None:
        """Takes the first snapshot, so that there is a restore point from the first step on."""
        if not self._ring.statistics().snapshots:
            self._take_snapshot()

    def step_done(self, duration_s: float) -> None:
        """Takes a snapshot after a step if one is due."""
        self._cadence = self._cadence.after_step(duration_s)
        if self._cadence.steps_since >= self._every_steps if self._every_steps else self._cadence.due:
            self._take_snapshot()

    def capture_image(self) -> tuple[Position, Lease]:
        """Captures the state, in the ring if it has room, and leases the image to the caller.

        Raises:
            StateUnsupportedError: something in the state cannot be captured.
            NoCheckpointError: all spare images are still being read.
        """
        self._ring_used = True
        for ring in (self._ring, self._spare):
            taken = ring.capture(self.state)
            if isinstance(taken, Position) and (lease := ring.hold(taken.global_step)) is not None:
                return taken, lease
        raise NoCheckpointError("every image that there is room for is still being written")

    def restore_snapshot(self, target_step: int, refused: Callable[[], bool]) -> Restored:
        """Restores the newest snapshot at or before `target_step`; see `restore_image`.

        Raises:
            NoCheckpointError: there is no such snapshot.
        """
        self._ring_used = True
        lease = self._ring.lookup(target_step)
        if lease is None:
            raise NoCheckpointError(f"the snapshot of step {target_step} has been overwritten")
        with lease as image:
            return self._restore(image, refused, verify=True)

    def restore_image(self, image: StateImage, refused: Callable[[], bool] | None = None) -> Restored:
        """Restores an image that has been verified, such as a loaded checkpoint.

        Args:
            image: the state to restore.
            refused: called right before live state changes; True abandons the restore.

        Raises:
            RestoreAbandonedError: `refused` returned True.
            RollbackError, SeedError, OptimizationError: the image does not fit. The live state is unchanged.
        """
        return self._restore(image, refused, verify=False)

    def _restore(self, image: StateImage, refused: Callable[[], bool] | None, *, verify: bool) -> Restored:
        module, started_s = self._module, time.monotonic()
        skipped = set(module.skipped.batches)
        self._structure.prepare(module.global_step, image)
        module.clear_gradients()
        try:
            staged = stage_restore(self.state, image, verify=verify)
            staged.commit(refused)
            found = self.state.fingerprint().total
        except (KeyError, TypeError, ValueError) as error:  # the image's values are not those of this module
            raise StateMismatchError([f"{type(error).__name__}: {error}"]) from error
        finally:  # also after a failure: seeds and groups may have changed and changed back
            module.seeds.topology.advance(module.global_step)
            module.refresh()
        module.skipped.batches |= skipped  # a rollback does not make skipped batches good
        controller = module.seeds.controller
        controller.apply(module.global_step)
        self._ring.forget_after(module.global_step)
        self._ring_used = True
        return Restored(
            position=image.position,
            state_digest=found,
            expected_digest=image.seal().total,
            restore_ms=(time.monotonic() - started_s) * 1000,
            progress=module.progress,
            seeds=tuple(module.seeds.topology.states(module.global_step)),
            learning_rates=controller.learning_rates(),
            adjustments=controller.adjustments,
        )

    def _take_snapshot(self) -> None:
        if self._unavailable:
            return
        started_s, self._ring_used = time.monotonic(), True
        try:
            taken = self._ring.capture(self.state)
        except StateUnsupportedError as error:
            self._give_up(str(error))
            return
        self._cadence = self._cadence.after_snapshot(time.monotonic() - started_s)
        if isinstance(taken, Declined) and taken.too_large:
            self._give_up(f"a snapshot takes {taken.size_bytes / _MIB:.0f} MiB, more than rollback.memory_mb")

    def _give_up(self, reason: str) -> None:
        """Takes no further snapshots: the attempt itself costs time, and the reason does not go away."""
        self._unavailable = reason
        self._events.append(SnapshotsUnavailable(reason))


class SeedStructure:
    """The seeds in the model, as the part of the state whose loading changes which parameters and groups exist.

    Before a restore `prepare` names the two structures that may be loaded: the image's, and the present one, to which
    a failed restore returns.
    """

    def __init__(self, seeds: SeedTraining) -> None:
        self._seeds = seeds
        self._loadable: list[_Loadable] = []

    def prepare(self, global_step: int, image: StateImage) -> None:
        """Allows to load the image's structure, and the present one at `global_step`."""
        values = cast("dict[str, Any]", json.loads(image.values))
        roles = {name: GroupRole(group["role"]) for name, group in values["parts"]["learning_rates"]["groups"].items()}
        wanted = [_Group.of(group, roles) for group in values["optimizer"]["groups"]]
        present = [_Group(plan.name, tuple(plan.parameters), plan.role) for plan in self._seeds.manager.plan()]
        structure = cast("dict[str, JsonValue]", decode_plain(values["topology"]))
        self._loadable = [
            _Loadable(structure, image.position.global_step, tuple(wanted)),
            _Loadable(self.state_dict(), global_step, tuple(present)),
        ]

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns the structure."""
        return self._seeds.topology.state_dict()

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Grafts and removes seeds until the model has this structure, and regroups the optimizer accordingly.

        Raises:
            TopologyStateError: it is not a structure that was prepared, or does not fit the model.
            SeedError: a blueprint is unknown or does not fit.
            OptimizationError: the optimizer cannot be rebuilt.
        """
        target = next((loadable for loadable in self._loadable if loadable.structure == state), None)
        if target is None:
            raise TopologyStateError("it is neither the image's structure nor the present one")
        self._seeds.topology.load_state_dict(state, target.global_step)
        parameters = dict(self._seeds.model.named_parameters())
        if missing := [n for group in target.groups for n in group.parameters if n not in parameters]:
            raise StateMismatchError([f"parameter/{name}: its seed is not part of the structure" for name in missing])
        groups = [
            GroupPlan(group.name, {name: parameters[name] for name in group.parameters}, group.role)
            for group in target.groups
        ]
        manager = self._seeds.manager
        attempted_at_step = manager.attempted_at_step  # a part of the state, which this rebuild must not change
        manager.rebuild(groups, target.global_step, urgent=True)
        manager.attempted_at_step = attempted_at_step


def training_state(module: TrainModule, structure: SeedStructure) -> TrainingState:
    """Returns the state of a run over the module's live objects. The names of parts are those in checkpoints.

    Raises:
        StateUnsupportedError: the model has state that is neither parameter nor buffer.
    """
    parts: dict[str, StatePart] = {
        "cursor": module.cursor,
        "epoch": _ProgressPart(module),
        "growth": module.seeds,
        "learning_rates": module.seeds.controller,
        "left_out": module.skipped,
    }
    if module.fast_paths.scaler is not None:
        parts["scaler"] = module.fast_paths.scaler
    return TrainingState(module, parts, topology=structure)


class _ProgressPart:
    """The module's progress, an immutable value, as a part of the state."""

    def __init__(self, module: TrainModule) -> None:
        self._module = module

    def state_dict(self) -> dict[str, JsonValue]:
        return self._module.progress.to_json()

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        self._module.progress = EpochProgress.from_json(state)


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    parameters: tuple[str, ...]
    role: GroupRole

    @classmethod
    def of(cls, group: Mapping[str, Any], roles: Mapping[str, GroupRole]) -> _Group:
        """Returns the group that an image describes."""
        name = str(group["options"]["name"])
        return cls(name, tuple(group["parameters"]), roles.get(name, GroupRole.HOST))


@dataclass(frozen=True, slots=True)
class _Loadable:
    structure: Mapping[str, JsonValue]
    global_step: int
    groups: tuple[_Group, ...]
