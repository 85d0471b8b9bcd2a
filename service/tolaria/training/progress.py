"""Where the run stands, in numbers. Written by the recorder alone; status and packets are made from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from leyline.v1.admin_service_pb2 import RUN_STATE_STARTING, RunState
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from tolaria.training.judge import Health
from tolaria.training.place import EpochPlace
from tolaria.training.reports import EpochReport, StepReport
from tolaria.values.optimization import ActiveAdjustment

_BOUNDARIES_KEPT = 1024


@dataclass(slots=True)
class EpochSums:
    """Sums over the steps of one epoch."""

    steps: int = 0
    void_steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    gradient_norm: float = 0.0
    duration_s: float = 0.0
    input_wait_s: float = 0.0

    def add(self, step: StepReport) -> None:
        """Count one step; void ones count by number and time only."""
        self.duration_s += step.duration_s
        self.input_wait_s += step.input_wait_s
        self.samples += step.samples
        if step.void:
            self.void_steps += 1
            return
        self.steps += 1
        self.loss_sum += step.loss
        self.gradient_norm = step.gradient_norm

    def take_over(self, place: EpochPlace) -> None:
        """Count on from where the run has gone back to, or goes on from; times count anew."""
        self.steps, self.void_steps, self.samples = place.steps, place.void_steps, place.samples
        self.loss_sum = place.loss_sum

    @property
    def loss(self) -> float:
        """Mean loss of the finite steps; NaN before the first."""
        return self.loss_sum / self.steps if self.steps else float("nan")

    @property
    def samples_per_s(self) -> float:
        """Samples in a second of step time; 0 before the first step."""
        return self.samples / self.duration_s if self.duration_s else 0.0


@dataclass(slots=True)
class Progress:
    """The run, as the event loop knows it. Losses and accuracies are NaN until there are some."""

    run_id: str
    job: str
    experiment: str
    epochs: int
    steps_per_epoch: int
    started_at_s: float

    state: RunState.ValueType = RUN_STATE_STARTING
    state_reason: str = ""
    epoch: int = 0
    global_step: int = 0
    samples_total: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    health: Health = field(default_factory=Health)
    last_epoch: EpochReport | None = None
    training_loss: float = float("nan")

    boundaries_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_BOUNDARIES_KEPT))
    boundaries_over_budget: int = 0
    desired: list[SeedState] = field(default_factory=list)
    grafted: list[SeedState] = field(default_factory=list)
    refusals: tuple[tuple[str, str], ...] = ()
    learning_rates: dict[str, float] = field(default_factory=dict)
    adjustments: tuple[ActiveAdjustment, ...] = ()
    conflict_ratio: float = 0.0
    fast_paths: dict[str, str] = field(default_factory=dict)
    last_command: AdaptationCommand | None = None
    tamiyo_answer: str = ""
    kasmina_answer: str = ""
    tamiyo_latency_ms: float = 0.0
    kasmina_latency_ms: float = 0.0
    commands_accepted: int = 0
    commands_rejected: int = 0

    def begin_epoch(self, epoch: int) -> None:
        """Start counting for `epoch`."""
        self.epoch, self.sums = epoch, EpochSums()

    @property
    def seeds(self) -> list[SeedState]:
        """All seeds: as they are where they are in the model, else as Kasmina desires them."""
        real = {state.seed_id: state for state in self.grafted}
        wished = [real.pop(state.seed_id, state) for state in self.desired]
        return [*wished, *real.values()]

    @property
    def validation_accuracy(self) -> float:
        """Of the last evaluation, 0 to 1; NaN before the first."""
        return self.last_epoch.evaluation.accuracy if self.last_epoch else float("nan")

    @property
    def validation_loss(self) -> float:
        """Of the last evaluation; NaN before the first."""
        return self.last_epoch.evaluation.loss if self.last_epoch else float("nan")
