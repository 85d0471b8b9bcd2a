"""Sections about surviving failures: state directory, signal board, emergencies, rollback, checkpoints, profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tolaria.config.fields import LIVE, BestMetric, PositiveShare, Seconds, SecondsOrZero, Section


class HealthSettings(Section):
    """Checks of the health of training."""

    policy: Literal["full", "skip", "watch"] = "full"
    """What follows from bad steps. full: skip them, roll back from explosions. skip: skip them, roll back never.

    watch: train on, and report; only steps whose loss or gradients are not finite are skipped, and nothing halts the
    run. full: an unattended run has to recover by itself.
    """

    skips_max: int = Field(default=8, ge=1)
    """Consecutive skipped (non-finite) steps after which the parameters are checked. 8: a bad shard passes."""

    skips_data_max: int = Field(default=256, ge=1)
    """Consecutive skipped steps that halt the run if its parameters are sound. 256: much bad data needs a person."""

    skip_extreme: bool = True
    """Skip steps whose loss is finite but extreme among the recent ones. On: one can ruin an optimizer's averages.

    More than one in a row, up to skips_max - 1, if the last good batch still has a healthy loss. Off for data in which
    such losses are rare but real; steps that are not finite are skipped all the same.
    """

    window: int = Field(default=256, ge=16, le=100_000)
    """Healthy losses with which new losses are compared. 256: rare large losses of sound runs are among them."""

    @property
    def skips_extreme(self) -> bool:
        """Whether steps whose loss is extreme are skipped."""
        return self.skip_extreme and self.policy != "watch"


class EmergencySettings(Section):
    """Emergencies: detection of hangs and failures, escalation, recovery."""

    sentinel: bool = True
    """Watch the heartbeats from a separate process. On: a process that hangs cannot detect it."""

    heartbeat_timeout_s: Seconds = 30.0
    """Time without a heartbeat of the event loop or the lane that is an emergency. 30: few microbatches take longer.

    The lane may be silent for ten times its longest step, and for phase_timeout_s in some phases.
    """

    startup_allowance_s: Seconds = 60.0
    """Time after the start in which missing heartbeats are ignored. 60: modules load and caches are filled."""

    phase_timeout_s: Seconds = 600.0
    """Time without a heartbeat while the lane loads data, evaluates, compiles or starts. 600: large models compile."""

    grace_s: Seconds = 10.0
    """Time from the emergency to SIGTERM. 10: long enough to dump stacks, and for a short stall to end."""

    drain_s: Seconds = 15.0
    """Time from SIGTERM to SIGKILL. 15: longer than service.drain_timeout_s, which a working service needs at most."""

    broadcasts_per_minute: int = Field(default=60, ge=1, le=6000)
    """Broadcasts sent immediately; further ones are merged, and none is dropped. 60: a person cannot read more."""

    failed_epochs_max: int = Field(default=3, ge=1)
    """Consecutive failed epochs after which training halts. 3: two can be a coincidence."""

    recovery_epochs: int = Field(default=3, ge=1)
    """Consecutive healthy epochs that clear a failed epoch. 3: as many as failures open a circuit breaker."""


class SignalsSettings(Section):
    """The signal board: emergencies and heartbeats in memory shared with peers on this machine."""

    path: str = Field(default="", max_length=4096)
    """File of the board. Empty: /dev/shm/tolaria-<run id>. Peers in containers need a path that is known beforehand."""

    def board(self, run_id: str) -> Path:
        """Returns the path of a run's board."""
        return Path(self.path) if self.path else Path("/dev/shm") / f"tolaria-{run_id}"  # noqa: S108 - mode 0600


class StateSettings(Section):
    """The state directory, with checkpoints and journal."""

    dir: str = Field(default="state", min_length=1, max_length=4096)
    """Path, created if missing. state: relative to the working directory, where a container mounts a volume."""

    resume: Literal["auto", "never"] = "auto"
    """auto: continue an unfinished run from its newest checkpoint, so that restarts lose little. never: start anew."""


class RollbackSettings(Section):
    """Rollback, on request and automatic."""

    fast_budget_s: Annotated[Seconds, LIVE] = 0.5
    """Time from the step boundary until the state is restored from memory. 0.5: enough for the peers to take part."""

    full_budget_s: Annotated[Seconds, LIVE] = 12.0
    """Time from the step boundary until the state is restored from disk. 12: enough to read and verify gigabytes.

    Before it, saving the state that an operator's rollback leaves may take as long.
    """

    memory_mb: int = Field(default=256, ge=1, le=1_000_000)
    """Host memory for snapshots, in MiB. What several of them share, such as frozen parameters, counts once.

    256: two snapshots of a model of ten million parameters with Adam.
    """

    snapshots_max: int = Field(default=5, ge=1, le=1000)
    """Snapshots kept in memory. 5: the oldest one predates a fault that is detected late."""

    every_steps: int = Field(default=0, ge=0)
    """Optimizer updates between two snapshots. 0: as often as overhead_max allows."""

    replicas: int = Field(default=0, ge=0, le=1)
    """Copies of the newest snapshots in the memory of another machine of the group, for when this one's memory is lost.

    0: a service that starts again without this memory goes on from the newest checkpoint. 1 needs lane.nodes with
    several machines, on each of them memory for up to three snapshots, and on the first one for one more.
    """

    replica_mb_per_s: Annotated[float, Field(ge=0.1, le=100_000, allow_inf_nan=False)] = 32.0
    """Bandwidth that replicas may use, in megabytes a second. 32: a quarter of a gigabit link, and a tenth of a core.

    The newest replica is up to three times as old as it takes to send a snapshot.
    """

    overhead_max: PositiveShare = 0.01
    """Share of the step time that snapshots may take. 0.01: one percent is not noticeable."""

    automatic: Annotated[bool, LIVE] = True
    """Roll back without a request after a failed step or epoch. On: unattended runs have to recover by themselves."""

    accuracy_drop: Annotated[PositiveShare, LIVE] = 0.2
    """Drop in validation accuracy from the best epoch that counts as a collapse. 0.2: more than a new seed costs."""

    automatic_max: Annotated[int, LIVE] = Field(default=3, ge=1, le=1000)
    """Automatic rollbacks within per_steps; one more halts the run. 3: a fourth would not help either."""

    per_steps: Annotated[int, LIVE] = Field(default=1000, ge=1)
    """Window of automatic_max, in optimizer updates. 1000: covers a fault that returns after each rollback."""

    lr_cut: Annotated[PositiveShare, LIVE] = 0.5
    """Factor on the learning rates after an automatic rollback. 0.5: the old rate led to the explosion."""

    lr_cut_steps: Annotated[int, LIVE] = Field(default=100, ge=1)
    """Optimizer updates for which lr_cut applies. 100: past the step at which training failed."""

    progress_rollbacks_max: Annotated[int, LIVE] = Field(default=5, ge=1, le=1000)
    """Rollbacks in a row without a new highest step that halt the run. 5: a run in a circle needs a person."""


class CheckpointSettings(Section):
    """Checkpoints on disk, in state.dir."""

    every_epochs: Annotated[int, LIVE] = Field(default=1, ge=0)
    """Epochs between two checkpoints; 0: none at epoch boundaries. 1: a crash loses at most one epoch.

    If every_steps is 0 too, no checkpoints are written, not even at the end of the run or before a rollback.
    """

    every_steps: Annotated[int, LIVE] = Field(default=0, ge=0)
    """Optimizer updates between two checkpoints, for long epochs. 0: at epoch boundaries only."""

    keep_last: Annotated[int, LIVE] = Field(default=3, ge=1, le=10_000)
    """Newest checkpoints that are kept. 3: one remains if two are damaged."""

    keep_superseded: Annotated[int, LIVE] = Field(default=2, ge=0, le=1000)
    """Newest superseded checkpoints that are kept, so that a rollback can be undone. 2: the last ones before it."""

    keep_superseded_s: Annotated[SecondsOrZero, LIVE] = 86_400.0
    """Time for which superseded checkpoints are kept. 86400: a day, time to review a rollback."""

    best: BestMetric = "accuracy"
    """Validation metric that selects one more checkpoint to keep, the best; evaluations are judged by it too.

    accuracy, loss, or one that the job names, such as perplexity:min or f1:max; of a validation set by SET/NAME:min or
    max. training/loss:min is the mean loss of the epoch's steps, and training/NAME:min what the job has logged last; no
    evaluation is judged by these. accuracy: what most jobs optimize; of a job that counts none, the one with the lowest
    loss is kept.
    """

    on_failure: Annotated[Literal["pause", "continue"], LIVE] = "pause"
    """When a checkpoint cannot be written: pause until it can, or train on. Both are reported by /readyz.

    pause: training that a crash would lose is wasted.
    """

    @property
    def best_name(self) -> str:
        """The name of the metric of `best`."""
        return self.best.rpartition(":")[0] or self.best

    @property
    def best_is_highest(self) -> bool:
        """Whether a higher value of the metric of `best` is better."""
        return self.best.endswith(":max") or self.best == "accuracy"

    @property
    def best_of_training(self) -> bool:
        """Whether the metric of `best` is one of training, not of evaluations."""
        return self.best.startswith("training/")

    retry_s: Annotated[Seconds, LIVE] = 15.0
    """Time from a failed write to the next attempt; a success resumes the run. 15: soon after space is available."""


class ProfilerSettings(Section):
    """Traces of a few steps, for chrome://tracing or Perfetto, in state.dir/traces."""

    active_steps: Annotated[int, LIVE] = Field(default=5, ge=1, le=1000)
    """Optimizer updates in a trace whose request gives no number. 5: enough to see what repeats."""

    every_steps: Annotated[int, LIVE] = Field(default=0, ge=0)
    """Optimizer updates between two automatic traces. 0: traces are taken on request only."""

    traces_mb: int = Field(default=256, ge=1, le=1_000_000)
    """Size of all traces together, in MiB; the oldest are deleted. 256: dozens of traces of a small model."""
