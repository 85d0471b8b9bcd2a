"""Merging the gradients of several sources into one: rows, weights, attribution, PCGrad and metrics."""

from tolaria.gradients.accumulate import MicrobatchAccumulator, SeedGradientAccumulator
from tolaria.gradients.flat import FlatLayout, flat_to_grads, grads_to_flat
from tolaria.gradients.pcgrad import MergedGradient, combine_flat_grads, step_generator
from tolaria.gradients.rows import SourceRows, losses_by_source, sample_counts, source_rows
from tolaria.gradients.seed_metrics import PerLayerMetricUpdater, SeedMetricUpdater
from tolaria.gradients.tracker import GradientMode, MergeSettings, SeedAggregationTracker, StepGradient
from tolaria.gradients.weights import (
    AttributionMode,
    SeedWeightResolver,
    SourceWeight,
    TeacherAttributionMixer,
    aggregate_weighted,
)

__all__ = [
    "AttributionMode",
    "FlatLayout",
    "GradientMode",
    "MergeSettings",
    "MergedGradient",
    "MicrobatchAccumulator",
    "PerLayerMetricUpdater",
    "SeedAggregationTracker",
    "SeedGradientAccumulator",
    "SeedMetricUpdater",
    "SeedWeightResolver",
    "SourceRows",
    "SourceWeight",
    "StepGradient",
    "TeacherAttributionMixer",
    "aggregate_weighted",
    "combine_flat_grads",
    "flat_to_grads",
    "grads_to_flat",
    "losses_by_source",
    "sample_counts",
    "source_rows",
    "step_generator",
]
