"""From the rows of a step's microbatches to one gradient, and from an epoch's steps to its metrics.

Owns the order of things only: accumulate, weigh, attribute, project, combine, book. Each has its own module.
Knows nothing of modules, optimizers, peers or metric names. Used by one thread.

    tracker.follow(states, params)                       # at a fence that changed seeds
    names = tracker.begin(step)                          # at each step
    rows = source_rows(losses, shared, names=names, own=own, out=tracker.lend())
    tracker.add(rows)                                    # for each microbatch
    gradient = tracker.combine()
    metrics = tracker.finish_epoch()                     # at the epoch's end
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tolaria.gradients.accumulate import MicrobatchAccumulator, SeedGradientAccumulator
from tolaria.gradients.merging import GradientMode, StepContext, StepMerger
from tolaria.gradients.seed_metrics import PerLayerMetricUpdater, SeedMetricUpdater
from tolaria.gradients.weights import SeedWeightResolver

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from leyline.v1.seeds_pb2 import SeedState
    from tolaria.gradients.accumulate import OwnGradients
    from tolaria.gradients.flat import FlatLayout
    from tolaria.gradients.merging import MergeSettings
    from tolaria.gradients.pcgrad import MergedGradient
    from tolaria.gradients.rows import SourceRows
    from tolaria.gradients.weights import SourceWeight
    from tolaria.values.gradients import SeedMetricSet

NO_SAMPLES: Final[Counter[str]] = Counter()


@dataclass(frozen=True, slots=True)
class StepGradient:
    """One step's answer. `merged.vector` (d,) is valid until the next `combine`.

    `own` holds, by source, the summed gradients over its own parameters, unweighted.
    """

    merged: MergedGradient
    own: OwnGradients


class SeedAggregationTracker:
    """Merges the rows of every step, and remembers what they told.

    Args:
        layout: of the d elements of the shared parameters, which have one dtype and device.
        settings: how to merge.
        isolation: germinated and training seeds have no row.
        layer_norms_top_k: layers to show for each source; 0, or microbatch mode, turns norms per layer off.
        dtype: of the rows.
        device: of the rows.
    """

    def __init__(
        self,
        layout: FlatLayout,
        settings: MergeSettings,
        *,
        isolation: bool,
        layer_norms_top_k: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._settings = settings
        self._merger = StepMerger(settings, layout.numel, dtype=dtype, device=device)
        self._resolver = SeedWeightResolver(isolation=isolation)
        self._metrics = SeedMetricUpdater()
        self._layers = PerLayerMetricUpdater(layout, top_k=layer_norms_top_k)
        self._kind = (layout.numel, dtype, device)
        self._states: tuple[SeedState, ...] = ()
        self._params: Mapping[str, int] = {}
        self._sources: tuple[SourceWeight, ...] = ()
        self._names: tuple[str, ...] = ()
        self._accumulator = self._new_accumulator()
        self._samples: Counter[str] = Counter()
        self._step = 0

    def follow(self, states: Sequence[SeedState], params: Mapping[str, int]) -> None:
        """From the next step on these are the seeds; `params` is the number of elements that each owns."""
        self._states = tuple(states)
        self._params = dict(params)

    def begin(self, step: int) -> tuple[str, ...]:
        """Start the global step: the sources that have a row at it, host first. What was not combined is dropped.

        Raises:
            GradientWeightError: see `SeedWeightResolver.resolve`.
        """
        self._sources = self._resolver.resolve(self._states, step)
        names = tuple(source.name for source in self._sources if source.has_row)
        self._accumulator.clear()
        if names != self._names:
            self._names = names
            self._accumulator = self._new_accumulator()
        self._samples = Counter()
        self._step = step
        return names

    def lend(self) -> Tensor:
        """Memory (n, d) for the rows of the next microbatch, one for each name that `begin` returned."""
        return self._accumulator.lend()

    def add(self, rows: SourceRows, samples: Mapping[str, int] = NO_SAMPLES) -> None:
        """Take one microbatch. `samples` counts them by source, for attribution by the dataloader.

        Raises:
            UnknownSourceError, GradientMismatchError: rows that `begin` did not ask for.
        """
        self._accumulator.add(rows)
        self._samples.update(samples)

    def combine(self) -> StepGradient:
        """Merge what was added since `begin`, and book it.

        Waits for the device once if PCGrad has more than one row to look at, otherwise not at all.

        Raises:
            NoGradientsError: nothing was added.
        """
        rows = self._accumulator.take()
        merged, facts = self._merger.merge(rows, StepContext(self._step, self._sources, self._samples))
        self._metrics.update(facts)
        if rows.names == self._names:
            self._layers.update(rows)
        return StepGradient(merged, rows.own)

    def finish_epoch(self) -> SeedMetricSet:
        """The epoch's means by source; starts the next epoch. Waits for the device."""
        return self._metrics.read(self._params, self._layers.read())

    def _new_accumulator(self) -> SeedGradientAccumulator | MicrobatchAccumulator:
        numel, dtype, device = self._kind
        kind = MicrobatchAccumulator if self._settings.mode is GradientMode.MICROBATCH else SeedGradientAccumulator
        return kind(self._names, numel, dtype=dtype, device=device)
