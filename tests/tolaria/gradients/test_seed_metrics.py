from __future__ import annotations

import math

import pytest
import torch

from leyline.v1 import enums_pb2
from tolaria.gradients import FlatLayout
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.pcgrad import MergedGradient
from tolaria.gradients.seed_metrics import PerLayerMetricUpdater, RowMeasurements, SeedMetricUpdater
from tolaria.gradients.weights import SourceWeight
from tolaria.values.gradients import SeedMetrics, SeedMetricSet
from tolaria.values.training import HOST

BLENDING = enums_pb2.SEED_STAGE_BLENDING


def update(
    updater: SeedMetricUpdater,
    norms: list[float],
    conflicts: list[int],
    *,
    alpha: float = 0.5,
    names: tuple[str, ...] = (HOST, "s"),
) -> None:
    """Adds a step of the host, a blending seed and a seed without a row, in two microbatches."""
    weights = (
        SourceWeight(HOST, enums_pb2.SEED_STAGE_UNKNOWN, 1.0, 1.0, 0.0),
        SourceWeight("s", BLENDING, alpha, alpha, 0.0),
        SourceWeight("quiet", enums_pb2.SEED_STAGE_TRAINING, 0.0, 0.0, 0.0),
    )
    merged = MergedGradient(torch.zeros(1), sum(conflicts) // 2, len(names), projected=len(norms) > 1)
    teacher = torch.tensor([0.5, 0.25][: len(norms)])
    updater.update(
        weights,
        StepRows(names, torch.zeros(len(names), 1), (2, 1)[: len(names)], 2, {}),
        merged,
        RowMeasurements(names, torch.tensor(norms), teacher, conflicts),
    )


def test_an_epochs_means_by_source() -> None:
    """Norms, shares and conflicts are means over steps with a row, weights over all steps; alpha and stage the last."""
    updater = SeedMetricUpdater()
    update(updater, [3.0, 1.0], [1, 1], alpha=0.25)
    update(updater, [1.0, 1.0], [0, 0], alpha=0.75)
    update(updater, [2.0], [0], alpha=0.5, names=(HOST,))
    result = updater.read({"s": 12}, {"s": (("layer", 1.5),)})
    assert result.seeds[0] == SeedMetrics(
        seed_id="s",
        stage=BLENDING,
        weight=0.5,
        norm=1.0,
        share=0.375,
        share_delta=0.0,
        alpha=0.5,
        conflicts=0.5,
        conflict_ratio=0.5,
        params=12,
        mask_fraction=2 / 6,
        teacher_share=0.25,
        layer_norms=(("layer", 1.5),),
    )
    assert (result.steps, result.microbatches, result.conflicts) == (3, 6, 1)
    assert result.conflict_ratio == pytest.approx(1 / 3)
    assert result.pair_conflict_ratio == pytest.approx(1 / 3)
    assert result.pcgrad_applied == pytest.approx(2 / 3)
    assert result.teacher_share == 0.5
    assert result.weights_mean == pytest.approx((1 + 0.25 + 1 + 0.75 + 1 + 0.5) / 6)


def test_sources_without_a_row_are_listed() -> None:
    """A seed that trains only its own parameters is listed with zeros."""
    updater = SeedMetricUpdater()
    update(updater, [1.0, 1.0], [0, 0])
    quiet = updater.read({}, {}).seeds[1]
    assert (quiet.seed_id, quiet.stage, quiet.weight, quiet.norm) == ("quiet", enums_pb2.SEED_STAGE_TRAINING, 0.0, 0.0)


def test_share_delta_is_the_change_since_the_last_epoch() -> None:
    """It is 0 in the first epoch, then the difference of the mean shares."""
    updater = SeedMetricUpdater()
    deltas = []
    for norm in (1.0, 3.0, 1.0):
        update(updater, [1.0, norm], [0, 0])
        deltas.append(updater.read({}, {}).seeds[0].share_delta)
    assert deltas == pytest.approx([0.0, 0.25, -0.25])


def test_an_epoch_without_steps_is_empty() -> None:
    """An epoch without steps does not divide by zero."""
    assert SeedMetricUpdater().read({}, {}) == SeedMetricSet(0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, ())


def test_zero_norms_have_zero_shares() -> None:
    """A step whose rows are all zero does not give NaN."""
    updater = SeedMetricUpdater()
    update(updater, [0.0, 0.0], [0, 0])
    assert [source.share for source in updater.read({}, {}).sources] == [0.0, 0.0, 0.0]


def test_layer_norms_list_the_largest() -> None:
    """Norms over all parameters of a module, averaged over steps with a row; the K largest are listed."""
    layout = FlatLayout.of(
        [("a.w", torch.zeros(2)), ("a.b", torch.zeros(1)), ("b.w", torch.zeros(1)), ("c", torch.zeros(()))]
    )
    updater = PerLayerMetricUpdater(layout, top_k=2)
    matrix = torch.tensor([[2.0, 1.0, 2.0, 10.0, 1.0], [0.0] * 5])
    for rows in (
        StepRows((HOST, "s"), matrix, (1, 0), 1, {}),
        StepRows((HOST, "s"), torch.stack([matrix[0] * 3, matrix[0]]), (1, 1), 1, {}),
    ):
        measured = updater.measure(rows)
        assert measured is not None
        updater.add(measured)
    assert updater.read() == {HOST: (("b", 20.0), ("a", 6.0)), "s": (("b", 10.0), ("a", 3.0))}
    assert updater.read() == {}


def test_layer_norms_are_off_for_zero_layers() -> None:
    """The rows are not read."""
    updater = PerLayerMetricUpdater(FlatLayout.of([("w", torch.zeros(2))]), top_k=0)
    assert updater.measure(StepRows((HOST,), torch.full((1, 2), math.nan, device="meta"), (1,), 1, {})) is None
    assert updater.read() == {}
