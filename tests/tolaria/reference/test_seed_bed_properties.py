from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from leyline.v1 import enums_pb2 as e
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.gates import LifecycleSettings
from tolaria.reference.lifecycle import LIVING, TRANSITIONS, Operation
from tolaria.reference.seed_bed import SeedBed


def seed_command(
    operation: Operation, number: int, target: str, names: tuple[str, str], parameters: dict[str, float]
) -> AdaptationCommand:
    """A seed command; `names` are its blueprint and its slot."""
    blueprint, slot = names
    return AdaptationCommand(
        version=1,
        command_id=f"c{number}",
        command_type=e.COMMAND_SEED,
        target_seed_id=target,
        seed_operation=CommandSeedOperation(operation=operation, blueprint_id=blueprint, parameters=parameters),
        annotations={"slot": slot} if slot else {},
    )


def packet(epoch: int, seeds: list[SeedState], accuracy: float) -> SystemStatePacket:
    """An epoch's state; every epoch has 100 steps."""
    return SystemStatePacket(
        version=1,
        current_epoch=epoch,
        global_step=epoch * 100,
        validation_loss=1.0,
        validation_accuracy=accuracy,
        seed_states=seeds,
    )


_any_float = st.floats(width=32)
_commands = st.builds(
    seed_command,
    st.sampled_from(e.SeedOperation.values()),
    st.integers(0, 10_000),
    st.sampled_from(["", "seed-1", "seed-2", "mine"]),
    st.tuples(st.sampled_from(["lora", "nosuch"]), st.sampled_from(["", "x", "y"])),
    st.dictionaries(st.just("blending_steps"), _any_float, max_size=1),
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


@settings(max_examples=150, deadline=None)
@given(st.lists(_moves, max_size=60), st.data())
def test_no_sequence_leaves_the_tables(
    moves: list[AdaptationCommand | list[SeedState] | int], data: st.DataObject
) -> None:
    """Whatever comes in whatever order, ids are unique, bounds hold, and every seed moves as the table says."""
    bed, epoch = SeedBed(LifecycleSettings(embargo_epochs=1, patience_epochs=4, blending_steps=50)), 0
    for move in moves:
        before = {seed.seed_id: seed.stage for seed in bed.desired()}
        if isinstance(move, int):
            bed.revert(move)
            continue
        if isinstance(move, AdaptationCommand):
            bed.apply(move, packet(epoch, [], data.draw(_any_float)))
        else:
            epoch += 1
            bed.observe(packet(epoch, move, data.draw(_any_float)))
        desired = bed.desired()
        ids = [seed.seed_id for seed in desired]
        assert len(ids) == len(set(ids))
        assert sum(seed.stage in LIVING for seed in desired) <= 4
        for seed in desired:
            if before.get(seed.seed_id, seed.stage) != seed.stage:
                assert seed.stage in TRANSITIONS[before[seed.seed_id]]
