from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leyline.v1 import enums_pb2
from tolaria.gradients import AttributionMode, SourceWeight, TeacherAttributionMixer
from tolaria.values.training import HOST


def source(name: str, attribution: float = 0.0) -> SourceWeight:
    """A source with a row."""
    return SourceWeight(name, enums_pb2.SEED_STAGE_PROBATIONARY, 1.0, 1.0, attribution)


SOURCES = (source(HOST, 9.0), source("s", 0.25), source("t", 0.5))


@pytest.mark.parametrize(
    ("mode", "shares"),
    [
        (AttributionMode.OFF, (0.0, 0.0, 0.0)),
        (AttributionMode.KASMINA, (0.0, 0.25, 0.5)),
        (AttributionMode.DATALOADER, (0.0, 0.75, 0.0)),
    ],
)
def test_shares_by_mode(mode: AttributionMode, shares: tuple[float, ...]) -> None:
    """Off shares nothing, kasmina takes the state's word, dataloader the part of the samples; the host gets none."""
    assert TeacherAttributionMixer(mode).shares(SOURCES, {"s": 6, HOST: 2}) == shares


def test_shares_beyond_the_whole_are_scaled_down() -> None:
    """Nobody can get more of the teacher than there is."""
    mixer = TeacherAttributionMixer(AttributionMode.KASMINA)
    assert mixer.shares([source(HOST), source("s", 3.0), source("t", 1.0)], {}) == (0.0, 0.75, 0.25)


def test_without_a_host_nothing_is_shared() -> None:
    """A step that the host took no part in has no teacher."""
    assert TeacherAttributionMixer(AttributionMode.KASMINA).shares(SOURCES[1:], {}) == (0.0, 0.0)
    assert TeacherAttributionMixer.teacher_shares(["s"], torch.ones(1), [0.0]).tolist() == [0.0]


@settings(deadline=None)  # the machine may be busy; time is for benchmarks
@given(first=st.floats(0, 0.5), second=st.floats(0, 0.5))
def test_mixing_keeps_the_sum(first: float, second: float) -> None:
    """Whatever is shared, the plain sum of all rows stays."""
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    mixed = TeacherAttributionMixer.mixing([HOST, "s", "t"], [0.0, first, second]) @ rows
    torch.testing.assert_close(mixed.sum(0), rows.sum(0))
    torch.testing.assert_close(mixed[1], rows[1] + first * rows[0])
    torch.testing.assert_close(mixed[0], (1 - first - second) * rows[0])


def test_teacher_shares_are_parts_of_norms() -> None:
    """A seed of norm 1 that gets a quarter of a teacher of norm 4 is half the teacher's; the host is 4 of 6."""
    shares = TeacherAttributionMixer.teacher_shares([HOST, "s", "t"], torch.tensor([4.0, 1.0, 1.0]), [0.0, 0.25, 0.0])
    torch.testing.assert_close(shares, torch.tensor([4 / 6, 0.5, 0.0]))


def test_zero_rows_have_no_teacher() -> None:
    """Nothing is divided by a norm of zero."""
    shares = TeacherAttributionMixer.teacher_shares([HOST, "s"], torch.zeros(2), [0.0, 0.5])
    assert shares.tolist() == [0.0, 0.0]
