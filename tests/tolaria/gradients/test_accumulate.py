from __future__ import annotations

import pytest
import torch

from tolaria.errors import GradientMismatchError, NoGradientsError, UnknownSourceError
from tolaria.gradients import MicrobatchAccumulator, SeedGradientAccumulator, SourceRows

NAMES = ("host", "s", "t")


def microbatch(rows: list[list[float]], present: tuple[bool, ...], names: tuple[str, ...] = NAMES) -> SourceRows:
    """One microbatch; the seed `s` owns two parameters, of which its loss reaches one."""
    return SourceRows(names, torch.tensor(rows), present, {"s": (torch.ones(1), None)} if present[1] else {})


FIRST = microbatch([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], (True, False, False))
SECOND = microbatch([[3.0, 4.0], [5.0, 6.0], [0.0, 0.0]], (True, True, False))
THIRD = microbatch([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], (False, True, False))


@pytest.fixture
def seeds() -> SeedGradientAccumulator:
    """One that adds microbatches up."""
    return SeedGradientAccumulator(NAMES, 2, dtype=torch.float32, device="cpu")


@pytest.fixture
def microbatches() -> MicrobatchAccumulator:
    """One that keeps microbatches apart."""
    return MicrobatchAccumulator(NAMES, 2, dtype=torch.float32, device="cpu")


def copy(rows: SourceRows) -> SourceRows:
    """The same, in memory that may be given away."""
    return SourceRows(rows.names, rows.matrix.clone(), rows.present, rows.own)


def test_microbatches_become_one_row_per_source(seeds: SeedGradientAccumulator) -> None:
    """Rows add up in the order of the sources, with zeros and a mask for those that took no part."""
    for rows in (FIRST, SECOND, THIRD):
        seeds.add(copy(rows))
    step = seeds.take()
    assert step.names == NAMES
    assert step.matrix.tolist() == [[4.0, 6.0], [6.0, 7.0], [0.0, 0.0]]
    assert (step.parts, step.mask, step.microbatches) == ((2, 2, 0), (True, True, False), 3)


def test_own_gradients_add_up(seeds: SeedGradientAccumulator, microbatches: MicrobatchAccumulator) -> None:
    """A seed's own gradients are summed over the microbatches that it took part in, unreached parameters left out."""
    for accumulator in (seeds, microbatches):
        for rows in (FIRST, SECOND, THIRD):
            accumulator.add(copy(rows))
        own = accumulator.take().own
        assert set(own) == {"s"}
        assert own["s"][0] is not None
        assert (own["s"][0].tolist(), own["s"][1]) == ([2.0], None)


def test_each_step_starts_empty(seeds: SeedGradientAccumulator, microbatches: MicrobatchAccumulator) -> None:
    """What was taken or cleared does not come again, and a step of nothing is an error."""
    for accumulator in (seeds, microbatches):
        accumulator.add(copy(SECOND))
        accumulator.clear()
        accumulator.add(copy(FIRST))
        assert accumulator.take().matrix[0].tolist() == [1.0, 2.0]
        with pytest.raises(NoGradientsError):
            accumulator.take()


def test_a_step_nobody_took_part_in_is_an_error(seeds: SeedGradientAccumulator) -> None:
    """Rows of nothing but absent sources are no gradient."""
    seeds.add(microbatch([[0.0] * 2] * 3, (False, False, False)))
    with pytest.raises(NoGradientsError):
        seeds.take()


def test_memory_is_lent_and_reused(seeds: SeedGradientAccumulator) -> None:
    """A step with two microbatches gets along with two matrices, however many steps there are."""
    pointers = set()
    for _ in range(4):
        for rows in (FIRST, SECOND):
            matrix = seeds.lend()
            matrix.copy_(rows.matrix)
            pointers.add(matrix.data_ptr())
            seeds.add(SourceRows(NAMES, matrix, rows.present, {}))
        assert seeds.take().matrix.tolist() == [[4.0, 6.0], [5.0, 6.0], [0.0, 0.0]]
    assert len(pointers) == 2


def test_microbatches_stay_apart(microbatches: MicrobatchAccumulator) -> None:
    """One row for each microbatch, the sum of its sources."""
    microbatches.add(copy(FIRST))
    microbatches.add(copy(SECOND))
    step = microbatches.take()
    assert step.matrix.tolist() == [[1.0, 2.0], [8.0, 10.0]]
    assert (step.names, step.mask) == (("microbatch 0", "microbatch 1"), (True, True))


def test_rows_of_others_are_refused(seeds: SeedGradientAccumulator) -> None:
    """Another order, other names or fewer of them: the position and both names are told."""
    with pytest.raises(UnknownSourceError, match="row 1 is of source 't'; source 's'"):
        seeds.add(microbatch([[0.0] * 2] * 3, (True, True, True), ("host", "t", "s")))
    with pytest.raises(UnknownSourceError, match="2 rows for 3 sources"):
        seeds.add(microbatch([[0.0] * 2] * 2, (True, True), ("host", "s")))


def test_rows_of_another_kind_are_refused(seeds: SeedGradientAccumulator) -> None:
    """Another length or dtype than the shared parameters have."""
    with pytest.raises(GradientMismatchError, match=r"\(3, 4\), not \(3, 2\)"):
        seeds.add(microbatch([[0.0] * 4] * 3, (True, True, True)))
    with pytest.raises(GradientMismatchError, match="float64"):
        seeds.add(SourceRows(NAMES, torch.zeros(3, 2).double(), (True, True, True), {}))
