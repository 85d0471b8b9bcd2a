from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyline.v1 import enums_pb2 as e
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.decisions import Cull, Decision, Fossilize, Germinate, Retreat, ScaleLearningRate
from tolaria.reference.memory import NOTES_MAX, RECORDS_MAX, RunMemory
from tolaria.reference.policy import PolicySettings, decide_epoch, decide_step

SETTINGS = PolicySettings()
FALLING = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2]


def epoch_state(
    epoch: int,
    training: float = 0.5,
    validation: float = 0.5,
    *,
    accuracy: float = 0.9,
    seeds: Sequence[SeedState] = (),
) -> SystemStatePacket:
    """An epoch's state; every epoch has 100 steps."""
    return SystemStatePacket(
        version=1,
        current_epoch=epoch,
        global_step=epoch * 100,
        training_loss=training,
        validation_loss=validation,
        validation_accuracy=accuracy,
        seed_states=seeds,
    )


def play(
    states: Sequence[SystemStatePacket], memory: RunMemory | None = None
) -> tuple[RunMemory, list[Decision | None]]:
    """What is decided on each state in turn."""
    memory, decisions = memory or RunMemory(), []
    for state in states:
        memory, decision = decide_epoch(memory, state, SETTINGS)
        decisions.append(decision)
    return memory, decisions


def seed(seed_id: str, stage: int, age: int = 10) -> SeedState:
    """A seed as Tolaria reports it."""
    return SeedState(seed_id=seed_id, stage=stage, age_epochs=age)  # type: ignore[arg-type]


def test_a_run_that_learns_is_left_alone() -> None:
    """While losses fall nothing is commanded."""
    _, decisions = play([epoch_state(n, loss, loss) for n, loss in enumerate(FALLING, 1)])
    assert decisions == [None] * len(FALLING)


def test_a_plateau_germinates() -> None:
    """Three epochs without improvement germinate one seed; the next comes only when that one is no longer young."""
    _, decisions = play([epoch_state(n) for n in range(1, 10)])
    assert [
        None,
        None,
        None,
        Germinate("residual_mlp", ""),
        None,
        None,
        None,
        Germinate("bottleneck_adapter", ""),
        None,
    ] == decisions


def test_blueprints_take_turns() -> None:
    """After the last blueprint comes the first again."""
    _, decisions = play([epoch_state(n) for n in range(1, 30)])
    blueprints = [d.blueprint_id for d in decisions if isinstance(d, Germinate)]
    assert blueprints[:5] == [*SETTINGS.blueprints, SETTINGS.blueprints[0]]


def test_a_small_improvement_is_a_plateau_too() -> None:
    """What stays under the margin counts for nothing; what passes it counts."""
    _, small = play([epoch_state(n, validation=0.5 - 0.001 * n) for n in range(1, 6)])
    _, real = play([epoch_state(n, validation=0.5 - 0.02 * n) for n in range(1, 6)])
    assert Germinate("residual_mlp", "") in small
    assert real == [None] * 5


@pytest.mark.parametrize(
    ("seeds", "germinates"),
    [
        ([], True),
        ([seed("a", e.SEED_STAGE_TRAINING)], True),
        ([seed("a", e.SEED_STAGE_TRAINING, age=3)], False),
        ([seed("a", e.SEED_STAGE_TRAINING), seed("b", e.SEED_STAGE_BLENDING)], False),
        ([seed("a", e.SEED_STAGE_FOSSILIZED, age=0), seed("b", e.SEED_STAGE_CULLED, age=0)], True),
    ],
)
def test_who_lives_decides_about_germination(seeds: list[SeedState], *, germinates: bool) -> None:
    """No seed is germinated beside a young one or beyond the number that may live; the dead do not count."""
    _, decisions = play([epoch_state(n, seeds=seeds) for n in range(1, 5)])
    assert germinates == isinstance(decisions[-1], Germinate)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_retreats(loss: float) -> None:
    """A non-finite training loss asks for a rollback, in an epoch's state and in a step's."""
    _, decisions = play([epoch_state(1, loss)])
    assert decisions == [Retreat(f"training loss is {loss}")]
    assert decide_step(RunMemory(), epoch_state(1, loss), SETTINGS)[1] == decisions[0]


def test_divergence_retreats_once_in_a_while() -> None:
    """A loss over three times its best asks for a rollback, then waits for its effect before it asks again."""
    states = [epoch_state(n, loss, loss) for n, loss in enumerate([*FALLING, *[5.0] * 6], 1)]
    _, decisions = play(states)
    retreats = [n for n, decision in enumerate(decisions, 1) if isinstance(decision, Retreat)]
    assert retreats == [9, 14]
    assert decisions[8] == Retreat("training loss 5 is 25.0 times its best 0.2")


def test_tiny_losses_may_triple() -> None:
    """A loss that is many times its best but has lost next to nothing of what was gained is no divergence."""
    _, decisions = play([epoch_state(n, loss, loss) for n, loss in enumerate([2.0, 0.1, 0.01, 0.05, 0.001], 1)])
    assert decisions == [None] * 5


def test_a_loss_that_jumps_lowers_the_learning_rate() -> None:
    """Two jumps within the window halve the learning rate, once in a while."""
    losses = [1.0, 0.8, 1.1, 0.9, 1.2, 1.0, 1.3, 1.1]
    _, decisions = play([epoch_state(n, loss, 1.0 / n) for n, loss in enumerate(losses, 1)])
    assert [None] * 4 + [ScaleLearningRate(0.5, "")] + [None] * 3 == decisions


def test_a_loss_that_stays_noisy_lowers_the_learning_rate_three_times_in_all() -> None:
    """A tiny loss that jumps for ever is not answered for ever, also when the first answers are long forgotten."""
    losses = [0.001 if n % 2 else 0.002 for n in range(RECORDS_MAX + 100)]
    memory, decisions = play([epoch_state(n, loss, 1.0 / n) for n, loss in enumerate(losses, 1)])
    lowered = [n for n, decision in enumerate(decisions, 1) if isinstance(decision, ScaleLearningRate)]
    assert (len(lowered), SETTINGS.lr_changes_max) == (3, 3)
    assert lowered[-1] < 100
    # What a rollback undoes does not count: the rates are back as well.
    assert memory.rewound(lowered[1] * 100).rate_changes == (lowered[0] * 100, lowered[1] * 100)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ([epoch_state(n) for n in range(1, 5)], "no real improvement for 3 epochs; best validation loss 0.5"),
        (
            [epoch_state(n, loss, 1.0 / n) for n, loss in enumerate([1.0, 0.8, 1.1, 0.9, 1.2], 1)],
            "training loss rose by over 20% in 2 of the latest 4 epochs",
        ),
        (
            [
                epoch_state(n, 1 / n, 1 / n, accuracy=0.9 if n == 1 else 0.8, seeds=[seed("s", stage)])
                for n, stage in enumerate([e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 4], 1)
            ],
            "validation accuracy is 80.00% after its probation, was 90.00% before it blended",
        ),
        ([epoch_state(1, math.nan)], "training loss is nan"),
    ],
)
def test_every_decision_has_its_reason(states: list[SystemStatePacket], reason: str) -> None:
    """What an operator reads beside a command is the judgement that led to it, with its figures."""
    _, decisions = play(states)
    assert decisions[-1] is not None
    assert decisions[-1].reason == reason


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [(0.9, Fossilize("s", "")), (0.896, Fossilize("s", "")), (0.8, Cull("s", "")), (math.nan, None)],
)
def test_a_probation_ends_with_a_verdict(accuracy: float, verdict: Decision | None) -> None:
    """A seed is judged by the accuracy after its probation against that of the epoch before its blending."""
    stages = [e.SEED_STAGE_TRAINING, e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 4]
    states = [
        epoch_state(n, 1 / n, 1 / n, accuracy=0.9 if n == 1 else accuracy, seeds=[seed("s", stage)])
        for n, stage in enumerate(stages, 1)
    ]
    _, decisions = play(states)
    assert [None] * 5 + [verdict] == decisions


def test_a_restored_run_is_rewound() -> None:
    """A state of an earlier step makes everything after it unheard of."""
    whole, _ = play([epoch_state(n) for n in range(1, 4)])
    longer, _ = play([epoch_state(n, 5.0, 5.0, accuracy=0.1) for n in range(3, 9)], whole)
    again, _ = play([epoch_state(3)], longer)
    assert whole == again


def test_rewinding_keeps_what_was_before() -> None:
    """Notes on seeds go back to what was known at the step, and before everything there is nothing."""
    stages = [e.SEED_STAGE_BLENDING, e.SEED_STAGE_BLENDING, e.SEED_STAGE_PROBATIONARY, e.SEED_STAGE_PROBATIONARY]
    memory, _ = play([epoch_state(n, 1 / n, 1 / n, seeds=[seed("s", stage)]) for n, stage in enumerate(stages, 1)])
    rewound = memory.rewound(250)
    assert [record.epoch for record in rewound.records] == [1, 2]
    assert rewound.notes[0].probation_epoch is None
    assert rewound.notes[0].step == 100
    assert memory.rewound(400) is memory
    assert memory.rewound(0).records == ()
    assert math.isnan(memory.rewound(0).first_loss)


def test_steps_ask_once_until_the_epoch_ends() -> None:
    """Between epochs the loss's EWMA is judged, one noisy batch is not, and one request is enough."""
    memory, _ = play([epoch_state(n, loss, loss) for n, loss in enumerate(FALLING, 1)])
    noisy = epoch_state(9, 9.0)
    assert decide_step(memory, noisy, SETTINGS)[1] is None
    noisy.training_metrics["loss_ewma"] = 9.0
    asked, decision = decide_step(memory, noisy, SETTINGS)
    assert isinstance(decision, Retreat)
    later = epoch_state(10, math.nan)
    assert decide_step(asked, later, SETTINGS)[1] is None
    after_epoch, _ = decide_epoch(asked, epoch_state(11, 0.2, 0.2), SETTINGS)
    assert isinstance(decide_step(after_epoch, epoch_state(12, math.nan), SETTINGS)[1], Retreat)
    earlier = epoch_state(8, math.nan)
    earlier.global_step = 850
    assert isinstance(decide_step(asked, earlier, SETTINGS)[1], Retreat)


def test_memory_is_bounded() -> None:
    """A long run with many seeds leaves a bounded memory."""
    crowd = [seed(f"s{n}", e.SEED_STAGE_BLENDING) for n in range(200)]
    memory, _ = play([epoch_state(n, seeds=crowd) for n in range(1, 300)])
    assert len(memory.records) == RECORDS_MAX
    assert len(memory.notes) == NOTES_MAX


_any_float = st.floats(width=32)
_any_stage = st.sampled_from([*e.SeedLifecycleStage.values(), 99])
_any_seeds = st.lists(st.builds(seed, st.sampled_from("abc"), _any_stage, st.integers(0, 9)), max_size=3)
_any_state = st.builds(epoch_state, st.integers(0, 20), _any_float, _any_float, accuracy=_any_float, seeds=_any_seeds)


@settings(max_examples=200, deadline=None)
@given(st.lists(_any_state, max_size=25))
def test_any_states_are_survived(states: list[SystemStatePacket]) -> None:
    """States in any order with any numbers raise nothing, and steps in memory always rise."""
    memory, _ = play(states)
    for state in states:
        memory, _ = decide_step(memory, state, SETTINGS)
    steps = [record.step for record in memory.records]
    assert steps == sorted(set(steps))
