from __future__ import annotations

import pytest

from leyline.v1 import enums_pb2 as e
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.gates import LifecycleSettings
from tolaria.reference.lifecycle import TRANSITIONS, Operation, Stage
from tolaria.reference.seed_bed import SeedBed

SETTINGS = LifecycleSettings()


def packet(epoch: int, seeds: list[SeedState] | None = None, *, accuracy: float = 0.9) -> SystemStatePacket:
    """An epoch's state; every epoch has 100 steps."""
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
    """A seed command; its number makes its id."""
    return AdaptationCommand(
        version=1,
        command_id=f"c{number}",
        command_type=e.COMMAND_SEED,
        target_seed_id=target,
        seed_operation=CommandSeedOperation(operation=operation, blueprint_id=blueprint, parameters=parameters or {}),
        annotations={"slot": slot} if slot else {},
    )


def healthy(bed: SeedBed) -> list[SeedState]:
    """What Tolaria reports when all that is desired is grafted and well."""
    seeds = bed.desired()
    for seed in seeds:
        seed.gradient_norm = 1.0
        seed.slot = seed.slot or "first-free"
    return seeds


def stages(bed: SeedBed) -> list[Stage]:
    """The desired stages, in order."""
    return [seed.stage for seed in bed.desired()]


def bed_with_seed_in(stage: Stage) -> SeedBed:
    """A bed whose only seed, s, has been in `stage` since epoch 1."""
    bed = SeedBed(SETTINGS)
    bed.observe(packet(1, [SeedState(seed_id="s", stage=stage, blueprint_id="lora", slot="x", gradient_norm=1.0)]))
    return bed


def test_a_healthy_seed_goes_all_the_way_to_probation() -> None:
    """A germinated seed passes at most one stage an epoch, as its gates open; its alpha starts at its blending."""
    bed = SeedBed(SETTINGS)
    assert bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1)).applied
    seen = []
    for epoch in range(1, 9):
        bed.observe(packet(epoch, healthy(bed)))
        seen.append(bed.desired()[0])
    assert [seed.stage for seed in seen] == [
        e.SEED_STAGE_GERMINATED,
        e.SEED_STAGE_TRAINING,
        e.SEED_STAGE_BLENDING,
        e.SEED_STAGE_BLENDING,  # G2 watches the loss for two epochs
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


def test_one_epoch_moves_seeds_once() -> None:
    """The same state again, or another state of the same epoch, changes nothing."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    bed.observe(packet(2, healthy(bed)))
    once = bed.desired()
    bed.observe(packet(2, healthy(bed)))
    again = packet(2, healthy(bed))
    again.packet_id, again.global_step = "another", 250
    bed.observe(again)
    assert once == bed.desired()
    assert stages(bed) == [e.SEED_STAGE_TRAINING]


def test_one_epoch_counts_once_at_a_gate() -> None:
    """Repeats of an epoch's state are no further epochs of a still loss."""
    bed = bed_with_seed_in(e.SEED_STAGE_TRAINING)
    for epoch in (2, 3, 3, 3):
        bed.observe(packet(epoch, healthy(bed)))
    assert stages(bed) == [e.SEED_STAGE_BLENDING]


def test_a_culled_seed_rests_before_it_is_dormant() -> None:
    """Culling leads over embargo and reset to dormancy, where the seed gives its slot back and can germinate again."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE, slot="x"), packet(1))
    assert bed.apply(seed_command(e.SEED_OP_CULL, number=2, target="seed-1"), packet(1)).applied
    seen = []
    for epoch in range(2, 7):
        bed.observe(packet(epoch))
        seen.append(stages(bed)[0])
    assert seen == [
        e.SEED_STAGE_EMBARGOED,
        e.SEED_STAGE_EMBARGOED,
        e.SEED_STAGE_RESETTING,
        e.SEED_STAGE_DORMANT,
        e.SEED_STAGE_DORMANT,
    ]
    assert bed.desired()[0].slot == ""
    assert bed.apply(seed_command(e.SEED_OP_GERMINATE, number=3, target="seed-1"), packet(6)).applied
    assert stages(bed) == [e.SEED_STAGE_GERMINATED]


def test_a_seed_that_is_not_well_is_given_up() -> None:
    """A seed whose gate stays shut for the whole patience is culled."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    for epoch in range(2, 2 + SETTINGS.patience_epochs):
        bed.observe(packet(epoch))
        assert stages(bed) == [e.SEED_STAGE_TRAINING]
    bed.observe(packet(2 + SETTINGS.patience_epochs))
    assert stages(bed) == [e.SEED_STAGE_CULLED]


@pytest.mark.parametrize(("accuracy", "end"), [(0.9, e.SEED_STAGE_FOSSILIZED), (0.5, e.SEED_STAGE_CULLED)])
def test_a_probation_that_nobody_decides(accuracy: float, end: Stage) -> None:
    """At the end of the patience G4 itself decides between the host and the end."""
    bed = bed_with_seed_in(e.SEED_STAGE_PROBATIONARY)
    for epoch in range(2, 1 + SETTINGS.patience_epochs):
        bed.observe(packet(epoch, accuracy=accuracy))
        assert stages(bed) == [e.SEED_STAGE_PROBATIONARY]
    bed.observe(packet(1 + SETTINGS.patience_epochs, accuracy=accuracy))
    assert stages(bed) == [end]


def test_fossilizing_waits_for_its_gate() -> None:
    """FOSSILIZE is refused with the gate's reason until the probation is over, then applied."""
    bed = bed_with_seed_in(e.SEED_STAGE_PROBATIONARY)
    refused = bed.apply(seed_command(e.SEED_OP_FOSSILIZE, number=1, target="s"), packet(2))
    assert not refused.applied
    assert "G4: 1 of 3 epochs on probation" in refused.detail
    assert bed.apply(seed_command(e.SEED_OP_FOSSILIZE, number=2, target="s"), packet(4)).applied
    assert stages(bed) == [e.SEED_STAGE_FOSSILIZED]


def test_fine_tuning_starts_the_probation_over() -> None:
    """After FINE_TUNE the probation counts from anew."""
    bed = bed_with_seed_in(e.SEED_STAGE_PROBATIONARY)
    assert bed.apply(seed_command(e.SEED_OP_FINE_TUNE, number=1, target="s"), packet(4)).applied
    assert not bed.apply(seed_command(e.SEED_OP_FOSSILIZE, number=2, target="s"), packet(5)).applied


@pytest.mark.parametrize("operation", e.SeedOperation.values())
@pytest.mark.parametrize("stage", [s for s in e.SeedLifecycleStage.values() if s != e.SEED_STAGE_UNKNOWN])
def test_every_operation_in_every_stage(operation: Operation, stage: Stage) -> None:
    """A refused operation changes nothing; an applied one is a move of the table."""
    bed = bed_with_seed_in(stage)
    before = bed.desired()
    answer = bed.apply(seed_command(operation, target="s"), packet(1))
    after = stages(bed)
    if answer.applied:
        assert after[0] in TRANSITIONS[before[0].stage]
    else:
        assert answer.detail
        assert before == bed.desired()


def test_a_repeated_command_gets_the_same_answer() -> None:
    """The same command_id is carried out once, whether it was applied or refused."""
    bed = SeedBed(SETTINGS)
    first = bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    assert first is bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    refused = bed.apply(seed_command(e.SEED_OP_CULL, number=2, target="nobody"), packet(1))
    assert refused is bed.apply(seed_command(e.SEED_OP_CULL, number=2, target="seed-1"), packet(1))
    assert stages(bed) == [e.SEED_STAGE_GERMINATED]


def bad(**changes: object) -> AdaptationCommand:
    """A germination with some fields spoilt."""
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
        (seed_command(e.SEED_OP_CULL, target="nobody"), "'nobody' names no seed"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"width": 4.0}), "'width' is unknown"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"blending_steps": float("nan")}), "blending_steps is nan"),
        (seed_command(e.SEED_OP_GERMINATE, parameters={"blending_steps": 0.0}), "not from 1"),
        (seed_command(e.SEED_OP_UNKNOWN, target="old"), "does not fit"),
    ],
)
def test_refusals_say_why(command: AdaptationCommand, why: str) -> None:
    """A command that cannot be carried out is refused with its reason and changes nothing."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE, number=0, target="old", slot="taken"), packet(1))
    before = bed.desired()
    answer = bed.apply(command, packet(1))
    assert not answer.applied
    assert why in answer.detail
    assert before == bed.desired()


def test_a_bed_is_bounded() -> None:
    """No more seeds live at once than the setting says, and dormant ones beyond theirs are forgotten, oldest first."""
    bed = SeedBed(LifecycleSettings(living_max=2, dormant_max=1, embargo_epochs=0))
    for number in range(2):
        assert bed.apply(seed_command(e.SEED_OP_GERMINATE, number=number), packet(1)).applied
    assert "2 seeds live already" in bed.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(1)).detail
    bed.apply(seed_command(e.SEED_OP_CULL, number=3, target="seed-1"), packet(1))
    bed.observe(packet(2))
    bed.apply(seed_command(e.SEED_OP_CULL, number=4, target="seed-2"), packet(2))
    for epoch in range(3, 8):
        bed.observe(packet(epoch))
    assert [seed.seed_id for seed in bed.desired()] == ["seed-2"]


def test_a_full_bed_takes_no_more() -> None:
    """Fossilized seeds count against what a bed can hold."""
    bed = SeedBed(LifecycleSettings(seeds_max=2))
    bed.observe(packet(1, [SeedState(seed_id=f"f{n}", stage=e.SEED_STAGE_FOSSILIZED) for n in range(5)]))
    assert [seed.seed_id for seed in bed.desired()] == ["f0", "f1"]
    assert "holds 2 seeds" in bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1)).detail


def test_answers_are_remembered_within_bounds() -> None:
    """Thousands of commands leave a bounded memory of answers and of history."""
    bed = SeedBed(SETTINGS)
    for number in range(1500):
        bed.apply(seed_command(e.SEED_OP_CULL, number=number, target="nobody"), packet(1))
        bed.observe(packet(number))
    assert len(bed._answers) == 1024
    assert len(bed._history) == 256


def test_attribution_is_shared_among_those_that_train() -> None:
    """Seeds that train share the teacher equally; germinated and fossilized ones have no part."""
    bed = SeedBed(SETTINGS)
    training = [SeedState(seed_id=f"t{n}", stage=e.SEED_STAGE_TRAINING) for n in range(2)]
    others = [
        SeedState(seed_id="g", stage=e.SEED_STAGE_GERMINATED),
        SeedState(seed_id="f", stage=e.SEED_STAGE_FOSSILIZED),
    ]
    bed.observe(packet(1, [*training, *others]))
    assert [seed.attribution for seed in bed.desired()] == [0.5, 0.5, 0.0, 0.0]


def test_a_new_bed_takes_over_what_is_grafted() -> None:
    """After a restart of Kasmina the seeds that Tolaria reports stay, each id once, in stages that mean something."""
    bed = SeedBed(SETTINGS)
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=50, duration_steps=10)
    reported = [
        SeedState(seed_id="a", stage=e.SEED_STAGE_BLENDING, blueprint_id="lora", slot="x", alpha=alpha, age_epochs=3),
        SeedState(seed_id="a", stage=e.SEED_STAGE_BLENDING, blueprint_id="lora", slot="x", alpha=alpha, age_epochs=3),
        SeedState(seed_id="odd", stage=e.SEED_STAGE_UNKNOWN),
        SeedState(seed_id="b", stage=e.SEED_STAGE_BLENDING, metrics={"alpha": 0.25}),
        SeedState(seed_id="c", stage=e.SEED_STAGE_BLENDING, metrics={"alpha": float("nan")}),
    ]
    bed.observe(packet(7, reported))
    desired = {seed.seed_id: seed for seed in bed.desired()}
    assert list(desired) == ["a", "b", "c"]
    assert (desired["a"].slot, desired["a"].alpha, desired["a"].age_epochs) == ("x", alpha, 3)
    assert desired["b"].alpha == AlphaSchedule(start=0.25, end=1.0, begin_step=700, duration_steps=150)
    assert not desired["c"].HasField("alpha")


def test_a_bed_that_knows_better_takes_nothing_over() -> None:
    """An echo of a seed that the bed has not got does not bring it back."""
    bed = SeedBed(SETTINGS)
    bed.observe(packet(1))
    bed.observe(packet(2, [SeedState(seed_id="ghost", stage=e.SEED_STAGE_TRAINING)]))
    assert bed.desired() == []


def test_reverting_and_undoing() -> None:
    """A revert brings back the bed of that step, an undo the one before; ids given in between are not given again."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE, number=1), packet(1))
    at_epoch_1 = bed.desired()
    bed.observe(packet(2))
    bed.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(3))
    at_epoch_3 = bed.desired()
    undo = bed.revert(199)
    assert at_epoch_1 == bed.desired()
    undo()
    assert at_epoch_3 == bed.desired()
    bed.revert(199)
    bed.apply(seed_command(e.SEED_OP_GERMINATE, number=3), packet(2))
    assert [seed.seed_id for seed in bed.desired()] == ["seed-1", "seed-3"]


def test_a_restored_run_is_followed_without_being_told() -> None:
    """A state of an earlier step reverts the bed, and its epochs count again."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    bed.observe(packet(2, healthy(bed)))
    bed.observe(packet(3, healthy(bed)))
    assert stages(bed) == [e.SEED_STAGE_BLENDING]
    bed.observe(packet(2, healthy(bed)))
    assert stages(bed) == [e.SEED_STAGE_TRAINING]
    bed.observe(packet(3, healthy(bed)))
    assert stages(bed) == [e.SEED_STAGE_BLENDING]


def test_a_late_command_does_not_revert() -> None:
    """A command that was decided on an older state is applied to the bed as it is now."""
    bed = SeedBed(SETTINGS)
    bed.apply(seed_command(e.SEED_OP_GERMINATE), packet(1))
    bed.observe(packet(2))
    assert bed.apply(seed_command(e.SEED_OP_GERMINATE, number=2), packet(1)).applied
    assert stages(bed) == [e.SEED_STAGE_TRAINING, e.SEED_STAGE_GERMINATED]
    bed.revert(150)
    assert stages(bed) == [e.SEED_STAGE_GERMINATED]
