from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leyline.v1 import enums_pb2 as e
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.peers.consultation import describe_command
from tolaria.reference.history import EPOCHS_MAX, TRIALS_MAX, RunHistory
from tolaria.reference.kasmina import DesiredSeeds
from tolaria.reference.policy import decide_epoch
from tolaria.reference.tamiyo import command_for
from tolaria.values.seeds import GROWING

FALLING = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2]


def epoch_state(
    epoch: int,
    training: float = 0.5,
    validation: float = 0.5,
    *,
    accuracy: float = 0.9,
    seeds: Sequence[SeedState] = (),
) -> SystemStatePacket:
    """Returns the state of an epoch; each epoch has 100 steps."""
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
    states: Sequence[SystemStatePacket], history: RunHistory | None = None
) -> tuple[RunHistory, list[AdaptationCommand | None]]:
    """Returns the history after the states, and the decision on each of them."""
    history, decisions = history or RunHistory(), []
    for state in states:
        history, decision = decide_epoch(history, state)
        decisions.append(decision)
    return history, decisions


def described(decisions: Sequence[AdaptationCommand | None]) -> list[str | None]:
    """Returns the decisions for display, without their reasons."""
    return [decision and describe_command(decision) for decision in decisions]


def reason_of(decision: AdaptationCommand | None) -> str:
    """Returns the reason of a decision."""
    assert decision is not None
    return decision.annotations["reason"]


def seed(seed_id: str, stage: int, age: int = 10) -> SeedState:
    """Returns a seed as Tolaria reports it."""
    return SeedState(seed_id=seed_id, stage=stage, age_epochs=age)  # type: ignore[arg-type]


def test_a_falling_loss_leads_to_no_decision() -> None:
    """While losses fall there are no commands."""
    _, decisions = play([epoch_state(n, loss, loss) for n, loss in enumerate(FALLING, 1)])
    assert decisions == [None] * len(FALLING)


def test_a_plateau_germinates_a_seed() -> None:
    """Three epochs without improvement germinate one seed; the next follows when it is no longer young."""
    _, decisions = play([epoch_state(n) for n in range(1, 10)])
    germinations = [*[None] * 3, "germinate residual_mlp", *[None] * 3, "germinate bottleneck_adapter", None]
    assert described(decisions) == germinations


def test_blueprints_take_turns() -> None:
    """The first blueprint follows the last one."""
    _, decisions = play([epoch_state(n) for n in range(1, 30)])
    blueprints = [d.seed_operation.blueprint_id for d in decisions if d is not None]
    assert blueprints[:5] == ["residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora", "residual_mlp"]


def test_an_improvement_below_the_margin_is_a_plateau() -> None:
    """An improvement above the margin ends the plateau."""
    _, small = play([epoch_state(n, validation=0.5 - 0.001 * n) for n in range(1, 6)])
    _, real = play([epoch_state(n, validation=0.5 - 0.02 * n) for n in range(1, 6)])
    assert "germinate residual_mlp" in described(small)
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
def test_active_seeds_limit_germination(seeds: list[SeedState], *, germinates: bool) -> None:
    """No seed is germinated beside a young one or beyond the limit; seeds that are not active do not count."""
    _, decisions = play([epoch_state(n, seeds=seeds) for n in range(1, 5)])
    assert germinates == (decisions[-1] is not None)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e9, 5.0])
def test_a_loss_that_diverges_leads_to_no_decision(loss: float) -> None:
    """The service judges the health of training: Tamiyo asks for no rollback, whatever she remembers."""
    losses = [*FALLING, loss, loss]
    _, decisions = play([epoch_state(n, each, 1.0 / n) for n, each in enumerate(losses, 1)])
    assert decisions == [None] * len(losses)
    assert play([epoch_state(9, loss)])[1] == [None]


def test_noise_at_a_low_loss_leads_to_no_decision() -> None:
    """A loss of 0.01 that doubles from epoch to epoch has lost nothing of what training gained."""
    losses = [2.3, 1.0, 0.3, 0.1, *[0.01 if n % 2 else 0.04 for n in range(60)]]
    _, decisions = play([epoch_state(n, loss, 1.0 / n) for n, loss in enumerate(losses, 1)])
    assert decisions == [None] * len(losses)


def test_a_volatile_loss_lowers_the_learning_rate() -> None:
    """Two jumps within the window halve the learning rate for ten epochs, once in the pause."""
    losses = [1.0, 0.8, 1.1, 0.9, 1.2, 1.0, 1.3, 1.1]
    _, decisions = play([epoch_state(n, loss, 1.0 / n) for n, loss in enumerate(losses, 1)])
    assert described(decisions) == [None] * 4 + ["optimizer"] + [None] * 3
    assert decisions[4] is not None
    assert decisions[4].optimizer_adjustment.hyperparameters == {
        "lr_factor": 0.5,
        "lr_expires_after_steps": 1000.0,
    }


def test_a_noisy_loss_lowers_the_learning_rate_three_times_in_all() -> None:
    """The limit holds even after the records of the first changes are dropped."""
    losses = [0.1 if n % 2 else 0.2 for n in range(EPOCHS_MAX + 100)]
    history, decisions = play([epoch_state(n, loss, 1.0 / n) for n, loss in enumerate(losses, 1)])
    lowered = [n for n, decision in enumerate(described(decisions), 1) if decision == "optimizer"]
    assert len(lowered) == 3
    assert lowered[-1] < 100
    # A change that a rollback undoes does not count, since the rates are restored.
    assert history.rewound(lowered[1] * 100).rate_changes == (lowered[0] * 100, lowered[1] * 100)


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
    ],
)
def test_decisions_have_a_reason(states: list[SystemStatePacket], reason: str) -> None:
    """The reason contains the figures that led to the decision."""
    _, decisions = play(states)
    assert reason_of(decisions[-1]) == reason


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [(0.9, "fossilize s"), (0.896, "fossilize s"), (0.8, "cull s"), (math.nan, None)],
)
def test_a_probation_ends_with_a_verdict(accuracy: float, verdict: str | None) -> None:
    """The accuracy after the probation is compared with that of the epoch before the blending."""
    stages = [e.SEED_STAGE_TRAINING, e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 4]
    states = [
        epoch_state(n, 1 / n, 1 / n, accuracy=0.9 if n == 1 else accuracy, seeds=[seed("s", stage)])
        for n, stage in enumerate(stages, 1)
    ]
    _, decisions = play(states)
    assert described(decisions) == [None] * 5 + [verdict]


def test_a_state_of_an_earlier_step_rewinds() -> None:
    """The history is the same as if the later states had not been seen."""
    whole, _ = play([epoch_state(n) for n in range(1, 4)])
    longer, _ = play([epoch_state(n, 5.0, 5.0, accuracy=0.1) for n in range(3, 9)], whole)
    again, _ = play([epoch_state(3)], longer)
    assert whole == again


def test_rewinding_keeps_earlier_records() -> None:
    """The trials of seeds are those at the step; before the first record the history is empty."""
    stages = [e.SEED_STAGE_BLENDING, e.SEED_STAGE_BLENDING, e.SEED_STAGE_PROBATIONARY, e.SEED_STAGE_PROBATIONARY]
    history, _ = play([epoch_state(n, 1 / n, 1 / n, seeds=[seed("s", stage)]) for n, stage in enumerate(stages, 1)])
    rewound = history.rewound(250)
    assert [record.epoch for record in rewound.records] == [1, 2]
    assert rewound.trials[0].probation_epoch is None
    assert rewound.trials[0].effect_step == 100
    assert history.rewound(400) is history
    assert history.rewound(0).records == ()
    assert math.isnan(history.rewound(0).first_loss)


def tried(n: int, *, gain: float = 0.0, end: int = e.SEED_STAGE_FOSSILIZED) -> list[SystemStatePacket]:
    """Returns ten epochs in which seed `n` grows, adds `gain` to the accuracy, and ends in a stage."""
    stages = [e.SEED_STAGE_TRAINING, e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 3, *[end] * 5]
    before = [seed(f"s{other}", e.SEED_STAGE_FOSSILIZED) for other in range(n)]
    return [
        epoch_state(
            10 * n + place + 1, accuracy=0.9 + (gain if place >= 2 else 0.0), seeds=[*before, seed(f"s{n}", stage)]
        )
        for place, stage in enumerate(stages)
    ]


def last_is_germination(states: Sequence[SystemStatePacket]) -> bool:
    """Returns whether a seed is germinated within the last five states."""
    return any(
        decision and decision.seed_operation.operation == e.SEED_OP_GERMINATE for decision in play(states)[1][-5:]
    )


@pytest.mark.parametrize(
    ("trials", "grows"),
    [
        ([tried(0)], True),
        ([tried(0), tried(1)], False),
        ([tried(0), tried(1, gain=0.05)], True),
        ([tried(0, gain=0.05), tried(1, gain=0.05)], True),
        ([tried(0, end=e.SEED_STAGE_DORMANT), tried(1)], False),
        ([tried(0, gain=0.05, end=e.SEED_STAGE_CULLED), tried(1)], False),
    ],
)
def test_the_model_stops_growing_when_its_last_seeds_brought_nothing(
    trials: list[list[SystemStatePacket]], *, grows: bool
) -> None:
    """Two seeds in a row without a gain are enough; a culled one has no gain. One gain goes on."""
    assert last_is_germination([state for trial in trials for state in trial]) == grows


def test_growth_that_a_rollback_undoes_does_not_count() -> None:
    """Back before the second seed without a gain, Tamiyo goes on growing."""
    history, _ = play([*tried(0), *tried(1)])
    assert [outcome.gained for outcome in history.outcomes] == [False, False]
    assert [outcome.seed_id for outcome in history.rewound(1000).outcomes] == ["s0"]


@pytest.mark.parametrize(("metric", "room"), [("seeds.slots_free", 0.0), ("seeds.fossilized_left", 0.0)])
def test_a_model_without_room_is_not_grown(metric: str, room: float) -> None:
    """The packet says that there is no slot, or that no further seed may become a part of the host."""
    states = [epoch_state(n) for n in range(1, 20)]
    assert play(states)[1] != [None] * 19
    for state in states:
        state.training_metrics[metric] = room
    assert play(states)[1] == [None] * 19


def test_a_seed_without_room_in_the_host_is_culled() -> None:
    """At the end of its probation, with the reason."""
    stages = [e.SEED_STAGE_BLENDING, *[e.SEED_STAGE_PROBATIONARY] * 4]
    states = [epoch_state(n, 1 / n, 1 / n, seeds=[seed("s", stage)]) for n, stage in enumerate(stages, 1)]
    for state in states:
        state.training_metrics["seeds.fossilized_left"] = 0.0
    _, decisions = play(states)
    assert described(decisions)[-1] == "cull s"
    assert reason_of(decisions[-1]).startswith("no further seed may become a part of the host")


def test_the_history_is_bounded() -> None:
    """In a long run with many seeds."""
    seeds = [seed(f"s{n}", e.SEED_STAGE_BLENDING) for n in range(200)]
    history, _ = play([epoch_state(n, seeds=seeds) for n in range(1, 300)])
    assert len(history.records) == EPOCHS_MAX
    assert len(history.trials) == TRIALS_MAX


_any_float = st.floats(width=32)
_any_stage = st.sampled_from([*e.SeedLifecycleStage.values(), 99])
_any_seeds = st.lists(st.builds(seed, st.sampled_from("abc"), _any_stage, st.integers(0, 9)), max_size=3)
_any_state = st.builds(epoch_state, st.integers(0, 20), _any_float, _any_float, accuracy=_any_float, seeds=_any_seeds)


@settings(max_examples=200)
@given(st.lists(_any_state, max_size=25))
def test_any_states_are_accepted(states: list[SystemStatePacket]) -> None:
    """States in any order with any numbers raise nothing; the steps of the records increase."""
    history, _ = play(states)
    steps = [record.step for record in history.records]
    assert steps == sorted(set(steps))


def run(epochs: int, *, harm: float) -> tuple[list[AdaptationCommand], list[ApplyCommandResponse], list[SeedState]]:
    """Runs Tamiyo's policy and Kasmina on a plateau, where each seed at full strength costs `harm` of the accuracy."""
    history, desired = RunHistory(), DesiredSeeds()
    decisions: list[AdaptationCommand] = []
    responses: list[ApplyCommandResponse] = []
    seeds: list[SeedState] = []
    for epoch in range(1, epochs + 1):
        strong = sum(seed.stage in {e.SEED_STAGE_SHADOWING, e.SEED_STAGE_PROBATIONARY} for seed in seeds)
        state = SystemStatePacket(
            version=1,
            current_epoch=epoch,
            global_step=epoch * 100,
            training_loss=0.5,
            validation_loss=0.5,
            validation_accuracy=0.9 - harm * strong,
            seed_states=seeds,
        )
        history, decision = decide_epoch(history, state)
        if decision is not None:
            command = command_for(decision, command_id=f"c{epoch}", issued_at_ns=0)
            decisions.append(decision)
            responses.append(desired.apply(command, state))
        desired.observe(state)
        seeds = desired.as_messages()
        for seed in seeds:
            seed.gradient_norm = 1.0
    return decisions, responses, seeds


@pytest.mark.parametrize(
    ("harm", "verdict", "end"),
    [(0.0, e.SEED_OP_FOSSILIZE, e.SEED_STAGE_FOSSILIZED), (0.1, e.SEED_OP_CULL, e.SEED_STAGE_DORMANT)],
)
def test_kasmina_applies_every_decision(harm: float, verdict: int, end: int) -> None:
    """Seeds are germinated on the plateau and judged by their effect; no gate refuses a decision."""
    decisions, responses, seeds = run(40, harm=harm)
    assert all(response.applied for response in responses)
    assert {decision.seed_operation.operation for decision in decisions} == {e.SEED_OP_GERMINATE, verdict}
    assert end in {seed.stage for seed in seeds}
    assert sum(seed.stage in GROWING for seed in seeds) <= 2


def test_a_long_run_without_gains_stops_growing() -> None:
    """In 600 epochs on a plateau few seeds become a part of the host."""
    decisions, _, seeds = run(600, harm=0.0)
    assert sum(seed.stage == e.SEED_STAGE_FOSSILIZED for seed in seeds) <= 3
    assert sum(decision.seed_operation.operation == e.SEED_OP_GERMINATE for decision in decisions) <= 3
