"""Merging the gradients of several sources into one: rows, weights, attribution, PCGrad, metrics. See `tracker` first.

Imports torch and the contract; knows nothing of grpc, metric names, seeds' modules or optimizers.
"""

from tolaria.errors import NoGradientsError
from tolaria.gradients.accumulate import MicrobatchAccumulator, SeedGradientAccumulator
from tolaria.gradients.attribution import AttributionMode, TeacherAttributionMixer
from tolaria.gradients.flat import FlatLayout, flat_to_grads, grads_to_flat
from tolaria.gradients.merging import GradientMode, MergeSettings
from tolaria.gradients.pcgrad import MergedGradient, combine_flat_grads, step_generator
from tolaria.gradients.rows import SourceRows, losses_by_source, sample_counts, source_rows
from tolaria.gradients.seed_metrics import PerLayerMetricUpdater, SeedMetricUpdater
from tolaria.gradients.tracker import SeedAggregationTracker, StepGradient
from tolaria.gradients.weighted import aggregate_weighted
from tolaria.gradients.weights import SeedWeightResolver, SourceWeight, alpha_at

__all__ = [
    "AttributionMode",
    "FlatLayout",
    "GradientMode",
    "MergeSettings",
    "MergedGradient",
    "MicrobatchAccumulator",
    "NoGradientsError",
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
    "alpha_at",
    "combine_flat_grads",
    "flat_to_grads",
    "grads_to_flat",
    "losses_by_source",
    "sample_counts",
    "source_rows",
    "step_generator",
]
