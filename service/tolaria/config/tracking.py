"""Settings of metrics over the steps of a run: the log in `state.dir`, and trackers such as TensorBoard."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from tolaria.config.fields import Seconds, Section


def _names(given: object) -> object:
    """Splits a text at its commas; other values are for pydantic."""
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


class TrackingSettings(Section):
    """Metrics over the steps of a run: the log in state.dir, and trackers, which are fed from it."""

    trackers: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """Trackers that are fed, each in a process: tensorboard, mlflow, wandb, or another entry point of tolaria.trackers.

    Names with commas between them. Each needs its extra, such as tolaria[tensorboard]. Empty: the log alone.
    """

    options: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Options by tracker, such as tracking.options.mlflow.uri; docs/tracking.md lists them. Empty: the defaults."""

    every_steps: int = Field(default=10, ge=1, le=10**9)
    """Optimizer updates from one point of the training metrics to the next. 10: curves with 1000 points soon.

    Evaluations, seeds and annotations are recorded whenever they happen.
    """

    log_mb: int = Field(default=64, ge=0, le=1_000_000)
    """Size of the log of metrics, state.dir/metrics, of which the oldest part is removed. 0: no log, and no trackers.

    64: half a million points.
    """

    timeout_s: Seconds = 120.0
    """Time without progress after which a tracker's process is started again. 120: uploads may be slow."""

    close_s: Seconds = 10.0
    """Time that trackers get at the end for what is left; within service.drain_timeout_s. 10: a last upload."""

    @model_validator(mode="after")
    def _check_log(self) -> Self:
        if self.trackers and not self.log_mb:
            raise ValueError("tracking.log_mb is 0, but tracking.trackers are fed from that log")
        return self
