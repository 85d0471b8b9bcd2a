import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING
from support.rank_run import run_on_ranks
from tolaria.config import Settings
from tolaria.config.extras import require_extras
from tolaria.errors import ConfigurationError
from tolaria.gradients import AttributionMode, GradientMode, MergeSettings
from tolaria.gradients.accumulate import StepRows
from tolaria.gradients.aggregators import aggregator_of
from tolaria.gradients.pcgrad import project, projection_order, step_generator
from tolaria.gradients.tracker import StepMerger
from tolaria.gradients.weights import SourceWeight
from tolaria.values.training import HOST

NAMES = ["upgrad", "dualproj", "mgda", "imtl_g", "aligned_mtl"]
WITH_CAGRAD = [
    *NAMES,
    pytest.param(
        "cagrad",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("cvxpy") is None, reason="cvxpy and its solvers take 130 MB: tolaria[cagrad]"
        ),
    ),
]
CONFLICTING = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0], [0.3, -0.2, 1.0]], dtype=torch.float64)
APART = torch.eye(3, dtype=torch.float64)


def merged(name: str, rows: Tensor, weights: list[float] | None = None) -> Tensor:
    """The gradient that an aggregator makes of rows."""
    factors = [1.0] * len(rows) if weights is None else weights
    order = projection_order(len(rows), step_generator(0, 1))
    projection = aggregator_of(name)(rows @ rows.T, factors, order)
    return torch.tensor(projection.combined(factors), dtype=torch.float64) @ rows


@pytest.mark.parametrize("name", WITH_CAGRAD)
def test_what_an_aggregator_returns_is_that_of_torchjd(name: str) -> None:
    """Its own aggregator of rows, times their number; the Gram matrix alone is enough."""
    aggregation = importlib.import_module("torchjd.aggregation")
    kinds = {"upgrad": "UPGrad", "dualproj": "DualProj", "mgda": "MGDA", "imtl_g": "IMTLG", "aligned_mtl": "AlignedMTL"}
    theirs = aggregation.CAGrad(c=0.4) if name == "cagrad" else getattr(aggregation, kinds[name])()
    scale = (CONFLICTING @ CONFLICTING.T).diagonal().mean().sqrt()
    torch.testing.assert_close(merged(name, CONFLICTING), 3 * scale * theirs(CONFLICTING / scale), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", WITH_CAGRAD)
def test_the_same_rows_give_the_same_bits(name: str) -> None:
    """Twice from a new aggregator, and whatever came before."""
    once = merged(name, CONFLICTING)
    merged(name, APART)
    assert torch.equal(once, merged(name, CONFLICTING))


@pytest.mark.parametrize("name", ["pcgrad", *WITH_CAGRAD])
def test_equal_rows_are_added_up(name: str) -> None:
    """All aggregators have the scale of a sum, so that a learning rate can stay."""
    row = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(merged(name, row.expand(3, 3)), 3 * row, rtol=0.45, atol=0)  # CAGrad adds its ball


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_no_row_is_opposed(name: str) -> None:
    """The step of UPGrad and DualProj raises no loss, to first order; a plain sum would."""
    opposed = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    assert float((opposed @ opposed.sum(0)).min()) < 0
    assert float((opposed @ merged(name, opposed)).min()) > -1e-2


def test_weights_scale_rows() -> None:
    """Orthogonal rows are added up with their weights."""
    torch.testing.assert_close(
        merged("upgrad", APART, [1.0, 0.5, 0.1]), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6])
def test_the_size_of_gradients_does_not_matter(name: str, size: float) -> None:
    """Tiny and huge rows are merged as others are; torchjd alone takes tiny ones for zeros."""
    torch.testing.assert_close(merged(name, CONFLICTING * size) / size, merged(name, CONFLICTING), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", [GradientMode.SEED, GradientMode.MICROBATCH])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_rows_are_merged_as_whole_ones(name: str, mode: GradientMode) -> None:
    """Of sharded rows each rank has some columns: only dot products are exchanged, and the coefficients are equal."""
    settings = MergeSettings(mode, AttributionMode.OFF, 7, name)
    weights = {HOST: 1.0, "a": 0.5, "b": 0.25}
    sources = [SourceWeight(source, SEED_STAGE_BLENDING, weight, weight, 0.0) for source, weight in weights.items()]

    def merge(columns: slice, elsewhere: Tensor | None = None) -> Tensor:
        part = CONFLICTING[:, columns].contiguous()
        merger = StepMerger(
            settings,
            part.shape[1],
            dtype=part.dtype,
            device="cpu",
            over_shards=None if elsewhere is None else lambda gram: gram + elsewhere,
        )
        rows = StepRows(tuple(weights), part, (1, 1, 1), 1, {})
        return merger.merge(rows, 3, sources, {})[0].vector.clone()

    first, rest = CONFLICTING[:, :1], CONFLICTING[:, 1:]
    parts = [merge(slice(0, 1), rest @ rest.T), merge(slice(1, 3), first @ first.T)]
    torch.testing.assert_close(torch.cat(parts), merge(slice(0, 3)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.timeout(900)
def test_ranks_merge_as_one_does(parallel: str, request: pytest.FixtureRequest) -> None:
    """In real groups, with --long; the test above is its short form."""
    if not request.config.getoption("--long"):
        pytest.skip("starts three processes: --long")
    script = [["epoch"]] * 2
    case: dict[str, Any] = {"job": "TasksJob", "script": script, "sections": {"gradients": {"aggregator": "upgrad"}}}
    lane = {"lane": {"mode": "torchrun", "parallel": parallel}}
    train = "support.rank_scenarios:train"
    ((alone,),) = run_on_ranks(1, [(train, case)], 250)
    ((leader, follower),) = run_on_ranks(2, [(train, {**case, "sections": {**case["sections"], **lane}})], 250)
    assert leader["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    assert follower["digests"] == leader["digests"]
    plain = run_on_ranks(1, [(train, {"job": "TasksJob", "script": script})], 250)[0][0]
    assert alone["losses"] != plain["losses"]  # PCGrad's


def test_conflicts_are_counted_as_for_pcgrad() -> None:
    """They are a property of the rows."""
    gram, order = CONFLICTING @ CONFLICTING.T, projection_order(3, None)
    ours, expected = aggregator_of("mgda")(gram, [1.0] * 3, order), project(gram, order)
    assert (ours.conflicts_by_row, ours.participants) == (expected.conflicts_by_row, expected.participants)
    assert sum(ours.conflicts_by_row) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_stay_in_the_sum(name: str, bad: float) -> None:
    """So that the step is skipped, as it is with PCGrad."""
    rows = CONFLICTING.clone()
    rows[1, 0] = bad
    assert not bool(torch.isfinite(merged(name, rows)).all())


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_do_no_harm(name: str) -> None:
    """One among others, and nothing but zeros."""
    rows = CONFLICTING.clone()
    rows[2] = 0
    assert bool(torch.isfinite(merged(name, rows)).all())
    assert torch.equal(merged(name, rows * 0), torch.zeros(3, dtype=torch.float64))


def test_a_solver_that_fails_is_replaced_by_pcgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """For that step, with one warning; training goes on."""
    from torchjd.aggregation import UPGradWeighting

    def fails(self: object, gramian: Tensor) -> Tensor:
        raise ValueError("no solution")

    monkeypatch.setattr(UPGradWeighting, "forward", fails)
    with pytest.warns(UserWarning, match="gradients.aggregator upgrad: PCGrad takes its place.*no solution"):
        found = merged("upgrad", CONFLICTING)
    torch.testing.assert_close(found, merged("pcgrad", CONFLICTING))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting, what to install, and what needs nothing."""
    monkeypatch.setattr("tolaria.config.extras.find_spec", lambda name: None)
    require_extras(Settings())
    with pytest.raises(ConfigurationError, match=r"gradients.aggregator: upgrad needs tolaria\[torchjd\].*use pcgrad"):
        require_extras(Settings.model_validate({"gradients": {"aggregator": "upgrad"}}))
    with pytest.raises(ConfigurationError, match=r"tolaria\[cagrad\].*torchjd, cvxpy, clarabel"):
        require_extras(Settings.model_validate({"gradients": {"aggregator": "cagrad"}}))
