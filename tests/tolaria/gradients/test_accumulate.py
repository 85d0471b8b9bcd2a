from __future__ import annotations

import pytest
import torch

from tolaria.errors import GradientMismatchError, NoGradientsError, UnknownSourceError
from tolaria.gradients.accumulate import SeedGradientAccumulator
from tolaria.gradients.rows import SourceRows

NAMES = ("host", "s", "t")


def microbatch(rows: list[list[float]], present: tuple[bool, ...], names: tuple[str, ...] = NAMES) -> SourceRows:
    """One microbatch; seed `s` owns two parameters, and its loss reaches one of them."""
    return SourceRows(names, torch.tensor(rows), present, {"s": (torch.ones(1), None)} if present[1] else {})


FIRST = microbatch([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], (True, False, False))
SECOND = microbatch([[3.0, 4.0], [5.0, 6.0], [0.0, 0.0]], (True, True, False))
THIRD = microbatch([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], (False, True, False))


@pytest.fixture
def seeds() -> SeedGradientAccumulator:
    """An accumulator that adds up microbatches."""
    return SeedGradientAccumulator(NAMES, 2, dtype=torch.float32, device="cpu")


@pytest.fixture
def microbatches() -> SeedGradientAccumulator:
    """An accumulator with a row for each microbatch."""
    return SeedGradientAccumulator(NAMES, 2, dtype=torch.float32, device="cpu", by_microbatch=True)


def copy(rows: SourceRows) -> SourceRows:
    """The same rows in new memory."""
    return SourceRows(rows.names, rows.matrix.clone(), rows.present, rows.own)


def test_microbatches_become_one_row_per_source(seeds: SeedGradientAccumulator) -> None:
    """Rows add up in the order of the sources; absent ones have zeros and no part."""
    for rows in (FIRST, SECOND, THIRD):
        seeds.add(copy(rows))
    step = seeds.take()
    assert step.names == NAMES
    assert step.matrix.tolist() == [[4.0, 6.0], [6.0, 7.0], [0.0, 0.0]]
    assert (step.parts, step.microbatches) == ((2, 2, 0), 3)


def test_own_gradients_add_up(seeds: SeedGradientAccumulator, microbatches: SeedGradientAccumulator) -> None:
    """A seed's own gradients are summed over its microbatches; parameters without a gradient stay None."""
    for accumulator in (seeds, microbatches):
        for rows in (FIRST, SECOND, THIRD):
            accumulator.add(copy(rows))
        own = accumulator.take().own
        assert set(own) == {"s"}
        assert own["s"][0] is not None
        assert (own["s"][0].tolist(), own["s"][1]) == ([2.0], None)


def test_each_step_starts_empty(seeds: SeedGradientAccumulator, microbatches: SeedGradientAccumulator) -> None:
    """Taken and cleared rows are gone, and an empty step raises NoGradientsError."""
    for accumulator in (seeds, microbatches):
        accumulator.add(copy(SECOND))
        accumulator.clear()
        accumulator.add(copy(FIRST))
        assert accumulator.take().matrix[0].tolist() == [1.0, 2.0]
        with pytest.raises(NoGradientsError):
            accumulator.take()


def test_a_step_without_present_sources_is_an_error(seeds: SeedGradientAccumulator) -> None:
    """A step in which every source is absent raises NoGradientsError."""
    seeds.add(microbatch([[0.0] * 2] * 3, (False, False, False)))
    with pytest.raises(NoGradientsError):
        seeds.take()


def test_memory_is_lent_and_reused(seeds: SeedGradientAccumulator) -> None:
    """Steps of two microbatches use two matrices in all."""
    pointers = set()
    for _ in range(4):
        for rows in (FIRST, SECOND):
            matrix = seeds.lend()
            matrix.copy_(rows.matrix)
            pointers.add(matrix.data_ptr())
            seeds.add(SourceRows(NAMES, matrix, rows.present, {}))
        assert seeds.take().matrix.tolist() == [[4.0, 6.0], [5.0, 6.0], [0.0, 0.0]]
    assert len(pointers) == 2


def test_each_microbatch_has_a_row(microbatches: SeedGradientAccumulator) -> None:
    """The row of a microbatch is the sum of its sources' rows."""
    microbatches.add(copy(FIRST))
    microbatches.add(copy(SECOND))
    step = microbatches.take()
    assert step.matrix.tolist() == [[1.0, 2.0], [8.0, 10.0]]
    assert (step.names, step.parts) == (("microbatch 0", "microbatch 1"), (1, 1))


def test_rows_of_other_sources_are_refused(seeds: SeedGradientAccumulator) -> None:
    """The error names the position and both sources."""
    with pytest.raises(UnknownSourceError, match="row 1 is of source 't'; source 's'"):
        seeds.add(microbatch([[0.0] * 2] * 3, (True, True, True), ("host", "t", "s")))
    with pytest.raises(UnknownSourceError, match="2 rows for 3 sources"):
        seeds.add(microbatch([[0.0] * 2] * 2, (True, True), ("host", "s")))


def test_rows_of_another_kind_are_refused(seeds: SeedGradientAccumulator) -> None:
    """Rows of another length or dtype raise GradientMismatchError."""
    with pytest.raises(GradientMismatchError, match=r"\(3, 4\), not \(3, 2\)"):
        seeds.add(microbatch([[0.0] * 4] * 3, (True, True, True)))
    with pytest.raises(GradientMismatchError, match="float64"):
        seeds.add(SourceRows(NAMES, torch.zeros(3, 2).double(), (True, True, True), {}))
