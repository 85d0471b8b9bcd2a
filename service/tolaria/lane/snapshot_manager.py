"""`SnapshotManager`: takes snapshots as often as their cost allows, captures images for checkpoints, restores both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeAlias, cast

from pydantic import JsonValue

from tolaria.config import RollbackSettings
from tolaria.errors import (
    NoCheckpointError,
    OptimizationError,
    RestoreAbandonedError,
    RollbackError,
    SeedError,
    StateMismatchError,
    StateUnsupportedError,
    TolariaError,
    TopologyStateError,
)
from tolaria.images import Lease, StateImage
from tolaria.jobs import StatefulJob
from tolaria.lane.early_stopping import PART as EARLY_STOPPING
from tolaria.lane.messages import Restored, SnapshotEvent, SnapshotsChanged, SnapshotsUnavailable
from tolaria.lane.seed_training import SeedTraining
from tolaria.lane.train_module import TrainModule
from tolaria.lane.weight_averages import PART as AVERAGES
from tolaria.optimization import GroupPlan
from tolaria.ranks.gathering import Gathering
from tolaria.ranks.group import Group
from tolaria.state.arenas import private_memory
from tolaria.state.encoding import decode_plain
from tolaria.state.restore import stage_restore
from tolaria.state.shared_memory import SharedMemory
from tolaria.state.snapshots import Cadence, Declined, SnapshotRing
from tolaria.state.training_state import StatePart, TrainingState
from tolaria.values.optimization import ActiveAdjustment, GroupRole
from tolaria.values.training import Position, eager_name

_MIB: Final = 2**20
_NO_LIMIT_BYTES: Final = 2**62

_Refused: TypeAlias = Callable[[], bool] | None

_SPARE_IMAGES: Final = 2
"""Images in addition to the ring: one is being written as a checkpoint while the next one waits."""


class SnapshotManager:
    """Captures and restores the state of one module. Used in the lane's thread, or before the lane has started.

    With `memory` images lie in segments that outlive this process.

    Raises StateUnsupportedError for a model with state that cannot be captured.
    """

    def __init__(self, module: TrainModule, settings: RollbackSettings, memory: SharedMemory | None = None) -> None:
        self._module = module
        self._every_steps = settings.every_steps
        self.before_restore: Callable[[StateImage, _Refused], _Refused] = lambda _image, refused: refused
        """Called with each image that is about to be restored, and what may refuse that; returns what decides."""
        self.restore_staged: Callable[[], bool] = lambda: True
        """Called when a restore is prepared, before anything changes; returns whether it is done."""
        self.restore_failed: Callable[[], None] = lambda: None
        """Called when a restore fails before live state has changed."""
        self.takes_snapshots = True
        """Off: the state is kept elsewhere."""
        self.prove: Callable[[StateImage, Collection[str]], str] = self._digest
        """Returns the digest of the live state, with these parts, that has been restored from an image."""
        self.memory = memory
        self._gathering: Gathering | None = None
        self._structure = SeedStructure(module.seeds)
        # The names of the parts are those in checkpoints.
        parts: dict[str, StatePart] = {
            "cursor": module.cursor,
            "epoch": module,
            "growth": module.seeds,
            "learning_rates": module.seeds.controller,
            "left_out": module.skipped,
            "losses": module.losses,
            "requires_grad": module.flags,
        }
        if module.fast_paths.scaler is not None:
            parts["scaler"] = module.fast_paths.scaler
        if isinstance(module.job, StatefulJob):
            parts["job"] = module.job
        schedule = module.seeds.controller.job_schedule
        if schedule is not None and schedule.stateful:
            parts["lr_scheduler"] = schedule
        if module.averages is not None:
            parts[AVERAGES] = module.averages
        parts |= module.callbacks.parts
        # Only where it is wanted, or a restored state has it: earlier versions do not know it.
        dormant = {EARLY_STOPPING: module.early_stopping}
        parts |= dormant if module.early_stopping.wanted else {}
        optional = (*module.callbacks.parts, AVERAGES, EARLY_STOPPING, "job", "losses", "lr_scheduler", "requires_grad")
        self.state = TrainingState(
            module, parts, topology=self._structure, optional=optional, dormant=dormant, stepped=(AVERAGES,)
        )
        allocate = memory or private_memory
        self._ring = SnapshotRing(
            bytes_max=settings.memory_mb * _MIB, entries_max=settings.snapshots_max, seal=True, allocate=allocate
        )
        # For checkpoints of states that are too large for the ring; memory is allocated at the first one.
        self._spare = SnapshotRing(bytes_max=_NO_LIMIT_BYTES, entries_max=_SPARE_IMAGES, seal=False, allocate=allocate)
        self._cadence = Cadence(overhead_max=settings.overhead_max)
        self._unsupported, self._unavailable = False, ""
        self._events: list[SnapshotEvent] = []
        self._ring_used = True
        if module.sharded and module.group is not None:
            self._gather_with(module.group)

    def adopt(self, memory: SharedMemory, digests: Collection[str]) -> None:
        """Takes over the snapshots with these digests that an earlier process has left in memory; frees the others."""
        self._ring.adopt(memory.held, digests, pinned=self._module.device.type == "cuda")
        memory.held.clear()

    def take_events(self) -> list[SnapshotEvent]:
        """Returns the events since the last call. Costs almost nothing if the ring has not been used since."""
        events, self._events = self._events, []
        if self._ring_used:
            self._ring_used = False
            events.append(SnapshotsChanged(self._ring.snapshots(), self._ring.statistics()))
        return events

    def epoch_begins(self) -> None:
        """Takes the first snapshot, so that there is a restore point from the first step on."""
        due = self.takes_snapshots and not self._unsupported and not self._ring.statistics().snapshots
        if self._gathering is not None:
            due = self._gathering.agreed(due)
        if due:
            self._take_snapshot()

    def step_done(self, duration_s: float) -> None:
        """Takes a snapshot after a step if one is due."""
        if not self.takes_snapshots and self._gathering is None:
            return
        self._cadence = self._cadence.after_step(duration_s)
        if self._due(self._cadence) if self._gathering is None else self._gathering.group.snapshot_agreed:
            self._take_snapshot()

    def take_part(self) -> None:
        """Takes part in one capture of the leader's, where all ranks have parts of the state."""
        if self._gathering is not None:
            self._gathering.take_part()

    def capture_image(self, *, beside: bool = False) -> Lease:
        """Captures the state, in the ring if it has room, and leases the image to the caller.

        With `beside` the ring is not used, and the memory is freed when the lease ends.

        Raises:
            StateUnsupportedError: something in the state cannot be captured.
            NoCheckpointError: all spare images are still being read.
        """
        self._ring_used = True
        with self._gathered(release=beside):
            return self._captured(beside=beside)

    def _captured(self, *, beside: bool) -> Lease:
        reason = "every image that there is room for is still being written"
        for ring in (self._spare,) if beside else (self._ring, self._spare):
            taken = ring.capture(self.state)
            if isinstance(taken, Declined) and taken.allocation_error:
                reason = f"no memory for {taken.size_bytes / _MIB:.0f} MiB: {taken.allocation_error}"
            elif isinstance(taken, Position) and (lease := ring.hold(taken.global_step)) is not None:
                self._spare.forget_after(-1)  # its memory is used again as soon as the lease ends
                return Lease(lease.image, partial(_free, lease, self._spare)) if beside else lease
        raise NoCheckpointError(reason)

    def restore_snapshot(
        self,
        target_step: int,
        refused: Callable[[], bool],
        *,
        decided: Sequence[ActiveAdjustment] | None = None,
    ) -> Restored:
        """Restores the snapshot of exactly this step, as `restore_image` does: an older one may not be sound.

        Raises NoCheckpointError if there is none.
        """
        self._ring_used = True
        lease = self._ring.lookup(target_step)
        if lease is not None and lease.image.position.global_step != target_step:
            lease.release()
            lease = None
        if lease is None:
            raise NoCheckpointError(f"the snapshot of step {target_step} has been overwritten")
        with lease as image:
            return self.restore_image(image, refused, verify=True, decided=decided)

    def restore_digest(self, digest: str, decided: Sequence[ActiveAdjustment]) -> bool:
        """Restores the snapshot with this digest before the lane has started; returns whether that is proven."""
        found = next((info for info in self._ring.snapshots() if info.digest == digest), None)
        if found is None:
            return False
        try:
            restored = self.restore_snapshot(found.position.global_step, lambda: False, decided=decided)
        except (RollbackError, SeedError, OptimizationError):
            return False
        return restored.state_digest == restored.expected_digest

    def forget_snapshots(self) -> None:
        """Drops every snapshot: they are not ancestors of the state that has been restored."""
        self._ring.clear()
        self._ring_used = True

    def restore_image(
        self,
        image: StateImage,
        refused: Callable[[], bool] | None = None,
        *,
        verify: bool = False,
        decided: Sequence[ActiveAdjustment] | None = None,
    ) -> Restored:
        """Restores an image. Without `verify` it must have been verified before, as a loaded checkpoint has.

        `refused` is called right before live state changes; True abandons the restore. The adjustments of
        learning rates that belong to the run stay in force: those of the live state, or after a crash `decided`. They
        are applied after the digest of the restored state has been computed.

        Raises:
            RestoreAbandonedError: `refused` returned True.
            RollbackError, SeedError, OptimizationError: the image does not fit. The live state is unchanged.
        """
        module, started_s = self._module, time.monotonic()
        if verify:
            image.verify()
        refused = self.before_restore(image, refused)
        in_force, from_step = module.seeds.controller.adjustments, module.global_step
        if decided is not None:
            in_force, from_step = tuple(decided), image.position.global_step
        flags = module.flags.now()
        module.clear_gradients()
        try:
            self._structure.prepare(module.global_step, image)
            staged = stage_restore(self.state, image, verify=False)
            if not self.restore_staged():
                raise RestoreAbandonedError("about to change anything")
            staged.commit(refused, self.restore_failed)
            found = self.prove(image, staged.values["parts"])
        except (KeyError, TypeError, ValueError) as error:  # the image's values are not those of this module
            self.restore_failed()
            raise StateMismatchError([f"{type(error).__name__}: {error}"]) from error
        except TolariaError:
            self.restore_failed()
            raise
        else:
            if module.averages is not None and AVERAGES not in staged.values["parts"]:
                module.averages.restart()
        finally:  # also after a failure: seeds and groups may have changed and changed back
            module.seeds.topology.advance(module.global_step)
            module.refresh()
        if decided is None and not isinstance(module.job, StatefulJob):
            module.flags.rolled_back(flags, from_step=from_step, to_step=module.global_step)
        module.skip_streak, module.undone = 0, True
        controller = module.seeds.controller
        controller.carry_over(in_force, from_step=from_step, at_step=module.global_step)
        controller.apply(module.global_step)
        self._ring.forget_after(module.global_step)
        self._ring_used = True
        module.go_on_if_patient()
        return Restored(
            position=image.position,
            state_digest=found,
            expected_digest=image.seal().total,
            restore_ms=(time.monotonic() - started_s) * 1000,
            progress=module.progress,
            seeds=tuple(module.seeds.topology.states(module.global_step)),
            learning_rates=controller.learning_rates(),
            adjustments=controller.adjustments,
            losses=json.dumps(module.losses.state_dict()),
        )

    def _digest(self, _image: StateImage, parts: Collection[str]) -> str:
        return self.state.fingerprint(only=parts).total

    def _take_snapshot(self) -> None:
        """Takes a snapshot, or reports once why there is none, and once when there is one again."""
        if not self.takes_snapshots:
            self.take_part()
            return
        if self._unsupported:
            return
        started_s, self._ring_used, reason = time.monotonic(), True, ""
        try:
            with self._gathered():
                taken = self._ring.capture(self.state)
        except StateUnsupportedError as error:
            self._unsupported, reason = True, str(error)  # the reason does not go away
        else:
            # An attempt costs time too, so the cadence bounds how often it is repeated.
            self._cadence = self._cadence.after_snapshot(time.monotonic() - started_s)
            if isinstance(taken, Declined):
                reason = _why_declined(taken)
        if reason != self._unavailable:
            self._unavailable = reason
            self._events.append(SnapshotsUnavailable(reason))

    def _gather_with(self, group: Group) -> None:
        self._gathering = Gathering(group, self.state, self.memory)
        if group.leads:
            group.snapshot_due = lambda: self.takes_snapshots and self._due(self._cadence.after_step(0.0))

    def _due(self, cadence: Cadence) -> bool:
        if self._unsupported:
            return False
        return cadence.steps_since >= self._every_steps if self._every_steps else cadence.due

    @contextmanager
    def _gathered(self, *, release: bool = False) -> Iterator[None]:
        """Spans a capture, and ends it for the ranks that take part; `release` if its memory is used once."""
        try:
            yield
        finally:
            if self._gathering is not None:
                self._gathering.done(release=release)


def _free(lease: Lease, ring: SnapshotRing) -> None:
    """Ends a lease and frees the ring's memory, but that of other leases."""
    lease.release()
    ring.clear()


def _why_declined(declined: Declined) -> str:
    """Returns why there is no snapshot; empty while images are only in use: they are released soon."""
    mib = f"{declined.size_bytes / _MIB:.0f} MiB"
    if declined.too_large:
        return f"a snapshot takes {mib}, more than rollback.memory_mb"
    return f"no memory for a snapshot of {mib}: {declined.allocation_error}" if declined.allocation_error else ""


_Groups: TypeAlias = Sequence[tuple[str, Sequence[str], GroupRole]]
"""Param groups: name, names of the parameters, role."""


class SeedStructure:
    """The seeds in the model, as the part of the state whose loading changes which parameters and groups exist.

    `prepare` names the two structures that may be loaded: the image's, and the present one, to which a failed restore
    returns.
    """

    def __init__(self, seeds: SeedTraining) -> None:
        self._seeds = seeds
        self._loadable: list[tuple[Mapping[str, JsonValue], int, _Groups]] = []

    def prepare(self, global_step: int, image: StateImage) -> None:
        """Prepares for loading the image's structure, and the present one at `global_step`."""
        values = cast("dict[str, Any]", json.loads(image.values))
        roles = {name: GroupRole(group["role"]) for name, group in values["parts"]["learning_rates"]["groups"].items()}
        named = [(str(group["options"]["name"]), group["parameters"]) for group in values["optimizer"]["groups"]]
        wanted = [(name, names, roles.get(name, GroupRole.HOST)) for name, names in named]
        present = [(plan.name, tuple(plan.parameters), plan.role) for plan in self._seeds.manager.plan()]
        structure = cast("dict[str, JsonValue]", decode_plain(values["topology"]))
        self._loadable = [(structure, image.position.global_step, wanted), (self.state_dict(), global_step, present)]

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
        found = next(((step, groups) for structure, step, groups in self._loadable if structure == state), None)
        if found is None:
            raise TopologyStateError("it is neither the image's structure nor the present one")
        global_step, groups = found
        self._seeds.topology.load_state_dict(state, global_step)
        parameters = {eager_name(name): parameter for name, parameter in self._seeds.model.named_parameters()}
        if missing := [name for _, names, _ in groups for name in names if name not in parameters]:
            raise StateMismatchError([f"parameter/{name}: its seed is not part of the structure" for name in missing])
        plans = [GroupPlan(name, {each: parameters[each] for each in names}, role) for name, names, role in groups]
        manager = self._seeds.manager
        attempted_at_step = manager.attempted_at_step  # a part of the state, which this rebuild must not change
        manager.rebuild(plans, global_step, urgent=True)
        manager.attempted_at_step = attempted_at_step
