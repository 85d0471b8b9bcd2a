from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyline.v1 import enums_pb2 as e
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference import kasmina, lifecycle
from tolaria.reference.kasmina import STAGE_EPOCHS_MAX, DesiredSeeds
from tolaria.reference.lifecycle import TRANSITIONS, Operation
from tolaria.values.seeds import GROWING, Stage


def packet(epoch: int, seeds: list[SeedState] | None = None, *, accuracy: float = 0.9) -> SystemStatePacket:
    """Returns the state of an epoch; each epoch has 100 steps."""
    return SystemStatePacket(
        version=1,
        current_epoch=epoch,
        global_step=epoch * 100,
        packet_id=f"p{epoch}",
        training_run_id="run",
        validation_loss=1.0,
        validation_accuracy=accuracy,
        seed_states=seeds or [],
    )


def seed_command(
    operation: Operation,
    *,
    number: int = 1,
    target: str = "",
    blueprint: str = "lora",
    slot: str = "",
    parameters: dict[str, float] | None = None,
) -> AdaptationCommand:
    """Returns a seed command; `number` determines its id."""
    return AdaptationCommand(
        version=1,
        command_id=f"c{number}",
        command_type=e.COMMAND_SEED,
        target_seed_id=target,
        seed_operation=CommandSeedOperation(operation=operation, blueprint_id=blueprint, parameters=parameters or {}),
        annotations={"slot": slot} if slot else {},
    )


def healthy(desired: DesiredSeeds) -> list[SeedState]:
    """Returns what Tolaria reports when all desired seeds are grafted and healthy."""
    seeds = desired.as_messages()
    for seed in seeds:
        seed.gradient_norm = 1.0
        seed.slot = seed.slot or "first-free"
    return seeds


def stages(desired: DesiredSeeds) -> list[Stage]:
    """Returns the desired stages, in order."""
    return [seed.stage for seed in desired.as_messages()]


def seeds_in_stage(stage: Stage) -> DesiredSeeds:
    """Returns desired seeds with one seed, s, that entered `stage` in epoch 1."""
    desired = DesiredSeeds()
    desired.observe(packet(1, [SeedState(seed_id="s", stage=stage, blueprint_id="lora", slot="x", gradient_norm=1.0)]))
    return desired


def test_a_healthy_seed_advances_to_probation() -> None:
    """A germinated seed advances one stage an epoch as its gates open; alpha starts when it blends."""
    desired = DesiredSeeds()
    assert desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1)).applied
    seen = []
    for epoch in range(1, 9):
        desired.observe(packet(epoch, healthy(desired)))
        seen.append(desired.as_messages()[0])
    assert [seed.stage for seed in seen] == [
        e.SEED_STAGE_GERMINATED,
        e.SEED_STAGE_TRAINING,
        e.SEED_STAGE_BLENDING,
        e.SEED_STAGE_BLENDING,  # G2 requires two epochs of stable loss
        e.SEED_STAGE_SHADOWING,
        e.SEED_STAGE_PROBATIONARY,
        e.SEED_STAGE_PROBATIONARY,
        e.SEED_STAGE_PROBATIONARY,
    ]
    assert seen[-1].alpha == AlphaSchedule(start=0.0, end=1.0, begin_step=300, duration_steps=200)
    assert seen[-1].blueprint_id == "lora"
    assert seen[-1].slot == "first-free"
    assert seen[-1].age_epochs == 7
    assert seen[-1].attribution == 1.0


def test_seeds_advance_once_an_epoch() -> None:
    """The same state again, or another state of the same epoch, changes nothing."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    desired.observe(packet(2, healthy(desired)))
    once = desired.as_messages()
    desired.observe(packet(2, healthy(desired)))
    again = packet(2, healthy(desired))
    again.packet_id, again.global_step = "another", 250
    desired.observe(again)
    assert once == desired.as_messages()
    assert stages(desired) == [e.SEED_STAGE_TRAINING]


def test_repeated_states_count_once_at_a_gate() -> None:
    """Repeated states of an epoch do not add to the epochs of stable loss."""
    desired = seeds_in_stage(e.SEED_STAGE_TRAINING)
    for epoch in (2, 3, 3, 3):
        desired.observe(packet(epoch, healthy(desired)))
    assert stages(desired) == [e.SEED_STAGE_BLENDING]


def test_a_culled_seed_becomes_dormant_after_its_embargo() -> None:
    """A dormant seed has no slot and can be germinated again."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE, slot="x"), packet(1))
    assert desired.apply(seed_command(e.SEED_OP_CULL, number=2, target="seed-1"), packet(1)).applied
    seen = []
    for epoch in range(2, 7):
        desired.observe(packet(epoch))
        seen.append(stages(desired)[0])
    assert seen == [
        e.SEED_STAGE_EMBARGOED,
        e.SEED_STAGE_EMBARGOED,
        e.SEED_STAGE_RESETTING,
        e.SEED_STAGE_DORMANT,
        e.SEED_STAGE_DORMANT,
    ]
    assert desired.as_messages()[0].slot == ""
    assert desired.apply(seed_command(e.SEED_OP_GERMINATE, number=3, target="seed-1"), packet(6)).applied
    assert stages(desired) == [e.SEED_STAGE_GERMINATED]


def test_a_seed_that_does_not_advance_is_culled() -> None:
    """A seed whose gate stays closed for STAGE_EPOCHS_MAX epochs is culled."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    for epoch in range(2, 2 + STAGE_EPOCHS_MAX):
        desired.observe(packet(epoch))
        assert stages(desired) == [e.SEED_STAGE_TRAINING]
    desired.observe(packet(2 + STAGE_EPOCHS_MAX))
    assert stages(desired) == [e.SEED_STAGE_CULLED]


@pytest.mark.parametrize(("accuracy", "end"), [(0.9, e.SEED_STAGE_FOSSILIZED), (0.5, e.SEED_STAGE_CULLED)])
def test_a_probation_without_a_command_is_decided_by_its_gate(accuracy: float, end: Stage) -> None:
    """After STAGE_EPOCHS_MAX epochs G4 decides between fossilizing and culling."""
    desired = seeds_in_stage(e.SEED_STAGE_PROBATIONARY)
    for epoch in range(2, 1 + STAGE_EPOCHS_MAX):
        desired.observe(packet(epoch, accuracy=accuracy))
        assert stages(desired) == [e.SEED_STAGE_PROBATIONARY]
    desired.observe(packet(1 + STAGE_EPOCHS_MAX, accuracy=accuracy))
    assert stages(desired) == [end]


def test_fossilize_is_refused_until_its_gate_is_open() -> None:
    """The refusal contains the reason of the gate."""
    desired = seeds_in_stage(e.SEED_STAGE_PROBATIONARY)
    refused = desired.apply(seed_command(e.SEED_OP_FOSSILIZE, number=1, target="s"), packet(2))
    assert not refused.applied
    assert "G4: 1 of 3 epochs on probation" in refused.detail
    assert desired.apply(seed_command(e.SEED_OP_FOSSILIZE, number=2, target="s"), packet(4)).applied
    assert stages(desired) == [e.SEED_STAGE_FOSSILIZED]


def test_fine_tuning_restarts_the_probation() -> None:
    """FOSSILIZE is refused an epoch after FINE_TUNE."""
    desired = seeds_in_stage(e.SEED_STAGE_PROBATIONARY)
    assert desired.apply(seed_command(e.SEED_OP_FINE_TUNE, number=1, target="s"), packet(4)).applied
    assert not desired.apply(seed_command(e.SEED_OP_FOSSILIZE, number=2, target="s"), packet(5)).applied


@pytest.mark.parametrize("operation", e.SeedOperation.values())
@pytest.mark.parametrize("stage", [s for s in e.SeedLifecycleStage.values() if s != e.SEED_STAGE_UNKNOWN])
def test_every_operation_in_every_stage(operation: Operation, stage: Stage) -> None:
    """A refused operation changes nothing; an applied one is a legal transition."""
    desired = seeds_in_stage(stage)
    before = desired.as_messages()
    answer = desired.apply(seed_command(operation, target="s"), packet(1))
    after = stages(desired)
    if answer.applied:
        assert (before[0].stage, after[0]) in TRANSITIONS
    else:
        assert answer.detail
        assert before == desired.as_messages()


def test_a_repeated_command_gets_the_same_response() -> None:
    """A command_id is executed once, whether it was applied or refused."""
    desired = DesiredSeeds()
    first = desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    assert first is desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    refused = desired.apply(seed_command(e.SEED_OP_CULL, number=2, target="missing"), packet(1))
    assert refused is desired.apply(seed_command(e.SEED_OP_CULL, number=2, target="seed-1"), packet(1))
    assert stages(desired) == [e.SEED_STAGE_GERMINATED]


def bad(**changes: object) -> AdaptationCommand:
    """Returns a germination with changed fields."""
    command = seed_command(e.SEED_OP_GERMINATE)
    for name, value in changes.items():
        setattr(command, name, value)
    return command


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (bad(command_id=""), "no command_id"),
        (bad(version=2), "version 2"),
        (bad(command_type=e.COMMAND_PAUSE), "only seed commands"),
        (AdaptationCommand(version=1, command_id="c", command_type=e.COMMAND_SEED), "only seed commands"),
        (bad(target_seed_id="x" * 129), "longer than 128"),
        (bad(command_id="x" * 129), "longer than 128"),
        (seed_command(e.SEED_OP_GERMINATE, blueprint="nosuch"), "'nosuch' is unknown"),
        (seed_command(e.SEED_OP_GERMINATE, slot="taken"), "slot is taken"),
        (seed_command(e.SEED_OP_GERMINATE, target="old"), "does not fit"),
        (seed_command(e.SEED_OP_CULL, target="missing"), "'missing' names no seed"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"width": 4.0}), "'width' is unknown"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"blending_steps": float("nan")}), "blending_steps is nan"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"blending_steps": 0.0}), "not from 1"),
        (seed_command(e.SEED_OP_UNKNOWN, target="old"), "does not fit"),
    ],
)
def test_invalid_commands_are_refused_with_a_reason(command: AdaptationCommand, why: str) -> None:
    """A refused command changes nothing."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE, number=0, target="old", slot="taken"), packet(1))
    before = desired.as_messages()
    answer = desired.apply(command, packet(1))
    assert not answer.applied
    assert why in answer.detail
    assert before == desired.as_messages()


def test_active_and_dormant_seeds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Germination is refused at ACTIVE_MAX; dormant seeds beyond DORMANT_MAX are forgotten, oldest first."""
    monkeypatch.setattr(kasmina, "ACTIVE_MAX", 2)
    monkeypatch.setattr(kasmina, "DORMANT_MAX", 1)
    monkeypatch.setattr(lifecycle, "EMBARGO_EPOCHS", 0)
    desired = DesiredSeeds()
    for number in range(2):
        assert desired.apply(seed_command(e.SEED_OP_GERMINATE, number=number), packet(1)).applied
    assert "2 seeds are active already" in desired.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(1)).detail
    desired.apply(seed_command(e.SEED_OP_CULL, number=3, target="seed-1"), packet(1))
    desired.observe(packet(2))
    desired.apply(seed_command(e.SEED_OP_CULL, number=4, target="seed-2"), packet(2))
    for epoch in range(3, 8):
        desired.observe(packet(epoch))
    assert [seed.seed_id for seed in desired.as_messages()] == ["seed-2"]


def test_the_number_of_seeds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fossilized seeds count towards SEEDS_MAX."""
    monkeypatch.setattr(kasmina, "SEEDS_MAX", 2)
    desired = DesiredSeeds()
    desired.observe(packet(1, [SeedState(seed_id=f"f{n}", stage=e.SEED_STAGE_FOSSILIZED) for n in range(5)]))
    assert [seed.seed_id for seed in desired.as_messages()] == ["f0", "f1"]
    assert "there are 2 seeds already" in desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1)).detail


def test_responses_are_remembered_within_bounds() -> None:
    """The newest 1024 command ids are remembered; an older one is executed again."""
    desired = DesiredSeeds()
    for number in range(1500):
        desired.apply(seed_command(e.SEED_OP_CULL, number=number, target="missing"), packet(1))
    assert not desired.apply(seed_command(e.SEED_OP_GERMINATE, number=476), packet(1)).applied
    assert desired.apply(seed_command(e.SEED_OP_GERMINATE, number=475), packet(1)).applied


@pytest.mark.parametrize(("epoch", "seeds"), [(1244, ["f"]), (1243, [])])
def test_the_history_is_bounded(epoch: int, seeds: list[str]) -> None:
    """The newest 256 changes can be reverted to; before them there are no seeds."""
    desired = DesiredSeeds()
    for number in range(1500):
        desired.observe(packet(number, [SeedState(seed_id="f", stage=e.SEED_STAGE_FOSSILIZED)]))
    desired.revert(epoch * 100)
    assert [seed.seed_id for seed in desired.as_messages()] == seeds


def test_attribution_is_shared_by_the_seeds_that_train() -> None:
    """Seeds that train share it equally; germinated and fossilized ones have none."""
    desired = DesiredSeeds()
    training = [SeedState(seed_id=f"t{n}", stage=e.SEED_STAGE_TRAINING) for n in range(2)]
    others = [
        SeedState(seed_id="g", stage=e.SEED_STAGE_GERMINATED),
        SeedState(seed_id="f", stage=e.SEED_STAGE_FOSSILIZED),
    ]
    desired.observe(packet(1, [*training, *others]))
    assert [seed.attribution for seed in desired.as_messages()] == [0.5, 0.5, 0.0, 0.0]


def test_reported_seeds_are_adopted_after_a_restart() -> None:
    """The first state of a run adds the seeds that it reports, each id once, except those in unknown stages."""
    desired = DesiredSeeds()
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=50, duration_steps=10)
    reported = [
        SeedState(seed_id="a", stage=e.SEED_STAGE_BLENDING, blueprint_id="lora", slot="x", alpha=alpha, age_epochs=3),
        SeedState(seed_id="a", stage=e.SEED_STAGE_BLENDING, blueprint_id="lora", slot="x", alpha=alpha, age_epochs=3),
        SeedState(seed_id="odd", stage=e.SEED_STAGE_UNKNOWN),
        SeedState(seed_id="b", stage=e.SEED_STAGE_BLENDING, metrics={"alpha": 0.25}),
        SeedState(seed_id="c", stage=e.SEED_STAGE_BLENDING, metrics={"alpha": float("nan")}),
    ]
    desired.observe(packet(7, reported))
    adopted = {seed.seed_id: seed for seed in desired.as_messages()}
    assert list(adopted) == ["a", "b", "c"]
    assert (adopted["a"].slot, adopted["a"].alpha, adopted["a"].age_epochs) == ("x", alpha, 3)
    assert adopted["b"].alpha == AlphaSchedule(start=0.25, end=1.0, begin_step=700, duration_steps=150)
    assert not adopted["c"].HasField("alpha")


def test_reported_seeds_are_not_adopted_later() -> None:
    """With a history, a reported seed that is not desired is ignored."""
    desired = DesiredSeeds()
    desired.observe(packet(1))
    desired.observe(packet(2, [SeedState(seed_id="ghost", stage=e.SEED_STAGE_TRAINING)]))
    assert desired.as_messages() == []


def test_reverting_and_undoing() -> None:
    """A revert restores the seeds of a step, an undo those before it; ids are not assigned twice."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE, number=1), packet(1))
    at_epoch_1 = desired.as_messages()
    desired.observe(packet(2))
    desired.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(3))
    at_epoch_3 = desired.as_messages()
    undo = desired.revert(199)
    assert at_epoch_1 == desired.as_messages()
    undo()
    assert at_epoch_3 == desired.as_messages()
    desired.revert(199)
    desired.apply(seed_command(e.SEED_OP_GERMINATE, number=3), packet(2))
    assert [seed.seed_id for seed in desired.as_messages()] == ["seed-1", "seed-3"]


def test_a_state_of_an_earlier_step_reverts() -> None:
    """The seeds follow a run that was restored, and advance again."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    desired.observe(packet(2, healthy(desired)))
    desired.observe(packet(3, healthy(desired)))
    assert stages(desired) == [e.SEED_STAGE_BLENDING]
    desired.observe(packet(2, healthy(desired)))
    assert stages(desired) == [e.SEED_STAGE_TRAINING]
    desired.observe(packet(3, healthy(desired)))
    assert stages(desired) == [e.SEED_STAGE_BLENDING]


def test_a_late_command_does_not_revert() -> None:
    """A command that was decided on an older state is applied to the current seeds."""
    desired = DesiredSeeds()
    desired.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    desired.observe(packet(2))
    assert desired.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(1)).applied
    assert stages(desired) == [e.SEED_STAGE_TRAINING, e.SEED_STAGE_GERMINATED]
    desired.revert(150)
    assert stages(desired) == [e.SEED_STAGE_GERMINATED]


_any_float = st.floats(width=32)
_commands = st.builds(
    seed_command,
    st.sampled_from(e.SeedOperation.values()),
    number=st.integers(0, 10_000),
    target=st.sampled_from(["", "seed-1", "seed-2", "mine"]),
    blueprint=st.sampled_from(["lora", "nosuch"]),
    slot=st.sampled_from(["", "x", "y"]),
    parameters=st.dictionaries(st.just("blending_steps"), _any_float, max_size=1),
)
_reports = st.lists(
    st.builds(
        SeedState,
        seed_id=st.sampled_from(["seed-1", "seed-2", "mine", "other"]),
        stage=st.sampled_from([*e.SeedLifecycleStage.values(), 99]),
        gradient_norm=_any_float,
        slot=st.sampled_from(["", "x", "z"]),
        metrics=st.dictionaries(st.sampled_from(["loss", "alpha"]), _any_float, max_size=2),
    ),
    max_size=4,
)
_moves = st.one_of(_commands, _reports, st.integers(0, 2000))


@pytest.fixture
def quick_lifecycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits under which a seed passes all stages in a few epochs."""
    monkeypatch.setattr(lifecycle, "EMBARGO_EPOCHS", 1)
    monkeypatch.setattr(kasmina, "STAGE_EPOCHS_MAX", 4)
    monkeypatch.setattr(kasmina, "BLENDING_STEPS", 50)


@pytest.mark.usefixtures("quick_lifecycle")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_moves, max_size=60), st.data())
def test_any_sequence_follows_the_transition_table(
    moves: list[AdaptationCommand | list[SeedState] | int], data: st.DataObject
) -> None:
    """With any commands, states and reverts, ids are unique, bounds hold and each transition is legal."""
    seeds, epoch = DesiredSeeds(), 0
    for move in moves:
        before = {seed.seed_id: seed.stage for seed in seeds.as_messages()}
        if isinstance(move, int):
            seeds.revert(move)
            continue
        if isinstance(move, AdaptationCommand):
            seeds.apply(move, packet(epoch, accuracy=data.draw(_any_float)))
        else:
            epoch += 1
            seeds.observe(packet(epoch, move, accuracy=data.draw(_any_float)))
        desired = seeds.as_messages()
        ids = [seed.seed_id for seed in desired]
        assert len(ids) == len(set(ids))
        assert sum(seed.stage in GROWING for seed in desired) <= 4
        for seed in desired:
            if before.get(seed.seed_id, seed.stage) != seed.stage:
                assert (before[seed.seed_id], seed.stage) in TRANSITIONS
