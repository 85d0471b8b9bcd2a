from __future__ import annotations

import pytest
import torch

from leyline.v1 import enums_pb2
from tolaria.gradients import (
    AttributionMode,
    GradientMode,
    MergeSettings,
    SourceWeight,
    combine_flat_grads,
    step_generator,
)
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.merging import StepContext, StepMerger
from tolaria.values.training import HOST

NAMES = (HOST, "s", "t")
ROWS = torch.tensor([[1.0, 0.5, 0.0], [-1.0, 1.0, 0.5], [0.5, -2.0, 1.0]])
WEIGHTS = {HOST: 1.0, "s": 0.5, "t": 0.25}


def sources(attribution: float = 0.0) -> tuple[SourceWeight, ...]:
    """All three, with their weights."""
    return tuple(SourceWeight(n, enums_pb2.SEED_STAGE_BLENDING, w, w, attribution) for n, w in WEIGHTS.items())


def merger(mode: GradientMode, attribution: AttributionMode = AttributionMode.OFF) -> StepMerger:
    """A merger of three elements."""
    return StepMerger(MergeSettings(mode, attribution, "run"), 3, dtype=torch.float32, device="cpu")


def step(matrix: torch.Tensor, parts: tuple[int, ...] = (1, 1, 1), names: tuple[str, ...] = NAMES) -> StepRows:
    """Rows of one step, in memory of their own."""
    return StepRows(names, matrix.clone(), parts, 1, {})


def test_seed_mode_is_weighted_pcgrad() -> None:
    """Without attribution it is what combine_flat_grads gives for the same rows, weights and order."""
    merged, facts = merger(GradientMode.SEED).merge(step(ROWS), StepContext(4, sources(), {}))
    expected = combine_flat_grads(ROWS, weights=list(WEIGHTS.values()), generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert merged.conflicts == expected.conflicts == 3
    torch.testing.assert_close(facts.norms, ROWS.double().norm(dim=1))
    assert list(facts.conflicts) == [2, 2, 2]


@pytest.mark.parametrize("attribution", [0.2, 0.5])
def test_attribution_merges_the_shared_rows(attribution: float) -> None:
    """Sharing on dot products gives what sharing the rows gives; a teacher that gave all away is left out."""
    merged, facts = merger(GradientMode.SEED, AttributionMode.KASMINA).merge(
        step(ROWS), StepContext(4, (sources()[0], *sources(attribution)[1:]), {})
    )
    shared = ROWS.clone()
    shared[1:] += attribution * ROWS[0]
    shared[0] *= 1 - 2 * attribution
    weights = [1.0 if attribution < 0.5 else 0.0, 0.5, 0.25]
    expected = combine_flat_grads(shared, weights=weights, generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert (merged.conflicts, merged.participants) == (expected.conflicts, expected.participants)
    torch.testing.assert_close(facts.norms, shared.double().norm(dim=1))
    assert facts.teacher[1] > 0


def test_absent_sources_count_neither_as_rows_nor_by_weight() -> None:
    """A seed that took no part does not dilute the mean of those that did."""
    matrix = ROWS.clone()
    matrix[1] = 0
    merged, facts = merger(GradientMode.SEED).merge(step(matrix, (1, 0, 1)), StepContext(4, sources(), {}))
    expected = combine_flat_grads(ROWS[[0, 2]], weights=[1.0, 0.25], generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert facts.names == [HOST, "t"]


@pytest.mark.parametrize("mode", list(GradientMode))
def test_one_row_is_the_result(mode: GradientMode) -> None:
    """In every mode a step that one row took part in is that row, bit by bit."""
    matrix = torch.zeros(3, 3)
    matrix[1] = ROWS[1]
    merged, _ = merger(mode).merge(step(matrix, (0, 1, 0)), StepContext(4, sources(), {}))
    assert torch.equal(merged.vector, ROWS[1])
    assert not merged.projected


def test_sum_mode_adds_without_weights() -> None:
    """The plain sum, with norms of the sources but no look at conflicts."""
    merged, facts = merger(GradientMode.SUM).merge(step(ROWS), StepContext(4, sources(), {}))
    torch.testing.assert_close(merged.vector, ROWS.sum(0))
    torch.testing.assert_close(facts.norms, ROWS.double().norm(dim=1))
    assert merged.conflicts == 0


def test_microbatch_mode_projects_microbatches() -> None:
    """PCGrad across microbatches, summed; nothing is said about single sources."""
    names = ("microbatch 0", "microbatch 1", "microbatch 2")
    merged, facts = merger(GradientMode.MICROBATCH).merge(step(ROWS, names=names), StepContext(4, sources(), {}))
    expected = combine_flat_grads(ROWS, generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert (merged.conflicts, tuple(facts.names)) == (3, ())


def test_rows_are_left_alone() -> None:
    """Merging writes into memory of its own."""
    rows = step(ROWS)
    merger(GradientMode.SEED).merge(rows, StepContext(4, sources(), {}))
    assert torch.equal(rows.matrix, ROWS)
