from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.seeds import SeedTopology, ownership

BLUEPRINTS = ["residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora", "absent", "moss", ""]
LENIENT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
IDS = st.sampled_from(["a", "b", "c"])
STAGES = st.sampled_from([0, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 11])


def _wild_states() -> st.SearchStrategy[SeedState]:
    floats = st.sampled_from([0.0, 0.5, 1.0, -1.0, float("nan"), float("inf")])
    schedules = st.builds(
        AlphaSchedule, start=floats, end=floats, begin_step=st.integers(0, 30), duration_steps=st.integers(0, 5)
    )
    return st.builds(
        SeedState,
        seed_id=st.one_of(IDS, st.sampled_from(["", "x.y", "host", "keys"])),
        stage=st.sampled_from([*SeedLifecycleStage.values(), 77]),
        blueprint_id=st.sampled_from(BLUEPRINTS),
        slot=st.sampled_from(["early", "late", "", "attic"]),
        alpha=st.none() | schedules,
        metrics=st.dictionaries(st.just("alpha"), floats),
        attribution=floats,
    )


def _smooth_states() -> st.SearchStrategy[SeedState]:
    """Wishes as a sound Kasmina sends them: schedules from 0, one for each seed."""

    def build(seed_id: str, stage: Any, blueprint: str, slot: str) -> SeedState:
        schedule = AlphaSchedule(start=0.0, end=0.75, begin_step=ord(seed_id) - 97, duration_steps=5)
        return SeedState(seed_id=seed_id, stage=stage, blueprint_id=blueprint, slot=slot, alpha=schedule)

    return st.builds(build, IDS, STAGES, st.sampled_from(BLUEPRINTS[:4]), st.sampled_from(["early", "late", ""]))


def _fences(states: st.SearchStrategy[SeedState]) -> st.SearchStrategy[list[tuple[int, list[SeedState]]]]:
    return st.lists(st.tuples(st.integers(0, 4), st.lists(states, max_size=4)), min_size=1, max_size=10)


@LENIENT
@given(fences=_fences(_wild_states()))
def test_any_wishes_at_all(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    fences: list[tuple[int, list[SeedState]]],
) -> None:
    """No wish raises; asked again nothing changes; each parameter has one owner; what is trained adds up."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    trained: dict[int, str] = {}
    for passed, desired in fences:
        step += passed
        gone = topology.advance(step)
        for result in (topology.reconcile(desired, step), topology.reconcile(desired, step)):
            for outcome in [gone, result] if gone else [result]:
                for held in (outcome.frozen, outcome.removed):
                    for parameters in held.values():
                        for _, parameter in parameters:
                            trained.pop(id(parameter), None)
                trained |= {id(p): name for held in outcome.added.values() for name, p in held}
            gone = None
        assert result.changes == ()
        owned = ownership(host).by_owner
        assert sum(map(len, owned.values())) == len(list(host.parameters()))
        assert set(owned) == {"host", *(state.seed_id for state in topology.states(step))}
        seeds = topology.training_seeds
        assert trained == {id(p): name for seed in seeds for name, p in topology.training_parameters(seed)}


@LENIENT
@given(fences=_fences(_smooth_states()))
def test_no_sound_wish_makes_the_output_jump(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    output_of: Callable[[nn.Module], Tensor],
    excite: Callable[[nn.Module], None],
    fences: list[tuple[int, list[SeedState]]],
) -> None:
    """Whatever grafts, moves and cullings a fence brings, the output is bit-equal before and after it."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    for passed, desired in fences:
        step += passed
        topology.advance(step)
        excite(host)
        before = output_of(host)
        topology.reconcile(desired, step)
        assert torch.equal(before, output_of(host))


@LENIENT
@given(fences=_fences(_smooth_states()), back=st.integers(0, 9))
def test_back_to_any_fence(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    output_of: Callable[[nn.Module], Tensor],
    excite: Callable[[nn.Module], None],
    fences: list[tuple[int, list[SeedState]]],
    back: int,
) -> None:
    """Structure and tensors of any fence can be brought back, in the same model and in a fresh one, bit by bit."""
    host = make_host()
    topology = make_topology(host)
    step = 0
    for number, (passed, desired) in enumerate(fences):
        step += passed
        topology.reconcile(desired, step)
        excite(host)
        if number == min(back, len(fences) - 1):
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
