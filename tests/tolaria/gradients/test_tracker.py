from __future__ import annotations

import pytest
import torch
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
    SourceRows,
    combine_flat_grads,
    flat_to_grads,
    source_rows,
    step_generator,
)
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
    """All sources present, in memory that may be given away."""
    return SourceRows(names, matrix.clone(), (True,) * len(names), {})


def test_sources_follow_stages_and_alpha() -> None:
    """Isolated seeds have no row, blending ones get theirs as soon as alpha leaves zero."""
    tracked = tracker()
    assert tracked.begin(0) == (HOST,)
    tracked.follow([PROBATIONARY, BLENDING, TRAINING], {})
    assert tracked.begin(10) == (HOST, "s")
    assert tracked.begin(11) == (HOST, "s", "t")


def test_a_step_of_two_microbatches() -> None:
    """Rows are added up first, then projected and averaged by weight, in the order that run and step give."""
    tracked = tracker()
    tracked.follow([PROBATIONARY], {})
    names = tracked.begin(3)
    for _ in range(2):
        tracked.add(rows(names, PULLS))
    merged = tracked.combine().merged
    expected = combine_flat_grads(2 * PULLS, weights=[1.0, 1.0], generator=step_generator(7, 3))
    torch.testing.assert_close(merged.vector, expected.vector)
    assert merged.conflicts == 1


def test_microbatch_mode_sees_conflicts_between_microbatches() -> None:
    """Two microbatches that pull apart conflict, whoever their sources are."""
    tracked = tracker(GradientMode.MICROBATCH)
    names = tracked.begin(0)
    for pull in PULLS:
        tracked.add(rows(names, pull[None]))
    assert tracked.combine().merged.conflicts == 1
    result = tracked.finish_epoch()
    assert (result.conflicts, result.microbatches) == (1, 2)
    assert [source.seed_id for source in result.sources] == [HOST]


def test_dataloader_attribution_takes_the_steps_samples() -> None:
    """Samples of all microbatches decide how much of the teacher a seed gets."""
    tracked = tracker(attribution=AttributionMode.DATALOADER)
    tracked.follow([PROBATIONARY], {})
    names = tracked.begin(0)
    tracked.add(rows(names, PULLS), {HOST: 3, "s": 1})
    tracked.add(rows(names, PULLS), {HOST: 2, "s": 2})
    tracked.combine()
    host, seed = tracked.finish_epoch().sources
    taught = 3 / 8 * 2.0
    assert seed.teacher_share == pytest.approx(taught / (taught + 8**0.5))
    assert host.norm == pytest.approx(2.0 * 5 / 8)


def test_an_epoch_is_read_once() -> None:
    """Metrics of all sources, their parameters and layers; the next epoch starts from nothing."""
    tracked = tracker(top_k=1)
    tracked.follow([PROBATIONARY, TRAINING], {"s": 5, "u": 6})
    for step in range(3):
        tracked.add(rows(tracked.begin(step), PULLS))
        tracked.combine()
    result = tracked.finish_epoch()
    host, seed, training = result.sources
    assert (host.seed_id, seed.seed_id, training.seed_id) == (HOST, "s", "u")
    assert (seed.params, training.params, training.weight) == (5, 6, 0.0)
    assert seed.layer_norms[0][0] == "layer"
    assert seed.layer_norms[0][1] == pytest.approx(2**0.5)
    assert (result.steps, result.conflicts, result.conflict_ratio, result.pcgrad_applied) == (3, 3, 1.0, 1.0)
    assert seed.conflict_ratio == 1.0
    assert tracked.finish_epoch().steps == 0


def test_a_dropped_step_leaves_nothing_behind() -> None:
    """Rows of a step that was voided before combining do not reach the next one."""
    tracked = tracker()
    tracked.add(rows(tracked.begin(0), torch.full((1, 2), float("nan"))))
    tracked.add(rows(tracked.begin(1), PULLS[:1]))
    assert tracked.combine().merged.vector.tolist() == [1.0, 0.0]


def test_steps_without_rows_are_errors() -> None:
    """Nothing added is no gradient; rows that were not asked for are refused."""
    tracked = tracker()
    tracked.begin(0)
    with pytest.raises(NoGradientsError):
        tracked.combine()
    with pytest.raises(UnknownSourceError):
        tracked.add(rows((HOST, "s"), PULLS))


def test_a_repeated_run_repeats_its_bits() -> None:
    """The same rows at the same steps of the same run give the same bits, whatever ran in between."""
    results = []
    for _ in range(2):
        tracked = tracker()
        tracked.follow([PROBATIONARY, BLENDING], {})
        torch.rand(3)
        tracked.add(rows(tracked.begin(12), torch.tensor([[1.0, 0.3], [-1.0, 1.0], [0.2, -1.0]])))
        results.append(tracked.combine().merged.vector.clone())
    assert torch.equal(*results)


class Valley(nn.Module):
    """Two shared weights on a curved, steep valley: the seed wants to be on its floor, the host further along."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([-4.0, 2.0]))

    def losses(self) -> dict[str, torch.Tensor]:
        along, across = self.shared
        floor = 0.5 * torch.sin(along) + 0.2 * along
        return {HOST: (along - 3).square(), "s": 200 * (across - floor).square() + 0.1 * (along - 2.5).square()}


def train(mode: GradientMode, rate: float) -> tuple[dict[str, float], int]:
    """Losses after training, and the conflicts on the way."""
    model, tracked = Valley(), tracker(mode)
    tracked.follow([PROBATIONARY], {})
    for step in range(300):
        names = tracked.begin(step)
        tracked.add(source_rows(model.losses(), [model.shared], names=names, out=tracked.lend()))
        (gradient,) = flat_to_grads(tracked.combine().merged.vector, [model.shared.shape])
        with torch.no_grad():
            model.shared.sub_(rate * gradient)
    return {name: loss.item() for name, loss in model.losses().items()}, tracked.finish_epoch().conflicts


def test_a_real_conflict_is_seen_and_served() -> None:
    """Losses that pull shared weights apart show conflicts, and both end lower than by plain sum (at most 0.8 x)."""
    summed, _ = train(GradientMode.SUM, 0.003)
    projected, conflicts = train(GradientMode.SEED, 0.006)  # a mean of two rows is half of their sum
    assert conflicts > 50
    assert projected[HOST] < 0.8 * summed[HOST]
    assert projected["s"] < 0.8 * summed["s"]
