"""Judges the run's health from step reports. Pure: facts in, a verdict out; enacting it is the loop's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tolaria.training.reports import StepReport

# Weight of the newest step in the moving averages: about the last twenty steps count.
EWMA_WEIGHT = 0.05
_NORM_MIN = 1e-12


@dataclass(frozen=True, slots=True)
class Health:
    """Moving averages over finite steps, and how many steps in a row were void.

    The logarithm of the gradient norm has averages of its own: norms scatter by factors rather than by differences.
    """

    loss_ewma: float = 0.0
    loss_variance: float = 0.0
    gradient_norm_ewma: float = 0.0
    gradient_norm_variance: float = 0.0
    log_norm_ewma: float = 0.0
    log_norm_variance: float = 0.0
    loss_delta: float = 0.0
    finite_steps: int = 0
    void_streak: int = 0


@dataclass(frozen=True, slots=True)
class Proceed:
    """Go on."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Hold the run for an operator."""

    reason: str


Verdict = Proceed | Hold


def observe(health: Health, step: StepReport) -> Health:
    """The health after one more step. Averages and variances are exponentially weighted (Finch 2009, section 9)."""
    if step.rescaled:
        return health
    if step.void:
        return replace(health, void_streak=health.void_streak + 1)
    if health.finite_steps == 0:
        return Health(
            loss_ewma=step.loss,
            gradient_norm_ewma=step.gradient_norm,
            log_norm_ewma=_log(step.gradient_norm),
            finite_steps=1,
        )
    loss_off = step.loss - health.loss_ewma
    norm_off = step.gradient_norm - health.gradient_norm_ewma
    log_off = _log(step.gradient_norm) - health.log_norm_ewma
    keep = 1.0 - EWMA_WEIGHT
    return Health(
        loss_ewma=health.loss_ewma + EWMA_WEIGHT * loss_off,
        loss_variance=keep * (health.loss_variance + EWMA_WEIGHT * loss_off * loss_off),
        gradient_norm_ewma=health.gradient_norm_ewma + EWMA_WEIGHT * norm_off,
        gradient_norm_variance=keep * (health.gradient_norm_variance + EWMA_WEIGHT * norm_off * norm_off),
        log_norm_ewma=health.log_norm_ewma + EWMA_WEIGHT * log_off,
        log_norm_variance=keep * (health.log_norm_variance + EWMA_WEIGHT * log_off * log_off),
        loss_delta=loss_off,
        finite_steps=health.finite_steps + 1,
    )


def forgive(health: Health) -> Health:
    """The health after an operator has looked at it: the row of void steps starts anew."""
    return replace(health, void_streak=0)


def judge(health: Health, *, void_steps_max: int) -> Verdict:
    """Hold once `void_steps_max` steps in a row were not finite: more steps would only burn power."""
    if health.void_streak >= void_steps_max:
        return Hold(f"{health.void_streak} steps in a row were not finite")
    return Proceed()


def _log(norm: float) -> float:
    """The logarithm of a norm; of none at all, that of one too small to matter."""
    return math.log(max(norm, _NORM_MIN))
