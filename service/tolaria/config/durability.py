"""Settings of what brings a run back: rollback, checkpoints, profiles. Must not know where values come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tolaria.config.parts import Seconds, Section

Factor = Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)]


class RollbackSettings(Section):
    """Going back: by order, or by itself when training has gone wrong."""

    fast_budget_s: Seconds = 0.5
    """From the trigger to the state brought back from memory. 0.5: peers take part, and training hardly notices."""

    full_budget_s: Seconds = 12.0
    """The same from disk. 12: gigabytes are read and checked in it."""

    memory_mb: int = Field(default=256, ge=1, le=1_000_000)
    """Memory for snapshots, in MiB of the host's, wherever the model is.

    256: five snapshots of ten million parameters with Adam.
    """

    snapshots_max: int = Field(default=5, ge=1, le=1000)
    """Snapshots kept in memory. 5: far enough back to be before a mistake that shows late."""

    every_steps: int = Field(default=0, ge=0)
    """Updates between two snapshots. 0: as often as their cost stays within overhead_max."""

    overhead_max: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of step time that snapshots may cost. 0.01: nobody sees a hundredth."""

    automatic: bool = True
    """Roll back without being asked when a step or an epoch has gone wrong. On: nobody watches at night."""

    halt_on_deadline: bool = True
    """Raise HALT when a rollback misses its budget. On: the state that somebody wanted undone is still live."""

    loss_factor: Factor = 15.0
    """A loss above this many times its moving average has exploded. 15: no bad batch of a sound run gets there."""

    norm_factor: Factor = 5.0
    """The same for the gradient norm. 5: norms swing less than losses explode."""

    accuracy_drop: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Validation accuracy this much below the run's best has collapsed. 0.2: beyond what seeds cost while they join."""

    warmup_steps: int = Field(default=20, ge=1)
    """Steps before loss and norm are judged. 20: moving averages mean nothing before."""

    automatic_max: int = Field(default=3, ge=1, le=1000)
    """Automatic rollbacks in per_steps; a further one halts. 3: what three could not mend, a fourth will not."""

    per_steps: int = Field(default=1000, ge=1)
    """Updates over which automatic_max counts."""

    lr_cut: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on learning rates after an automatic rollback. 0.5: what exploded, exploded at this rate."""

    lr_cut_steps: int = Field(default=100, ge=1)
    """Updates for which the cut holds. 100: past the point where it went wrong."""


class CheckpointSettings(Section):
    """Durable checkpoints in state.dir."""

    every_epochs: int = Field(default=1, ge=0)
    """Epochs between two checkpoints. 1: a crash costs an epoch at most. 0: none at epochs' ends.

    With every_steps 0 as well there are none at all, at a run's end neither.
    """

    every_steps: int = Field(default=0, ge=0)
    """Updates between two checkpoints, for long epochs. 0: only at epochs' ends."""

    keep_last: int = Field(default=3, ge=1, le=10_000)
    """Newest checkpoints that are kept. 3: two may be damaged."""

    best: Literal["accuracy", "loss"] = "accuracy"
    """By which validation figure one more is kept, the best. accuracy: what most jobs are for."""

    on_failure: Literal["pause", "continue"] = "pause"
    """When one cannot be written, as on a full disk: stand until it can, or train on without. Both say so in /readyz.

    pause: work that a crash would lose is not worth its power.
    """

    retry_s: Seconds = 15.0
    """After a failure, time until the next try; once one succeeds the run goes on. 15: soon after the mending."""


class ProfilerSettings(Section):
    """Traces of a few steps at a time, for chrome://tracing or Perfetto, in state.dir/traces."""

    active_steps: int = Field(default=5, ge=1, le=1000)
    """Updates in a trace that nobody gave a number for. 5: enough to see what repeats."""

    every_steps: int = Field(default=0, ge=0)
    """Updates between two traces taken by themselves. 0: only when asked for."""

    traces_mb: int = Field(default=256, ge=1, le=1_000_000)
    """Size of all traces together, in MiB; the oldest go first. 256: dozens of traces of small models."""
