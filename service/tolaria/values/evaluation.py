"""Evaluations: sums over evaluated samples, and metrics that a job names, with the way in which each is averaged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tolaria.config.fields import METRIC_NAME

METRICS_MAX: Final = 64
"""Number of metrics that a job may name: each is a time series in Prometheus."""

SETS_MAX: Final = 16
"""Number of validation sets that a job may name: each has all metrics."""

TRAINING: Final = "training"
"""The part before the slash in the names of metrics of training, as a set's name is in those of evaluations."""

AVERAGES: Final = "ema"
"""Before the figures of the moving average of the weights, as NAME/FIGURE."""

RESERVED: Final = frozenset({"loss", "accuracy"})
"""The names of the figures that every evaluation has."""

_NAME: Final = re.compile(METRIC_NAME)
_SET_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


def metric_name_problem(name: object) -> str | None:
    """Returns why this cannot be the name of a metric; None if it can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{name!r} is not a name of 1 to 64 letters, digits, underscores, dots, dashes and slashes"
    return f"{name!r} is the name of a figure that every evaluation has" if name in RESERVED else None


def set_names_problem(names: Sequence[object]) -> str | None:
    """Returns why these cannot be the names of validation sets; None if they can."""
    if len(names) > SETS_MAX:
        return f"there are {len(names)} validation sets; at most {SETS_MAX} are shown"
    for name in names:
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            return f"the set {name!r} needs a name of 1 to 32 letters, digits, underscores, dots and dashes"
        if name in {TRAINING, AVERAGES}:
            whose = "of training" if name == TRAINING else "of the averaged weights"
            return f"a set cannot be named {name!r}: {name}/loss is the loss {whose}"
    return None if names else "the mapping of validation sets is empty: return None for a run without evaluation"


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

    Of several validation sets the first is the main one, whose figures are the evaluation's own. `sets` has all of them
    by name; it is empty for a single one. An evaluation without samples is none.
    """

    loss_sum: float
    correct: int | None = None
    samples: int = 0
    metrics: Mapping[str, float | Ratio] = field(default_factory=dict)
    sets: Mapping[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of_sets(cls, found: Mapping[str, Evaluation]) -> Evaluation:
        """Returns the evaluation of validation sets: of a single one, named "", of several, or of none."""
        main = next(iter(found.values()), Evaluation(0.0))
        return main if set(found) <= {""} else replace(main, sets=dict(found))

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
        beside = replace(self, metrics={**self.metrics, **{f"{name}/{each}": found for each, found in figures.items()}})
        for one, found in other.sets.items():
            beside = beside.beside(f"{name}/{one}", found)
        return beside

    def ratios(self) -> dict[str, Ratio]:
        """Returns the metrics that the job names, as quotients."""
        return {
            name: given if isinstance(given, Ratio) else Ratio(given * self.samples, self.samples)
            for name, given in self.metrics.items()
        }

    def figures(self) -> dict[str, float]:
        """Returns loss, accuracy if it is counted, and the job's metrics, by name; those of sets by SET/NAME.

        There are none without samples.
        """
        if not self.samples:
            return {}
        accuracy = {} if self.correct is None else {"accuracy": self.accuracy}
        own = {"loss": self.loss} | accuracy | {name: ratio.value for name, ratio in self.ratios().items()}
        return own | self.set_figures()

    def set_figures(self) -> dict[str, float]:
        """Returns the figures of the sets with names, by SET/NAME."""
        return {f"{one}/{name}": value for one, found in self.sets.items() for name, value in found.figures().items()}

    @property
    def loss(self) -> float:
        """The mean loss per sample; NaN without samples."""
        return self.loss_sum / self.samples if self.samples else float("nan")

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions, 0 to 1; 0 without samples, NaN if they are not counted."""
        if self.correct is None:
            return math.nan
        return self.correct / self.samples if self.samples else 0.0


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None and other is None else (one or 0) + (other or 0)
