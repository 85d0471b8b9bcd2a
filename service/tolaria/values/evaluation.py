"""Evaluations: sums over evaluated samples, and metrics that a job names, with the way in which each is averaged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from tolaria.config.fields import METRIC_NAME

METRICS_MAX: Final = 64
"""Number of metrics that a job may name: each is a time series in Prometheus."""

RESERVED: Final = frozenset({"loss", "accuracy"})
"""The names of the figures that every evaluation has."""

_NAME: Final = re.compile(METRIC_NAME)


def metric_name_problem(name: object) -> str | None:
    """Returns why this cannot be the name of a metric; None if it can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{name!r} is not a name of 1 to 64 letters, digits, underscores, dots, dashes and slashes"
    return f"{name!r} is the name of a figure that every evaluation has" if name in RESERVED else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric as a quotient of two sums over a batch, which are added up over batches and ranks before it is taken.

    A loss by token is `Ratio(loss_sum, tokens)`; perplexity `Ratio(loss_sum, tokens, exponential=True)`, e to the power
    of the quotient; F1 `Ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives)`.
    """

    total: float
    weight: float
    exponential: bool = False

    @property
    def value(self) -> float:
        """The metric; NaN without weight, infinite if it is too large for a float."""
        if not self.weight:
            return math.nan
        quotient = self.total / self.weight
        if not self.exponential:
            return quotient
        try:
            return math.exp(quotient)
        except OverflowError:
            return math.inf

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.weight + other.weight, self.exponential or other.exponential)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over evaluated samples: loss, correct predictions, samples; and metrics by name.

    `correct` is None where a job does not count them. A metric that is a plain number is the mean over the samples of
    the batch, and averaged over batches by their samples; a `Ratio` says itself how it is averaged.
    """

    loss_sum: float
    correct: int | None = None
    samples: int = 0
    metrics: Mapping[str, float | Ratio] = field(default_factory=dict)

    def __add__(self, other: Evaluation) -> Evaluation:
        mine, theirs = self.ratios(), other.ratios()
        return Evaluation(
            self.loss_sum + other.loss_sum,
            _sum(self.correct, other.correct),
            self.samples + other.samples,
            mine | {name: mine[name] + ratio if name in mine else ratio for name, ratio in theirs.items()},
        )

    def beside(self, name: str, other: Evaluation) -> Evaluation:
        """Returns this evaluation with the figures of another one as metrics named NAME/FIGURE."""
        figures = {"loss": Ratio(other.loss_sum, other.samples), **other.ratios()}
        if other.correct is not None:
            figures["accuracy"] = Ratio(other.correct, other.samples)
        return replace(self, metrics={**self.metrics, **{f"{name}/{each}": found for each, found in figures.items()}})

    def ratios(self) -> dict[str, Ratio]:
        """Returns the metrics that the job names, as quotients."""
        return {
            name: given if isinstance(given, Ratio) else Ratio(given * self.samples, self.samples)
            for name, given in self.metrics.items()
        }

    def figures(self) -> dict[str, float]:
        """Returns loss, accuracy if it is counted, and the job's metrics, by name."""
        accuracy = {} if self.correct is None else {"accuracy": self.accuracy}
        return {"loss": self.loss} | accuracy | {name: ratio.value for name, ratio in self.ratios().items()}

    @property
    def loss(self) -> float:
        """The mean loss per sample; NaN without samples."""
        return self.loss_sum / self.samples if self.samples else float("nan")

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions, 0 to 1; 0 without samples, NaN if they are not counted."""
        if not self.samples:
            return 0.0
        return math.nan if self.correct is None else self.correct / self.samples


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None and other is None else (one or 0) + (other or 0)
