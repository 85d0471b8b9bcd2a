from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.seeds import SeedTopology, parameters_by_owner

BLUEPRINTS = ["residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora", "absent", "unknown", ""]
LENIENT = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
IDS = st.sampled_from(["a", "b", "c"])
STAGES = st.sampled_from([0, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 11])


def _arbitrary_states() -> st.SearchStrategy[SeedState]:
    floats = st.sampled_from([0.0, 0.5, 1.0, -1.0, float("nan"), float("inf")])
    schedules = st.builds(
        AlphaSchedule, start=floats, end=floats, begin_step=st.integers(0, 30), duration_steps=st.integers(0, 5)
    )
    return st.builds(
        SeedState,
        seed_id=st.one_of(IDS, st.sampled_from(["", "x.y", "host", "keys"])),
        stage=st.sampled_from([*SeedLifecycleStage.values(), 77]),
        blueprint_id=st.sampled_from(BLUEPRINTS),
        slot=st.sampled_from(["early", "late", "", "missing"]),
        alpha=st.none() | schedules,
        metrics=st.dictionaries(st.just("alpha"), floats),
        attribution=floats,
    )


def _regular_states() -> st.SearchStrategy[SeedState]:
    """Valid states: schedules from 0, one for each seed."""

    def build(seed_id: str, stage: Any, blueprint: str, slot: str) -> SeedState:
        schedule = AlphaSchedule(start=0.0, end=0.75, begin_step=ord(seed_id) - 97, duration_steps=5)
        return SeedState(seed_id=seed_id, stage=stage, blueprint_id=blueprint, slot=slot, alpha=schedule)

    return st.builds(build, IDS, STAGES, st.sampled_from(BLUEPRINTS[:4]), st.sampled_from(["early", "late", ""]))


def _boundaries(states: st.SearchStrategy[SeedState]) -> st.SearchStrategy[list[tuple[int, list[SeedState]]]]:
    return st.lists(st.tuples(st.integers(0, 4), st.lists(states, max_size=4)), min_size=1, max_size=10)


@LENIENT
@given(boundaries=_boundaries(_arbitrary_states()))
def test_arbitrary_states_keep_the_invariants(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    boundaries: list[tuple[int, list[SeedState]]],
) -> None:
    """Nothing raises; repeating changes nothing; each parameter has one owner; added and removed parameters add up."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    trained: dict[int, str] = {}
    for passed, desired in boundaries:
        step += passed
        removed = topology.advance(step)
        for result in (topology.reconcile(desired, step), topology.reconcile(desired, step)):
            for outcome in [removed, result] if removed else [result]:
                for held in (outcome.frozen, outcome.removed):
                    for parameters in held.values():
                        for _, parameter in parameters:
                            trained.pop(id(parameter), None)
                trained |= {id(p): name for held in outcome.added.values() for name, p in held}
            removed = None
        assert result.changes == ()
        owned = parameters_by_owner(host)
        assert sum(map(len, owned.values())) == len(list(host.parameters()))
        assert set(owned) == {"host", *(state.seed_id for state in topology.states(step))}
        seeds = topology.training_seeds
        assert trained == {id(p): name for seed in seeds for name, p in topology.training_parameters(seed)}


@LENIENT
@given(boundaries=_boundaries(_regular_states()))
def test_valid_states_never_make_the_output_jump(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    output_of: Callable[[nn.Module], Tensor],
    randomize_seeds: Callable[[nn.Module], None],
    boundaries: list[tuple[int, list[SeedState]]],
) -> None:
    """The output is bit-equal before and after every reconciliation."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    for passed, desired in boundaries:
        step += passed
        topology.advance(step)
        randomize_seeds(host)
        before = output_of(host)
        topology.reconcile(desired, step)
        assert torch.equal(before, output_of(host))


@LENIENT
@given(boundaries=_boundaries(_regular_states()), back=st.integers(0, 9))
def test_any_step_boundary_can_be_restored(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    output_of: Callable[[nn.Module], Tensor],
    randomize_seeds: Callable[[nn.Module], None],
    boundaries: list[tuple[int, list[SeedState]]],
    back: int,
) -> None:
    """Structure and tensors come back bit for bit, in the same model and in a fresh one."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    for number, (passed, desired) in enumerate(boundaries):
        step += passed
        topology.reconcile(desired, step)
        randomize_seeds(host)
        if number == min(back, len(boundaries) - 1):
            saved = (step, topology.state_dict(), {n: t.clone() for n, t in host.state_dict().items()})
            expected = (output_of(host), topology.states(step), list(dict(host.named_parameters())))
    then, structure, tensors = saved
    fresh = make_host()
    for model, grown in ((host, topology), (fresh, make_topology(fresh))):
        grown.load_state_dict(structure, then)
        model.load_state_dict(tensors)
        got = (output_of(model), grown.states(then), list(dict(model.named_parameters())))
        assert torch.equal(got[0], expected[0])
        assert got[1:] == expected[1:]
        assert grown.state_dict() == structure
        assert grown.training_seeds == tuple(s.seed_id for s in got[1] if grown.training_parameters(s.seed_id))
