"""The figures of a run so far, the status for operators and the packet for the controller."""

from __future__ import annotations

import math
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Final

import anyio

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import HardwareContext, SystemStatePacket
from tolaria import __version__
from tolaria.images import SnapshotInfo
from tolaria.lane.messages import EpochDone, LaneReady, OptimizerChanged, Restored, StepDone
from tolaria.run.pace import EpochSums, Pace
from tolaria.values.lineage import BranchOrigin
from tolaria.values.loss_window import Averages
from tolaria.values.optimization import ActiveAdjustment
from tolaria.values.seeds import FOSSILIZED, FOSSILIZED_LEFT, NO_LIMITS, SLOTS_FREE, SeedLimits, count_in
from tolaria.values.training import RankInfo

PACKET_VERSION: Final = 1
_BOUNDARIES_KEPT: Final = 1024
_STEP_MAX: Final = 2**64 - 1  # of the contract's uint64
_ENDED: Final = frozenset({admin.RUN_STATE_FINISHED, admin.RUN_STATE_FAILED})


class StatusFeed:
    """Wakes everything that waits for a change of the run. Used on the event loop only."""

    def __init__(self) -> None:
        self._change = anyio.Event()
        self.version = 0

    def changed(self) -> None:
        """Wakes all current waiters."""
        self.version += 1
        self._change.set()
        self._change = anyio.Event()

    async def next(self) -> None:
        """Waits for the next change."""
        await self._change.wait()

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Waits until `predicate()` is true after a change; returns at once if it is now."""
        while not predicate():
            await self._change.wait()


@dataclass(slots=True)
class RunStatus:
    """The run as the event loop knows it. Losses and accuracies are NaN before the first."""

    run_id: str
    job: str
    experiment: str
    epochs: int
    started_at_s: float

    steps: int = 0
    """Steps after which the run ends; 0: `epochs` says when."""
    feed: StatusFeed = field(default_factory=StatusFeed)
    pace: Pace = field(default_factory=Pace)
    state: admin.RunState.ValueType = admin.RUN_STATE_STARTING
    state_reason: str = ""
    steps_per_epoch: int = 0
    epoch: int = 0
    global_step: int = 0
    samples_total: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    last_epoch: EpochDone | None = None
    training_loss: float = float("nan")
    snapshots: tuple[SnapshotInfo, ...] = ()
    snapshots_unavailable: str = ""
    rollbacks_by_origin: dict[str, int] = field(default_factory=dict)
    """Rollbacks of the run that have restored a state, also those of earlier processes."""
    best_step: int = 0
    skipped_steps: int = 0
    """Both are those of the health checks, which keep them through rollbacks and restarts."""
    attempt: int = 1
    newest_proven_step: int | None = None
    recovering: str = ""
    """Why the run has no lane at present; empty if it has one."""
    draining: str = ""
    """Why the service is about to end; empty while it is not."""
    lane_phase: Callable[[], tuple[str, float]] = lambda: ("", 0.0)
    """Returns what the lane does other than steps, and for how many seconds; an empty text if it is stepping."""

    boundaries_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_BOUNDARIES_KEPT))
    boundaries_over_budget: int = 0
    desired: list[SeedState] = field(default_factory=list)
    grafted: list[SeedState] = field(default_factory=list)
    refusals: tuple[tuple[str, str], ...] = ()
    slots: tuple[str, ...] = ()
    seed_limits: SeedLimits = NO_LIMITS
    learning_rates: dict[str, float] = field(default_factory=dict)
    schedule: str = ""  # of learning rates, if the job gives one
    adjustments: tuple[ActiveAdjustment, ...] = ()
    conflict_ratio: float = 0.0
    fast_paths: dict[str, str] = field(default_factory=dict)
    evaluates: bool = True
    branch: BranchOrigin | None = None
    data_skips: int = 0
    """Number of skips of data that operators have made and not undone."""
    ranks: tuple[RankInfo, ...] = ()
    last_command: AdaptationCommand | None = None
    logged: dict[str, float] = field(default_factory=dict)
    """What the job has logged, by name, each of the newest step that logged it."""
    tamiyo_answer: str = ""
    kasmina_answer: str = ""
    tamiyo_latency_ms: float = 0.0
    kasmina_latency_ms: float = 0.0
    kasmina_export_ms: float = 0.0
    commands_accepted: int = 0
    commands_rejected: int = 0

    @property
    def seeds(self) -> list[SeedState]:
        """All seeds: those in the model with their actual state, others with the state that Kasmina desires.

        A desired seed that the model refuses is not one of them.
        """
        grafted = {state.seed_id: state for state in self.grafted}
        refused = {seed_id for seed_id, _ in self.refusals} - grafted.keys()
        desired = [grafted.pop(state.seed_id, state) for state in self.desired if state.seed_id not in refused]
        return [*desired, *grafted.values()]

    @property
    def slots_free(self) -> int:
        """Number of slots in which a seed can be grafted; 0 for a model without slots, or if seeds are disabled."""
        if not self.seed_limits.active:
            return 0
        taken = {seed.slot for seed in self.grafted if seed.stage not in FOSSILIZED}
        return sum(slot not in taken for slot in self.slots)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks that have restored a state."""
        return sum(self.rollbacks_by_origin.values())

    @property
    def validation_accuracy(self) -> float:
        """Accuracy of the last evaluation, 0 to 1; NaN before the first."""
        return self.last_epoch.evaluation.accuracy if self.last_epoch else float("nan")

    @property
    def validation_loss(self) -> float:
        """Loss of the last evaluation; NaN before the first."""
        return self.last_epoch.evaluation.loss if self.last_epoch else float("nan")

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds until the run is complete, if it trains; None if not, or until some steps are known."""
        if self.state != admin.RUN_STATE_RUNNING or self.recovering:
            return None
        length = max(1, self.steps_per_epoch)
        steps = self.steps - self.global_step
        if not self.steps:
            taken = self.sums.steps + self.sums.skipped_steps
            steps = (self.epochs - self.epoch) * length + max(0, length - taken)
        return self.pace.remaining_s(steps, steps / length)

    def regraft(self, states: Iterable[SeedState]) -> None:
        """Adopts changed seeds, and keeps what was measured of them in the last epoch."""
        known = {state.seed_id: state for state in self.grafted}
        self.grafted = []
        for state in states:
            adopted = SeedState()
            adopted.CopyFrom(state)
            if (before := known.get(state.seed_id)) is not None:
                adopted.gradient_norm, adopted.learning_rate = before.gradient_norm, before.learning_rate
                adopted.metrics.update(
                    {name: before.metrics[name] for name in before.metrics if name not in state.metrics}
                )
            self.grafted.append(adopted)

    def ready(self, ready: LaneReady) -> None:
        """Adopts what the lane has built."""
        self.steps_per_epoch = ready.steps_per_epoch
        self.fast_paths = dict(ready.fast_paths)
        self.slots, self.ranks, self.schedule = ready.slots, ready.ranks, ready.schedule
        self.evaluates = ready.evaluates
        self.rewind(ready)

    def adjusted(self, change: OptimizerChanged) -> None:
        """Adopts adjusted learning rates."""
        self.learning_rates.update(change.after)
        self.adjustments = change.adjustments

    def rolled_back(self, origin: str) -> None:
        """Counts a rollback that has restored its state, by its origin."""
        self.rollbacks_by_origin[origin] = self.rollbacks_by_origin.get(origin, 0) + 1

    def begin_epoch(self, epoch: int) -> None:
        """Starts the sums of `epoch`."""
        self.epoch, self.sums = epoch, EpochSums()

    def step(self, step: StepDone) -> None:
        """Counts a step."""
        self.sums.add(step)
        self.pace.step(step)
        if step.logged:
            self.logged.update(step.logged)
        self.global_step = step.global_step
        self.samples_total += step.samples

    def epoch_done(self, epoch: EpochDone) -> None:
        """Adopts the figures of an epoch."""
        self.last_epoch = epoch
        self.pace.epoch(epoch)
        self.training_loss = epoch.training_loss
        self._take_over(epoch)
        if epoch.compile_fallback:
            self.fast_paths["compile"] = f"off: {epoch.compile_fallback}"
        if epoch.gradients is not None:
            self.conflict_ratio = epoch.gradients.conflict_ratio

    @property
    def samples_per_s(self) -> float:
        """Samples per second of the steps of this epoch, or, before its first one, of the last epoch's."""
        if self.sums.duration_s or self.last_epoch is None or not self.last_epoch.steps_s:
            return self.sums.samples_per_s
        return self.last_epoch.samples / self.last_epoch.steps_s

    def rewind(self, to: LaneReady | Restored) -> None:
        """Adopts the state in which the lane was built, or which it has restored."""
        progress = to.progress
        self.global_step, self.epoch = to.position.global_step, progress.number
        self.sums = EpochSums(progress.steps, progress.skipped_steps, progress.samples, progress.loss_sum)
        self.logged.clear()
        self._take_over(to)

    def boundary(self, held_up_ms: float, *, breach: bool) -> None:
        """Counts an epoch boundary that held training up for `held_up_ms`."""
        self.boundaries_ms.append(held_up_ms)
        self.boundaries_over_budget += breach

    def _take_over(self, source: LaneReady | EpochDone | Restored) -> None:
        self.grafted = list(source.seeds)
        self.learning_rates, self.adjustments = dict(source.learning_rates), source.adjustments


def state_name(state: admin.RunState.ValueType) -> str:
    """Returns the state in lower case without its prefix, as labels and messages show it."""
    return admin.RunState.Name(state).removeprefix("RUN_STATE_").lower()


def epoch_packet(status: RunStatus, averages: Averages, epoch: EpochDone, *, wall_ns: int) -> SystemStatePacket:
    """Returns the packet for the boundary after `epoch`. `wall_ns` is Unix time."""
    sums = status.sums
    steps = max(1, sums.steps + sums.skipped_steps)
    packet = _packet(status, epoch.epoch, epoch.global_step, epoch.training_loss, wall_ns)
    packet.validation_accuracy = _known(epoch.evaluation.accuracy)
    packet.validation_loss = epoch.evaluation.loss  # NaN where nothing is evaluated: 0 would be a perfect model
    packet.hardware_context.CopyFrom(epoch.hardware)
    packet.training_metrics.update(
        _average_metrics(averages)
        | {
            "loss": epoch.training_loss,
            "accuracy": _known(epoch.evaluation.accuracy),
            "gradient_norm": sums.gradient_norm,
            "samples_per_s": sums.samples_per_s,
            "latency_ms": epoch.steps_s * 1000,
            "grad_conflict_rate": status.conflict_ratio,
            "optimizer_lr": next(iter(epoch.learning_rates.values()), 0.0),
            "optimizer_momentum": epoch.momentum,
            "input_wait_ms": sums.input_wait_s * 1000 / steps,
            "step_latency_ms": sums.duration_s * 1000 / steps,
            "tamiyo_latency_ms": status.tamiyo_latency_ms,
            "kasmina.apply_ms": status.kasmina_latency_ms,
            "kasmina.finalize_ms": status.kasmina_export_ms,
            "hook_latency_ms": status.boundaries_ms[-1] if status.boundaries_ms else 0.0,
            "h2d_copy_ms": sums.copy_s * 1000 / steps,
        }
        | {f"validation.{name}": ratio.value for name, ratio in epoch.evaluation.ratios().items()}
        | {f"validation.{name}": value for name, value in epoch.evaluation.set_figures().items()}
        | _hardware_metrics(epoch.hardware)
    )
    return packet


def step_packet(status: RunStatus, averages: Averages, step: StepDone, *, wall_ns: int) -> SystemStatePacket:
    """Returns the packet between epochs: the last validation's figures, and this step's own loss."""
    packet = _packet(status, step.epoch, step.global_step, step.loss, wall_ns)
    packet.validation_accuracy = _known(status.validation_accuracy)
    packet.validation_loss = _known(status.validation_loss)
    packet.training_metrics.update(
        _average_metrics(averages)
        | {
            "loss": step.loss,
            "gradient_norm": step.gradient_norm,
            "samples_per_s": status.sums.samples_per_s,
            "step_latency_ms": step.duration_s * 1000,
        }
    )
    return packet


def status_message(status: RunStatus, *, now_s: float) -> admin.GetStatusResponse:
    """Returns the run's part of the answer to GetStatus, without its health; figures that do not exist yet are 0."""
    boundaries = sorted(status.boundaries_ms)
    phase, phase_s = phase_of(status)
    state, reason = state_of(status)
    return admin.GetStatusResponse(
        run_id=status.run_id,
        state=state,
        state_reason=reason,
        job=status.job,
        epoch=status.epoch,
        epochs=status.epochs,
        steps=status.steps,
        remaining_s=status.remaining_s,
        unevaluated=not status.evaluates,
        data_skips=status.data_skips,
        branched_from=None if status.branch is None else admin.BranchOrigin(**asdict(status.branch)),
        global_step=status.global_step,
        epoch_step=status.sums.steps + status.sums.skipped_steps,
        steps_per_epoch=status.steps_per_epoch,
        samples_total=status.samples_total,
        samples_per_s=status.samples_per_s,
        training_loss=_known(status.sums.loss if status.sums.steps else status.training_loss),
        validation_accuracy=_known(status.validation_accuracy),
        validation_loss=_known(status.validation_loss),
        validation_metrics={} if status.last_epoch is None else status.last_epoch.evaluation.figures(),
        logged=status.logged,
        seeds=status.seeds,
        last_boundary_ms=status.boundaries_ms[-1] if boundaries else 0.0,
        boundary_ms_p50=quantile(boundaries, 0.50),
        boundary_ms_p99=quantile(boundaries, 0.99),
        boundaries_over_budget=status.boundaries_over_budget,
        last_command=status.last_command,
        tamiyo_answer=status.tamiyo_answer,
        kasmina_answer=status.kasmina_answer,
        commands_accepted=status.commands_accepted,
        commands_rejected=status.commands_rejected,
        rollbacks=status.rollbacks,
        rollbacks_by_origin=status.rollbacks_by_origin,
        best_step=status.best_step,
        skipped_steps=status.skipped_steps,
        attempt=status.attempt,
        newest_proven_step=status.newest_proven_step,
        phase=phase,
        phase_s=phase_s,
        version=__version__,
        uptime_s=now_s - status.started_at_s,
        learning_rates=status.learning_rates,
        learning_rate_schedule=status.schedule,
        fast_paths=status.fast_paths,
        ranks=_ranks(status),
        adjustments=[_adjustment(active) for active in status.adjustments],
    )


def state_of(status: RunStatus) -> tuple[admin.RunState.ValueType, str]:
    """Returns the state as operators see it, and its reason."""
    recovering = bool(status.recovering) and status.state == admin.RUN_STATE_RUNNING
    reasons = ("" if recovering else status.state_reason, "" if status.state in _ENDED else status.recovering)
    shown = admin.RUN_STATE_RECOVERING if recovering else status.state
    if status.draining and status.state not in _ENDED:
        shown = admin.RUN_STATE_DRAINING
    return shown, "; ".join(filter(None, reasons))


def phase_of(status: RunStatus) -> tuple[str, float]:
    """Returns what the lane does other than steps, and for how many seconds; an empty text once the run has ended."""
    return ("", 0.0) if status.state in _ENDED else status.lane_phase()


def _ranks(status: RunStatus) -> list[admin.RankStatus]:
    loads = status.last_epoch.rank_loads if status.last_epoch is not None else ()
    if len(loads) != len(status.ranks):  # the group has another size now, or is one process
        return [admin.RankStatus(**asdict(rank)) for rank in status.ranks]
    return [admin.RankStatus(**asdict(rank), **asdict(load)) for rank, load in zip(status.ranks, loads, strict=True)]


def _packet(status: RunStatus, epoch: int, step: int, loss: float, wall_ns: int) -> SystemStatePacket:
    packet = SystemStatePacket(
        version=PACKET_VERSION,
        current_epoch=epoch,
        timestamp_ns=wall_ns,
        seed_states=status.grafted,
        packet_id=uuid.uuid4().hex,
        global_step=step,
        training_loss=loss,
        source_subsystem="tolaria",
        training_run_id=status.run_id,
        experiment_name=status.experiment,
    )
    packet.training_metrics[SLOTS_FREE] = status.slots_free
    fossilized = count_in(FOSSILIZED, status.grafted)
    packet.training_metrics[FOSSILIZED_LEFT] = max(0, status.seed_limits.fossilized - fossilized)
    return packet


def _average_metrics(averages: Averages) -> dict[str, float]:
    return {
        "loss_delta": averages.loss_delta,
        "loss_ewma": averages.loss,
        "loss_volatility": math.sqrt(averages.loss_variance),
        "grad_norm_ewma": averages.gradient_norm,
        "grad_var": averages.gradient_norm_variance,
    }


def _hardware_metrics(hardware: HardwareContext) -> dict[str, float]:
    """Returns the use of processor and GPU; that of a GPU is 0 without one."""
    is_cpu = hardware.device_type == "cpu"
    cpu_percent = hardware.utilization_percent if is_cpu else 100.0 * os.getloadavg()[0] / (os.cpu_count() or 1)
    return {
        "cpu_util_percent": min(100.0, cpu_percent),
        "gpu_util_percent": 0.0 if is_cpu else hardware.utilization_percent,
        "gpu_mem_free_gb": 0.0 if is_cpu else hardware.available_memory_gb,
        "gpu_mem_used_gb": 0.0 if is_cpu else hardware.total_memory_gb - hardware.available_memory_gb,
    }


def _adjustment(active: ActiveAdjustment) -> admin.LearningRateAdjustment:
    adjustment = active.adjustment
    expires_after = adjustment.expires_after_steps
    message = admin.LearningRateAdjustment(
        group=adjustment.group or "",
        origin=adjustment.origin,
        request_id=adjustment.request_id,
        reason=adjustment.reason,
        from_step=active.at_step,
        expires_at_step=min(active.at_step + expires_after, _STEP_MAX) if expires_after else 0,
    )
    if adjustment.factor is not None:
        message.factor = adjustment.factor
    if adjustment.value is not None:
        message.value = adjustment.value
    return message


def _known(value: float) -> float:
    """Returns 0 for NaN, which JSON does not have."""
    return 0.0 if math.isnan(value) else value


def quantile(ordered: list[float], share: float) -> float:
    """Returns the quantile by nearest rank; 0 if there are no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
