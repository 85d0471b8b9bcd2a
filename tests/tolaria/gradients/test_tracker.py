from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leyline.v1 import enums_pb2
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.errors import NoGradientsError, UnknownSourceError
from tolaria.gradients import (
    AttributionMode,
    FlatLayout,
    GradientMode,
    MergeSettings,
    SeedAggregationTracker,
    combine_flat_grads,
    flat_to_grads,
    source_rows,
    step_generator,
)
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.rows import SourceRows
from tolaria.gradients.tracker import StepMerger
from tolaria.gradients.weights import SourceWeight
from tolaria.values.training import HOST

PROBATIONARY = SeedState(seed_id="s", stage=enums_pb2.SEED_STAGE_PROBATIONARY, attribution=0.5)
BLENDING = SeedState(
    seed_id="t",
    stage=enums_pb2.SEED_STAGE_BLENDING,
    alpha=AlphaSchedule(start=0.0, end=1.0, begin_step=10, duration_steps=4),
)
TRAINING = SeedState(seed_id="u", stage=enums_pb2.SEED_STAGE_TRAINING)
PULLS = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])


def tracker(
    mode: GradientMode = GradientMode.SEED, attribution: AttributionMode = AttributionMode.OFF, top_k: int = 0
) -> SeedAggregationTracker:
    """A tracker of one layer with two elements."""
    layout = FlatLayout.of([("layer.weight", torch.zeros(2))])
    return SeedAggregationTracker(
        layout,
        MergeSettings(mode, attribution, 7),
        isolation=True,
        layer_norms_top_k=top_k,
        dtype=torch.float32,
        device="cpu",
    )


def rows(names: tuple[str, ...], matrix: torch.Tensor) -> SourceRows:
    """Rows of sources that are all present, in new memory."""
    return SourceRows(names, matrix.clone(), (True,) * len(names), {})


def test_sources_follow_stages_and_alpha() -> None:
    """Isolated seeds have no row; blending ones have one as soon as alpha is above zero."""
    tracked = tracker()
    assert tracked.begin(0) == (HOST,)
    tracked.follow([PROBATIONARY, BLENDING, TRAINING], {})
    assert tracked.begin(10) == (HOST, "s")
    assert tracked.begin(11) == (HOST, "s", "t")


def test_a_step_of_two_microbatches() -> None:
    """Rows are added up, then projected and summed by weight, in the order of run and step."""
    tracked = tracker()
    tracked.follow([PROBATIONARY], {})
    names = tracked.begin(3)
    for _ in range(2):
        tracked.add(rows(names, PULLS))
    merged = tracked.combine().merged
    expected = combine_flat_grads(2 * PULLS, generator=step_generator(7, 3))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert merged.conflicts == 1


def test_microbatch_mode_counts_conflicts_between_microbatches() -> None:
    """Two opposed microbatches of the same source conflict."""
    tracked = tracker(GradientMode.MICROBATCH)
    names = tracked.begin(0)
    for pull in PULLS:
        tracked.add(rows(names, pull[None]))
    assert tracked.combine().merged.conflicts == 1
    tracked.applied()
    result = tracked.finish_epoch()
    assert (result.conflicts, result.microbatches) == (1, 2)
    assert [source.seed_id for source in result.sources] == [HOST]


def test_dataloader_attribution_counts_the_samples_of_the_step() -> None:
    """The samples of all microbatches determine a seed's share of the teacher."""
    tracked = tracker(attribution=AttributionMode.DATALOADER)
    tracked.follow([PROBATIONARY], {})
    names = tracked.begin(0)
    tracked.add(rows(names, PULLS), {HOST: 3, "s": 1})
    tracked.add(rows(names, PULLS), {HOST: 2, "s": 2})
    tracked.combine()
    tracked.applied()
    host, seed = tracked.finish_epoch().sources
    taught = 3 / 8 * 2.0
    assert seed.teacher_share == pytest.approx(taught / (taught + 8**0.5))
    assert host.norm == pytest.approx(2.0 * 5 / 8)


def test_an_epoch_is_read_and_reset() -> None:
    """The metrics cover all sources, their parameters and layers; the next epoch starts from zero."""
    tracked = tracker(top_k=1)
    tracked.follow([PROBATIONARY, TRAINING], {"s": 5, "u": 6})
    for step in range(3):
        tracked.add(rows(tracked.begin(step), PULLS))
        tracked.combine()
        tracked.applied()
    result = tracked.finish_epoch()
    host, seed, training = result.sources
    assert (host.seed_id, seed.seed_id, training.seed_id) == (HOST, "s", "u")
    assert (seed.params, training.params, training.weight) == (5, 6, 0.0)
    assert seed.layer_norms[0][0] == "layer"
    assert seed.layer_norms[0][1] == pytest.approx(2**0.5)
    assert (result.steps, result.conflicts, result.conflict_ratio, result.pcgrad_applied) == (3, 3, 1.0, 1.0)
    assert seed.conflict_ratio == 1.0
    assert tracked.finish_epoch().steps == 0


def test_a_discarded_step_has_no_effect() -> None:
    """Rows of a step that was skipped before combining do not reach the next one."""
    tracked = tracker()
    tracked.add(rows(tracked.begin(0), torch.full((1, 2), float("nan"))))
    tracked.add(rows(tracked.begin(1), PULLS[:1]))
    assert tracked.combine().merged.vector.tolist() == [1.0, 0.0]


def test_only_a_step_that_is_applied_is_counted() -> None:
    """The measurements of one that is skipped, or combined again, are not in the epoch's metrics."""
    tracked = tracker(top_k=1)
    for step, value in ((0, math.nan), (0, 2.0), (1, math.nan)):
        tracked.add(rows(tracked.begin(step), torch.full((1, 2), value)))
        tracked.combine()
        if value == 2.0:
            tracked.applied()
            tracked.applied()
    result = tracked.finish_epoch()
    (host,) = result.sources
    assert (result.steps, result.microbatches) == (1, 1)
    assert host.norm == host.layer_norms[0][1] == pytest.approx(8**0.5)


def test_steps_without_rows_are_errors() -> None:
    """A step without rows raises NoGradientsError; rows of other sources are refused."""
    tracked = tracker()
    tracked.begin(0)
    with pytest.raises(NoGradientsError):
        tracked.combine()
    with pytest.raises(UnknownSourceError):
        tracked.add(rows((HOST, "s"), PULLS))


def test_a_repeated_run_repeats_its_bits() -> None:
    """The same rows at the same step of the same run give the same bits, independent of the global RNG."""
    results = []
    for _ in range(2):
        tracked = tracker()
        tracked.follow([PROBATIONARY, BLENDING], {})
        torch.rand(3)
        tracked.add(rows(tracked.begin(12), torch.tensor([[1.0, 0.3], [-1.0, 1.0], [0.2, -1.0]])))
        results.append(tracked.combine().merged.vector.clone())
    assert torch.equal(*results)


class Valley(nn.Module):
    """Two shared weights in a curved, steep valley: the seed's loss is low on its floor, the host's further along."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([-4.0, 2.0]))

    def losses(self) -> dict[str, torch.Tensor]:
        along, across = self.shared
        floor = 0.5 * torch.sin(along) + 0.2 * along
        return {HOST: (along - 3).square(), "s": 200 * (across - floor).square() + 0.1 * (along - 2.5).square()}


def train(mode: GradientMode, rate: float) -> tuple[dict[str, float], int]:
    """Losses after training, and the number of conflicts."""
    model, tracked = Valley(), tracker(mode)
    tracked.follow([PROBATIONARY], {})
    for step in range(300):
        names = tracked.begin(step)
        tracked.add(source_rows(model.losses(), [model.shared], names=names, out=tracked.lend()))
        (gradient,) = flat_to_grads(tracked.combine().merged.vector, [model.shared.shape])
        tracked.applied()
        with torch.no_grad():
            model.shared.sub_(rate * gradient)
    return {name: loss.item() for name, loss in model.losses().items()}, tracked.finish_epoch().conflicts


def test_pcgrad_reduces_both_losses_of_a_conflict() -> None:
    """Conflicting losses both end at most at 0.8 times the loss with the plain sum."""
    summed, _ = train(GradientMode.SUM, 0.003)
    projected, conflicts = train(GradientMode.SEED, 0.003)
    assert conflicts > 50
    assert projected[HOST] < 0.8 * summed[HOST]
    assert projected["s"] < 0.8 * summed["s"]


NAMES = (HOST, "s", "t")
ROWS = torch.tensor([[1.0, 0.5, 0.0], [-1.0, 1.0, 0.5], [0.5, -2.0, 1.0]])
WEIGHTS = {HOST: 1.0, "s": 0.5, "t": 0.25}


def sources(attribution: float = 0.0) -> tuple[SourceWeight, ...]:
    """The three sources with their weights."""
    return tuple(SourceWeight(n, enums_pb2.SEED_STAGE_BLENDING, w, w, attribution) for n, w in WEIGHTS.items())


def merger(mode: GradientMode, attribution: AttributionMode = AttributionMode.OFF) -> StepMerger:
    """A merger of three elements."""
    return StepMerger(MergeSettings(mode, attribution, "run"), 3, dtype=torch.float32, device="cpu")


def step_rows(matrix: torch.Tensor, parts: tuple[int, ...] = (1, 1, 1), names: tuple[str, ...] = NAMES) -> StepRows:
    """Rows of one step, in new memory."""
    return StepRows(names, matrix.clone(), parts, 1, {})


def test_seed_mode_is_weighted_pcgrad() -> None:
    """Without attribution the result is the weighted mean of combine_flat_grads times the total weight."""
    merged, measured = merger(GradientMode.SEED).merge(step_rows(ROWS), 4, sources(), {})
    expected = combine_flat_grads(ROWS, weights=list(WEIGHTS.values()), generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, 1.75 * expected.vector)
    assert merged.conflicts == expected.conflicts == 3
    torch.testing.assert_close(measured.norms, ROWS.double().norm(dim=1))
    assert list(measured.conflicts) == [2, 2, 2]


@pytest.mark.parametrize("attribution", [0.2, 0.5])
def test_attribution_merges_the_shared_rows(attribution: float) -> None:
    """Attribution on dot products equals attribution on rows; the teacher keeps what the weights do not take."""
    merged, measured = merger(GradientMode.SEED, AttributionMode.KASMINA).merge(
        step_rows(ROWS), 4, (sources()[0], *sources(attribution)[1:]), {}
    )
    shared = ROWS.clone()
    shared[1:] += attribution * ROWS[0]
    shared[0] *= 1 - 0.75 * attribution
    expected = combine_flat_grads(shared, weights=[1.0, 0.5, 0.25], generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, 1.75 * expected.vector)
    assert (merged.conflicts, merged.participants) == (expected.conflicts, expected.participants)
    torch.testing.assert_close(measured.norms, shared.double().norm(dim=1))
    assert measured.teacher[1] > 0


def test_absent_sources_have_no_weight() -> None:
    """A source that took no part does not change the sum of the others."""
    matrix = ROWS.clone()
    matrix[1] = 0
    merged, measured = merger(GradientMode.SEED).merge(step_rows(matrix, (1, 0, 1)), 4, sources(), {})
    expected = combine_flat_grads(ROWS[[0, 2]], weights=[1.0, 0.25], generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, 1.25 * expected.vector)
    assert measured.names == [HOST, "t"]


@pytest.mark.parametrize("mode", list(GradientMode))
def test_one_row_is_the_result(mode: GradientMode) -> None:
    """In every mode a step with a single row returns that row, bit for bit."""
    matrix = torch.zeros(3, 3)
    matrix[1] = ROWS[1]
    merged, _ = merger(mode).merge(step_rows(matrix, (0, 1, 0)), 4, sources(), {})
    assert torch.equal(merged.vector, ROWS[1])
    assert not merged.projected


def test_sum_mode_adds_without_weights() -> None:
    """The result is the plain sum; norms are measured, conflicts are not counted."""
    merged, measured = merger(GradientMode.SUM).merge(step_rows(ROWS), 4, sources(), {})
    torch.testing.assert_close(merged.vector, ROWS.sum(0))
    torch.testing.assert_close(measured.norms, ROWS.double().norm(dim=1))
    assert merged.conflicts == 0


def test_microbatch_mode_projects_microbatches() -> None:
    """The result is the sum after PCGrad across microbatches; no source is measured."""
    names = ("microbatch 0", "microbatch 1", "microbatch 2")
    merged, measured = merger(GradientMode.MICROBATCH).merge(step_rows(ROWS, names=names), 4, sources(), {})
    expected = combine_flat_grads(ROWS, generator=step_generator("run", 4))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert (merged.conflicts, tuple(measured.names)) == (3, ())


def test_merging_does_not_modify_the_rows() -> None:
    """The result is written into separate memory."""
    rows = step_rows(ROWS)
    merger(GradientMode.SEED).merge(rows, 4, sources(), {})
    assert torch.equal(rows.matrix, ROWS)


APART = [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 4.0]]  # no two of them conflict


def merged_with(weights: list[float], matrix: torch.Tensor, shares: list[float] | None = None) -> torch.Tensor:
    """The merge of rows with these weights, and shares of the first, the host's."""
    names = [HOST, *"stuvw"][: len(weights)]
    taken = zip(names, weights, shares or [0.0] * len(weights), strict=True)
    given = [SourceWeight(n, enums_pb2.SEED_STAGE_SHADOWING, w, w, share) for n, w, share in taken]
    merge = StepMerger(
        MergeSettings(GradientMode.SEED, AttributionMode.KASMINA, "run"),
        matrix.shape[1],
        dtype=matrix.dtype,
        device="cpu",
    )
    return merge.merge(StepRows(tuple(names), matrix.clone(), (1,) * len(names), 1, {}), 4, given, {})[0].vector


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=2, max_size=2),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_rows_without_conflict_add_up_by_weight(weights: list[float], shares: list[float]) -> None:
    """The part of the host's row is the same for any weights, shares and number of the others."""
    rows = torch.tensor(APART, dtype=torch.float64)
    expected = rows[0] + weights[0] * rows[1] + weights[1] * rows[2]
    torch.testing.assert_close(merged_with([1.0, *weights], rows, [0.0, *shares]), expected)
    torch.testing.assert_close(merged_with([1.0, weights[0]], rows[:2]), rows[0] + weights[0] * rows[1])


@given(numbers=st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_rows_of_full_weight_are_the_sum(numbers: list[float]) -> None:
    """Equal rows of weight 1 give exactly their number times the row, and the host alone gives its row bit for bit."""
    row = torch.tensor(numbers)
    assert torch.equal(merged_with([1.0], row[None]), row)
    assert torch.equal(merged_with([1.0, 1.0], torch.stack([row, row])), row + row)


def test_a_seed_of_no_weight_has_no_effect() -> None:
    """As its weight goes to zero, the gradient goes to that of the host alone."""
    rows = torch.tensor(APART, dtype=torch.float64)
    for weight in (1e-3, 1e-6, 1e-9):
        change = merged_with([1.0, weight, weight], rows) - rows[0]
        assert change.norm() <= 10 * weight
