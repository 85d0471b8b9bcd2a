"""Merging the gradients of several sources into one: rows, weights, attribution, PCGrad and metrics."""

from tolaria.gradients.flat import FlatLayout, flat_to_grads, grads_to_flat, laid_out
from tolaria.gradients.pcgrad import combine_flat_grads, step_generator
from tolaria.gradients.rows import losses_by_source, row_dtype, sample_counts, source_rows
from tolaria.gradients.tracker import GradientMode, MergeSettings, SeedAggregationTracker
from tolaria.gradients.weights import ISOLATED, AttributionMode, aggregate_weighted

__all__ = [
    "ISOLATED",
    "AttributionMode",
    "FlatLayout",
    "GradientMode",
    "MergeSettings",
    "SeedAggregationTracker",
    "aggregate_weighted",
    "combine_flat_grads",
    "flat_to_grads",
    "grads_to_flat",
    "laid_out",
    "losses_by_source",
    "row_dtype",
    "sample_counts",
    "source_rows",
    "step_generator",
]
