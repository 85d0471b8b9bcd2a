"""The rows of one step to one vector, in the way that the mode asks for. Owns the memory of the result.

Knows nothing of microbatches, epochs or stages; books nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from tolaria.gradients.attribution import AttributionMode, TeacherAttributionMixer
from tolaria.gradients.gram import combine_rows, gram_matrix
from tolaria.gradients.pcgrad import MergedGradient, project, projection_order, step_generator
from tolaria.gradients.seed_metrics import StepFacts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tolaria.gradients.accumulate import StepRows
    from tolaria.gradients.gram import Rows
    from tolaria.gradients.weights import SourceWeight


class GradientMode(StrEnum):
    """How a step's rows become one gradient."""

    SEED = "seed"
    """PCGrad across sources, then their mean weighted by stage."""

    MICROBATCH = "microbatch"
    """PCGrad across microbatches, then their sum; sources within a microbatch are added."""

    SUM = "sum"
    """All added up, as plain training does."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How to merge, and the seed of the run that the order of projections comes from."""

    mode: GradientMode
    attribution: AttributionMode
    run_seed: int | str


@dataclass(frozen=True, slots=True)
class StepContext:
    """What is known of a step beside its rows: its number, all sources, and samples by source."""

    step: int
    sources: Sequence[SourceWeight]
    samples: Mapping[str, int]


class StepMerger:
    """Merges one step after the other into the same memory."""

    def __init__(self, settings: MergeSettings, numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._settings = settings
        self._mixer = TeacherAttributionMixer(settings.attribution)
        self._result = torch.empty(numel, dtype=dtype, device=device)

    @torch.no_grad()
    def merge(self, rows: StepRows, context: StepContext) -> tuple[MergedGradient, StepFacts]:
        """The merged gradient and what the step tells. The vector is valid until the next call.

        A step in which one row took part is that row itself. Waits for the device once if PCGrad has rows to look at.
        """
        places = [place for place, part in enumerate(rows.parts) if part]
        if len(places) == 1 or self._settings.mode is GradientMode.SUM:
            return self._add(rows, places, context)
        if self._settings.mode is GradientMode.MICROBATCH:
            return self._project_microbatches(rows, context)
        return self._project_sources(rows, places, context)

    def _project_sources(
        self, rows: StepRows, places: Sequence[int], context: StepContext
    ) -> tuple[MergedGradient, StepFacts]:
        """PCGrad on the rows with the teacher's row shared out; both happen on dot products alone."""
        given = _select(rows.matrix, places)
        names = [rows.names[place] for place in places]
        by_name = {source.name: source for source in context.sources}
        chosen = [by_name[name] for name in names]
        shares = self._mixer.shares(chosen, context.samples)
        mixing = self._mixer.mixing(names, shares)
        gram = gram_matrix(given)
        shared = mixing @ gram @ mixing.T
        weights = [
            source.weight if kept else 0.0 for source, kept in zip(chosen, mixing.diagonal().tolist(), strict=True)
        ]
        projection = project(shared, projection_order(len(names), self._generator(context.step)))
        coefficients = torch.tensor(projection.merged(weights), dtype=torch.float64) @ mixing
        vector = combine_rows(given, coefficients.tolist(), out=self._result)
        merged = MergedGradient(vector, projection.conflicts, projection.participants, projected=True)
        teacher = self._mixer.teacher_shares(names, gram.diagonal().sqrt(), shares)
        measured = _Measured(names, shared.diagonal().clamp_min(0).sqrt(), teacher, projection.conflicts_by_row)
        return merged, _facts(rows, context, merged, measured)

    def _project_microbatches(self, rows: StepRows, context: StepContext) -> tuple[MergedGradient, StepFacts]:
        order = projection_order(len(rows.names), self._generator(context.step))
        projection = project(gram_matrix(rows.matrix), order)
        vector = combine_rows(rows.matrix, projection.merged(None), out=self._result)
        merged = MergedGradient(vector, projection.conflicts, projection.participants, projected=True)
        return merged, _facts(rows, context, merged, _nothing_measured(rows.matrix))

    def _add(self, rows: StepRows, places: Sequence[int], context: StepContext) -> tuple[MergedGradient, StepFacts]:
        given = _select(rows.matrix, places)
        vector = given[0] if len(places) == 1 else combine_rows(given, [1.0] * len(places), out=self._result)
        merged = MergedGradient(vector, 0, len(places), projected=False)
        if self._settings.mode is GradientMode.MICROBATCH:
            return merged, _facts(rows, context, merged, _nothing_measured(rows.matrix))
        names = [rows.names[place] for place in places]
        norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in given])
        teacher = self._mixer.teacher_shares(names, norms, [0.0] * len(names))
        return merged, _facts(rows, context, merged, _Measured(names, norms, teacher, [0] * len(names)))

    def _generator(self, step: int) -> torch.Generator:
        return step_generator(self._settings.run_seed, step)


@dataclass(frozen=True, slots=True)
class _Measured:
    names: Sequence[str]
    norms: Tensor
    teacher: Tensor
    conflicts: Sequence[int]


def _select(matrix: Tensor, places: Sequence[int]) -> Rows:
    """The chosen rows, as views."""
    return matrix if len(places) == len(matrix) else [matrix[place] for place in places]


def _nothing_measured(like: Tensor) -> _Measured:
    """Rows that are no sources say nothing about any."""
    nothing = torch.zeros(0, dtype=torch.float64, device=like.device)
    return _Measured((), nothing, nothing, ())


def _facts(rows: StepRows, context: StepContext, merged: MergedGradient, measured: _Measured) -> StepFacts:
    return StepFacts(
        sources=context.sources,
        names=measured.names,
        norms=measured.norms,
        teacher=measured.teacher,
        conflicts=measured.conflicts,
        parts=dict(zip(rows.names, rows.parts, strict=True)),
        microbatches=rows.microbatches,
        pair_conflicts=merged.conflicts,
        conflict_rate=merged.grad_conflict_rate,
        pair_rate=merged.pair_conflict_rate,
        projected=merged.projected,
    )
