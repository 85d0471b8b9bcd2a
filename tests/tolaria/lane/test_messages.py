from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_TRAINING
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import HardwareContext
from tolaria.errors import LaneFailedError, LossShapeError, NoGradientsError, RebuildFailedError, StateMismatchError
from tolaria.images import SnapshotInfo, SnapshotStatistics
from tolaria.lane import messages
from tolaria.lane.encoding import from_bytes as decoded
from tolaria.lane.encoding import to_bytes as encoded
from tolaria.lane.messages import Command, CommandDone, Event, LaneEnded, LaneReady, Result, RunEpoch, Stop
from tolaria.lane.order import LaneOrder
from tolaria.values.encoding import EncodingError
from tolaria.values.evaluation import Evaluation
from tolaria.values.failure import Failure
from tolaria.values.gradients import SeedMetrics, SeedMetricSet
from tolaria.values.optimization import Adjustment
from tolaria.values.training import HOST, Position

MESSAGES: list[type[Any]] = [*get_args(Command), *get_args(Event), LaneReady, LaneOrder]

INTS = st.integers(-(2**70), 2**70)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)


def nested_tuples(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Tuples of values."""
    return st.lists(inner, max_size=3).map(tuple)


PLAIN = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | TEXT | st.binary(max_size=20), nested_tuples, max_leaves=6
)
SEEDS = st.builds(
    SeedState,
    seed_id=TEXT,
    stage=st.sampled_from([SEED_STAGE_TRAINING, SEED_STAGE_BLENDING]),
    slot=TEXT,
    alpha=st.builds(AlphaSchedule, end=st.floats(0, 1), duration_steps=st.integers(0, 2**31)),
    gradient_norm=FLOATS,
    metrics=st.dictionaries(TEXT, FLOATS, max_size=3),
)
CHANGES = st.fixed_dictionaries({"factor": st.floats(0.1, 10)}) | st.fixed_dictionaries({"value": st.floats(0, 10)})
ADJUSTMENTS = st.builds(
    lambda change, group, steps, text: Adjustment(
        group=group, expires_after_steps=steps, origin=text, request_id=text, reason=text, **change
    ),
    CHANGES,
    st.none() | TEXT,
    st.none() | st.integers(1, 100),
    TEXT,
)


@st.composite
def ranges(draw: st.DrawFn) -> range:
    """Ranges of 64-bit numbers."""
    bound = st.integers(-(2**63), 2**63 - 1)
    return range(draw(bound), draw(bound), draw(bound.filter(bool)))


def tuples(kind: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    """Tuples of the annotated items; at most 2 where their number is open."""
    items = get_args(kind)
    if items[-1] is Ellipsis:
        return st.lists(st.from_type(items[0]), max_size=2).map(tuple)
    return st.tuples(*map(st.from_type, items))


def mappings(kind: Any) -> st.SearchStrategy[dict[Any, Any]]:
    """Dictionaries of at most 2 items."""
    return st.dictionaries(*map(st.from_type, get_args(kind)), max_size=2)


for plain, strategy in (
    (int, INTS),
    (float, FLOATS),
    (str, TEXT),
    (range, ranges()),
    (tuple, tuples),
    (Mapping, mappings),
    (SeedState, SEEDS),
    (HardwareContext, st.builds(HardwareContext, device_type=TEXT, total_memory_gb=FLOATS)),
    (Adjustment, ADJUSTMENTS),
    (Failure, st.builds(Failure, TEXT, st.lists(PLAIN, max_size=3).map(tuple), TEXT)),
):
    st.register_type_strategy(plain, strategy)

ANY_MESSAGE = st.one_of(*(st.from_type(kind) for kind in MESSAGES))
FEW = settings(max_examples=30)


def assert_survives(message: Any) -> None:
    """The message is the same after a round trip; NaN is not equal to itself, so that texts are compared."""
    again = decoded(encoded(message))
    assert type(again) is type(message)
    assert repr(again) == repr(message)
    assert encoded(again) == encoded(message)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_survives_encoding(kind: type[Any]) -> None:
    """Commands, events and the lane's description."""
    FEW(given(st.from_type(kind))(assert_survives))()


@pytest.mark.parametrize("kind", get_args(Result))
def test_every_result_survives_encoding(kind: type[Any]) -> None:
    """Results cross within the event of their command."""

    @FEW
    @given(st.from_type(kind))
    def survives(result: Any) -> None:
        assert_survives(CommandDone(1, 2, result, None))

    survives()


def test_floats_that_are_not_finite_survive_encoding() -> None:
    """NaN and infinities are values that skipped steps have."""
    step = messages.StepDone(1, 1, float("nan"), float("inf"), 8, 0.1, 0.0, 5.0, skipped=True)
    again = decoded(encoded(step))
    assert encoded(again) == encoded(step)
    assert repr(again) == repr(step)


@given(st.binary(max_size=64))
def test_garbage_is_an_encoding_error(data: bytes) -> None:
    """Random bytes are no message; nothing but an EncodingError is raised."""
    with pytest.raises(EncodingError):
        decoded(data)


@FEW
@given(ANY_MESSAGE, st.data())
def test_truncated_bytes_are_an_encoding_error(message: Any, data: st.DataObject) -> None:
    """Every proper prefix is rejected, and so are bytes that follow."""
    whole = encoded(message)
    with pytest.raises(EncodingError):
        decoded(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(EncodingError):
        decoded(whole + b"N")


@FEW
@given(ANY_MESSAGE, st.data())
def test_damaged_bytes_raise_nothing_but_encoding_errors(message: Any, data: st.DataObject) -> None:
    """A changed byte gives another message or an EncodingError."""
    whole = bytearray(encoded(message))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(EncodingError):
        decoded(bytes(whole))


@pytest.mark.parametrize("value", [None, 5, "RunEpoch", (RunEpoch(1),), object()])
def test_other_values_are_not_messages(value: Any) -> None:
    """A part of a message cannot be decoded as a message."""
    with pytest.raises(EncodingError):
        decoded(encoded(value))


def test_every_dataclass_is_frozen_and_registered() -> None:
    """Everything that is defined in the module, and everything in the fields of messages, can be encoded."""
    own = [
        kind
        for _, kind in inspect.getmembers(messages, dataclasses.is_dataclass)
        if isinstance(kind, type) and kind.__module__ == messages.__name__
    ]
    assert {*MESSAGES, *get_args(Result), Failure, messages.TraceWritten} >= set(own)
    for kind in {*own, *MESSAGES, *get_args(Result)}:
        assert dataclasses.fields(kind) is not None
        assert kind.__dataclass_params__.frozen, kind
        assert hasattr(kind, "__slots__"), kind


def test_errors_of_tolaria_come_back_as_the_same_error() -> None:
    """Class, fields and message survive."""
    for error in (
        RebuildFailedError("build", "no memory"),
        StateMismatchError(["a: live only", "b: live only"]),
        NoGradientsError(),
    ):
        ended = decoded(encoded(LaneEnded(3, Failure.of(error, "Traceback ..."))))
        assert isinstance(ended, LaneEnded)
        assert ended.failure is not None
        again = ended.failure.error()
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert str(ended.failure) == f"{type(error).__name__}: {error}"
        assert ended.failure.traceback == "Traceback ..."


class JobsOwnError(LossShapeError):
    """A subclass that the job defines."""


@pytest.mark.parametrize("error", [ValueError("no labels"), JobsOwnError("no labels")])
def test_foreign_errors_come_back_as_a_failure_of_the_lane(error: Exception) -> None:
    """Only the name and the message of an error that is not Tolaria's own survive."""
    ended = decoded(encoded(LaneEnded(3, Failure.of(error))))
    assert isinstance(ended, LaneEnded)
    assert ended.failure is not None
    again = ended.failure.error()
    assert type(again) is LaneFailedError
    assert str(again) == f"{type(error).__name__}: {error}"


def test_nested_values_of_an_epoch() -> None:
    """One message with everything that is nested deepest."""
    source = SeedMetrics(HOST, SEED_STAGE_TRAINING, 1.0, 2.0, 0.5, 0.0, 1.0, 0.0, 0.0, 9, 1.0, 0.0, (("a", 1.0),))
    metrics = SeedMetricSet(1, 1, 0, 0.0, 0.0, 1.0, 0.0, 0.0, (source,))
    rates: Mapping[str, float] = {"host": 0.1, "seed:a": 0.01}
    done = messages.EpochDone(1, 8, Evaluation(1.0, 2, 3), 0.1, 9.0, rates, 0.9, HardwareContext(), gradients=metrics)
    again = decoded(encoded(done))
    assert isinstance(again, messages.EpochDone)
    assert repr(again) == repr(done)
    points = (SnapshotInfo(Position(1, 1), 10, None), SnapshotInfo(Position(2, 1), 10, "ab"))
    changed = messages.SnapshotsChanged(points, SnapshotStatistics(2, 20, 100, 0, 0, 2, 0, 0))
    assert decoded(encoded(changed)) == changed


def test_commands_without_fields_differ() -> None:
    """Each has its own name in the encoding."""
    assert encoded(Stop()) != encoded(messages.Release())
