"""Policy and seed bed with a Tolaria that grafts what is desired, epoch by epoch, without sockets."""

from __future__ import annotations

import pytest

from leyline.v1 import enums_pb2 as e
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.decisions import Cull, Decision, Fossilize, Germinate, command_for
from tolaria.reference.gates import LifecycleSettings
from tolaria.reference.lifecycle import LIVING
from tolaria.reference.memory import RunMemory
from tolaria.reference.policy import PolicySettings, decide_epoch
from tolaria.reference.seed_bed import Answer, SeedBed


def run(epochs: int, *, harm: float) -> tuple[list[Decision], list[Answer], list[SeedState]]:
    """A run on a plateau, where every seed at full strength costs `harm` of the validation accuracy."""
    memory, bed = RunMemory(), SeedBed(LifecycleSettings())
    decisions: list[Decision] = []
    answers: list[Answer] = []
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
        memory, decision = decide_epoch(memory, state, PolicySettings())
        if decision is not None:
            command = command_for(decision, command_id=f"c{epoch}", issued_at_ns=0, deadline_ms=0)
            decisions.append(decision)
            answers.append(bed.apply(command, state))
        bed.observe(state)
        seeds = bed.desired()
        for seed in seeds:
            seed.gradient_norm = 1.0
    return decisions, answers, seeds


@pytest.mark.parametrize(
    ("harm", "verdict", "end"), [(0.0, Fossilize, e.SEED_STAGE_FOSSILIZED), (0.1, Cull, e.SEED_STAGE_DORMANT)]
)
def test_every_decision_is_carried_out(harm: float, verdict: type[Decision], end: int) -> None:
    """Seeds are germinated on the plateau and judged by what they do; Kasmina's gates refuse none of it."""
    decisions, answers, seeds = run(40, harm=harm)
    assert [answer for answer in answers if not answer.applied] == []
    assert {type(decision) for decision in decisions} == {Germinate, verdict}
    assert end in {seed.stage for seed in seeds}
    assert sum(seed.stage in LIVING for seed in seeds) <= PolicySettings().living_max
