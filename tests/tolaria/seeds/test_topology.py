from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_CULLED
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.errors import SeedError, TopologyStateError
from tolaria.seeds import Blueprints, SeedTopology

Seed = Callable[..., SeedState]
OutputOf = Callable[[nn.Module], Tensor]
Randomize = Callable[[nn.Module], None]
UP = (0.0, 1.0, 10, 4)
LIFECYCLE = [("GERMINATED", 0), ("TRAINING", 5), ("BLENDING", 10), ("SHADOWING", 14), ("PROBATIONARY", 15)]
PLACES = [
    ("early", "residual_mlp"),
    ("early", "depthwise_conv_adapter"),
    ("late", "bottleneck_adapter"),
    ("late", "lora"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("slot", "blueprint"), PLACES)
def test_no_stage_change_changes_the_output(
    *,
    host: nn.Module,
    topology: SeedTopology,
    seed: Seed,
    output_of: OutputOf,
    randomize_seeds: Randomize,
    slot: str,
    blueprint: str,
    training: bool,
) -> None:
    """The output is bit-equal before and after each change of stage."""
    host.train(training)
    for stage, step in [*LIFECYCLE, ("FOSSILIZED", 20), ("TERMINATED", 21)]:
        topology.advance(step)
        before = output_of(host)
        result = topology.reconcile([seed("a", stage, blueprint, slot=slot, alpha=UP)], step)
        assert [change.after is not None for change in result.changes] == [True]
        assert torch.equal(before, output_of(host)), stage
        randomize_seeds(host)
    assert not topology.training_parameters("a")


def test_blending_follows_the_schedule(
    host: nn.Module, topology: SeedTopology, seed: Seed, output_of: OutputOf, randomize_seeds: Randomize
) -> None:
    """The output changes with alpha step by step, and stays the same after the end."""
    plain = output_of(host.eval())
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    randomize_seeds(host)
    outputs = []
    for step in range(10, 17):
        topology.advance(step)
        outputs.append(output_of(host))
    assert torch.equal(outputs[0], plain)
    full = outputs[-1] - plain
    for taken, output in zip((0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0), outputs, strict=True):
        torch.testing.assert_close(output - plain, taken * full)


def test_reconciling_and_restoring_set_alpha(
    host: nn.Module, topology: SeedTopology, seed: Seed, output_of: OutputOf, randomize_seeds: Randomize
) -> None:
    """Alpha is that of the step, without a call of `advance`."""
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    randomize_seeds(host)
    outputs = {}
    for step in (11, 12):
        topology.advance(step)
        outputs[step] = output_of(host)
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 11)
    assert torch.equal(output_of(host), outputs[11])
    topology.load_state_dict(topology.state_dict(), 12)
    assert torch.equal(output_of(host), outputs[12])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stage", "step"), LIFECYCLE[:3])
def test_a_seed_culled_at_alpha_zero_leaves_at_once(
    *,
    host: nn.Module,
    topology: SeedTopology,
    seed: Seed,
    output_of: OutputOf,
    randomize_seeds: Randomize,
    stage: str,
    step: int,
    training: bool,
) -> None:
    """The output is bit-equal."""
    host.train(training)
    topology.reconcile([seed("a", stage, alpha=UP)], step)
    randomize_seeds(host)
    before = output_of(host)
    result = topology.reconcile([seed("a", "CULLED")], step)
    assert [name for name, _ in result.removed["a"]] == [
        f"late.seeds.a.branch.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert torch.equal(before, output_of(host))
    assert not any(".seeds." in name for name, _ in host.named_parameters())
    assert topology.states(step) == []


@pytest.mark.parametrize("training", [True, False])
def test_a_seed_culled_above_alpha_zero_fades_out(
    *,
    host: nn.Module,
    topology: SeedTopology,
    seed: Seed,
    output_of: OutputOf,
    randomize_seeds: Randomize,
    training: bool,
) -> None:
    """It is frozen meanwhile; the output is bit-equal when it is culled and when it leaves."""
    host.train(training)
    plain = output_of(host)
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    randomize_seeds(host)
    topology.advance(13)
    before = output_of(host)
    result = topology.reconcile([], 13)
    assert torch.equal(before, output_of(host))
    assert (list(result.frozen), list(result.removed)) == (["a"], [])
    for step, alpha in [(14, 0.5625), (15, 0.375), (16, 0.1875)]:
        assert topology.advance(step) is None
        (state,) = topology.states(step)
        assert (state.stage, state.metrics["alpha"]) == (SEED_STAGE_CULLED, alpha)
    gone = topology.advance(17)
    assert gone is not None
    assert (list(gone.removed), list(gone.added), list(gone.frozen)) == (["a"], [], [])
    assert torch.equal(plain, output_of(host))
    assert topology.advance(18) is None


def test_a_faded_seed_can_germinate_again(host: nn.Module, topology: SeedTopology, seed: Seed) -> None:
    """A reconciliation before the next `advance` removes a seed that has faded out, and may graft it again."""
    topology.reconcile([seed("a", "BLENDING", alpha=(0.5, 0.5, 0, 1))], 0)
    topology.reconcile([], 0)
    result = topology.reconcile([seed("a", "TRAINING")], 4)
    assert [change.kind for change in result.changes] == ["removed", "grafted"]
    (old, new) = (result.removed["a"], result.added["a"])
    assert [name for name, _ in old] == [name for name, _ in new]
    assert all(p is not q for (_, p), (_, q) in zip(old, new, strict=True))


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("slot", "blueprint"), PLACES)
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_training_seed_does_not_affect_the_host(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    seed: Seed,
    output_of: OutputOf,
    randomize_seeds: Randomize,
    slot: str,
    blueprint: str,
    value: float,
) -> None:
    """The host's output and gradients are those of a model without seeds, even if the branch is not finite."""
    plain, grown = make_host(), make_host()
    make_topology(grown).reconcile([seed("a", "TRAINING", blueprint, slot=slot)], 0)
    randomize_seeds(grown)
    with torch.no_grad():
        next(p for name, p in grown.named_parameters() if ".seeds." in name).mul_(value)
    expected = _gradients(plain, output_of(plain))
    got = _gradients(grown, output_of(grown))
    assert torch.equal(output_of(plain), output_of(grown))
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert sum(".seeds." in name for name in got) == sum(".seeds." in name for name, _ in grown.named_parameters())


def test_a_blending_seed_affects_the_gradients_of_the_host(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    seed: Seed,
    output_of: OutputOf,
    randomize_seeds: Randomize,
) -> None:
    """Gradients before the slot differ from those without the seed, while it blends and when it is a fossil."""
    host = make_host()
    topology = make_topology(host)
    expected = _gradients(host, output_of(host))["neck.weight"]
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    randomize_seeds(host)
    topology.advance(12)
    assert not torch.equal(_gradients(host, output_of(host))["neck.weight"], expected)
    topology.reconcile([seed("a", "FOSSILIZED")], 14)
    fossil = _gradients(host, output_of(host))
    assert not torch.equal(fossil["neck.weight"], expected)
    assert not any(".seeds." in name for name in fossil)


def test_parameters_are_added_and_frozen(topology: SeedTopology, seed: Seed) -> None:
    """They are added when the seed begins to train, and frozen when it becomes part of the host."""
    germinated = topology.reconcile([seed("a", "GERMINATED")], 0)
    assert not germinated.added
    assert not topology.training_parameters("a")
    trained = topology.reconcile([seed("a", "TRAINING")], 1)
    assert trained.added["a"] == topology.training_parameters("a")
    assert topology.training_seeds == ("a",)
    blended = topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    assert (blended.added, blended.frozen, blended.removed) == ({}, {}, {})
    fossilized = topology.reconcile([seed("a", "FOSSILIZED")], 14)
    assert fossilized.frozen == trained.added
    assert topology.training_parameters("a") == []
    assert topology.training_parameters("unknown") == []


def test_a_seed_can_be_grafted_behind_a_fossil(
    host: nn.Module, topology: SeedTopology, seed: Seed, output_of: OutputOf, randomize_seeds: Randomize
) -> None:
    """A fossil leaves its slot free; the next seed runs after it, on its output."""
    topology.reconcile([seed("a", "BLENDING", alpha=UP)], 10)
    randomize_seeds(host)
    topology.reconcile([seed("a", "FOSSILIZED")], 14)
    before = output_of(host)
    result = topology.reconcile([seed("b", "TRAINING", slot="")], 15)
    assert [str(change) for change in result.changes] == ["b grafted in slot early, TRAINING"]
    assert topology.reconcile([seed("b", "TRAINING", slot=""), seed("c", "TRAINING")], 15).refusals == ()
    assert [name for name, _ in host.get_submodule("late.seeds").named_children()] == ["a", "c"]
    assert torch.equal(before, output_of(host))


def test_the_reported_states(topology: SeedTopology, seed: Seed) -> None:
    """A state has stage, slot, schedule, alpha, attribution and the names of the parameters."""
    late = seed("a", "BLENDING", "lora", alpha=(0.0, 1.0, 6, 8))
    late.attribution = 0.25
    topology.reconcile([late, seed("b", "GERMINATED", slot="early")], 10)
    first, second = topology.states(12)
    assert first == SeedState(
        seed_id="a",
        stage=SEED_STAGE_BLENDING,
        layer_depth=1,
        metrics={"alpha": 0.25},
        blueprint_id="lora",
        slot="late",
        alpha=AlphaSchedule(start=0.0, end=1.0, begin_step=10, duration_steps=8),
        attribution=0.25,
        parameters=["late.seeds.a.branch.0.weight", "late.seeds.a.branch.1.weight"],
    )
    assert (second.slot, second.metrics["alpha"], second.HasField("alpha")) == ("early", 0.0, False)


def test_declaring_the_reported_states_changes_nothing(topology: SeedTopology, seed: Seed) -> None:
    """Declaring exactly what was reported gives no change and no refusal."""
    topology.reconcile([seed("a", "BLENDING", "lora", alpha=(0.1, 0.7, 6, 8)), seed("b", "TRAINING", slot="early")], 10)
    result = topology.reconcile(topology.states(12), 12)
    assert (result.changes, result.refusals) == ((), ())


def test_refused_states_do_not_affect_the_others(topology: SeedTopology, seed: Seed) -> None:
    """Impossible states are refused one by one with their reasons, and the others apply."""
    states = [
        seed("a", "TRAINING", "unknown"),
        seed("b", "TRAINING", slot="missing"),
        seed("c", "TRAINING", "depthwise_conv_adapter"),
        seed("d", "TRAINING", "absent"),
        seed("e", "TRAINING"),
        seed("f", "TRAINING"),
        seed("g", "FOSSILIZED", slot="early"),
    ]
    result = topology.reconcile(states, 0)
    assert topology.training_seeds == ("e",)
    reasons = {refusal.seed_id: refusal.reason for refusal in result.refusals}
    expected = {
        "a": "blueprint 'unknown' is unknown",
        "b": "slot 'missing' is unknown",
        "c": "blueprint 'depthwise_conv_adapter' does not fit slot 'late': vectors",
        "d": "blueprint 'absent' cannot be imported: ModuleNotFoundError",
        "f": "slot 'late' is taken",
        "g": "was never grafted here",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[seed_id].startswith(start) for seed_id, start in expected.items())


def test_initial_values_are_repeatable(make_host: Callable[[], nn.Module], blueprints: Blueprints, seed: Seed) -> None:
    """They depend on the run's seed and the seed's id alone, and the global RNG is unchanged."""

    def values(run_seed: int, seed_id: str, slot: str) -> Tensor:
        host = make_host()
        topology = SeedTopology(host, blueprints, seed=run_seed, cull_steps=4)
        before = torch.get_rng_state()
        topology.reconcile([seed("other", "TRAINING", slot="late" if slot == "early" else "early")], 0)
        topology.reconcile([seed("other", "TRAINING"), seed(seed_id, "TRAINING", "lora", slot=slot)], 0)
        assert torch.equal(torch.get_rng_state(), before)
        return topology.training_parameters(seed_id)[0][1].detach().flatten()

    first = values(1, "a", "late")
    assert torch.equal(first, values(1, "a", "late"))
    assert torch.equal(first, values(1, "a", "early"))
    assert not torch.equal(first, values(2, "a", "late"))
    assert not torch.equal(first, values(1, "b", "late"))


def test_a_branch_takes_dtype_and_mode_of_the_host(host: nn.Module, blueprints: Blueprints, seed: Seed) -> None:
    """A float64 host in eval mode gets a branch in the same."""
    host.double().eval()
    topology = SeedTopology(host, blueprints, seed=0, cull_steps=1)
    topology.reconcile([seed("a", "TRAINING")], 0)
    assert {p.dtype for _, p in topology.training_parameters("a")} == {torch.float64}
    assert not host.get_submodule("late.seeds.a.branch").training


def test_a_model_without_slots_refuses_every_seed(
    make_topology: Callable[[nn.Module], SeedTopology], seed: Seed
) -> None:
    """Nothing is raised."""
    topology = make_topology(nn.Linear(2, 2))
    (refusal,) = topology.reconcile([seed("a", "TRAINING", slot="")], 0).refusals
    assert refusal.reason == "no slot is free"
    assert (topology.states(0), topology.advance(1)) == ([], None)


def test_culling_takes_at_least_one_step(host: nn.Module, blueprints: Blueprints) -> None:
    """`cull_steps` of 0 would make the output jump and is refused."""
    with pytest.raises(SeedError, match="cull_steps must be at least 1"):
        SeedTopology(host, blueprints, seed=0, cull_steps=0)


def test_two_seeds_do_not_share_parameters(
    host: nn.Module,
    topology: SeedTopology,
    seed: Seed,
    monkeypatch: pytest.MonkeyPatch,
    blueprints: Blueprints,
) -> None:
    """A blueprint that returns the same module twice is refused the second time."""
    shared = nn.Linear(6, 6)
    monkeypatch.setattr(blueprints, "build", lambda *_, **__: shared)
    states = [seed("a", "TRAINING", slot="late"), seed("b", "TRAINING", slot="early")]
    monkeypatch.setattr(blueprints, "check", lambda *_: None)
    result = topology.reconcile(states, 0)
    assert topology.training_seeds == ("a",)
    assert [r.reason for r in result.refusals] == [
        "blueprint 'bottleneck_adapter' returned parameters that are in the model already"
    ]


def _structure(topology: SeedTopology, seed: Seed) -> dict[str, Any]:
    states = [seed("a", "BLENDING", alpha=(0.0, 1.0, 0, 3)), seed("b", "TRAINING", "lora", slot="early")]
    topology.reconcile(states, 0)
    topology.reconcile(states[1:], 1)  # culled a third of the way up, which no float has exactly
    return topology.state_dict()


def test_the_structure_survives_json(topology: SeedTopology, seed: Seed) -> None:
    """It comes back exactly, floats included."""
    state = _structure(topology, seed)
    assert json.loads(json.dumps(state)) == state
    assert [seed["stage"] for seed in state["seeds"]] == ["CULLED", "TRAINING"]
    assert state["seeds"][0]["ramp"]["start"] == 1 / 3


def test_a_structure_is_loaded_into_a_fresh_model(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    topology: SeedTopology,
    seed: Seed,
) -> None:
    """The fresh model gets the seeds in their stages, under their names, with their initial values."""
    state = json.loads(json.dumps(_structure(topology, seed)))
    model = make_host()
    fresh = make_topology(model)
    result = fresh.load_state_dict(state, 2)
    assert [change.kind for change in result.changes] == ["grafted", "grafted"]
    assert (list(result.added), result.frozen, result.removed) == (["b"], {}, {})
    assert fresh.states(2) == topology.states(2)
    for (_, expected), (_, got) in zip(topology.training_parameters("b"), fresh.training_parameters("b"), strict=True):
        assert torch.equal(expected, got)
    gone = fresh.advance(5)
    assert gone is not None
    assert list(gone.removed) == ["a"]


def test_an_earlier_structure_is_loaded_into_the_same_model(
    host: nn.Module, topology: SeedTopology, seed: Seed
) -> None:
    """Later seeds are removed, removed ones are grafted again, and frozen ones are unfrozen."""
    topology.reconcile([seed("a", "BLENDING", alpha=(0.0, 1.0, 0, 1)), seed("b", "TRAINING", slot="early")], 0)
    state = topology.state_dict()
    kept = topology.training_parameters("a")
    topology.reconcile([seed("a", "FOSSILIZED"), seed("c", "TRAINING")], 1)
    result = topology.load_state_dict(state, 0)
    assert (list(result.added), list(result.frozen), list(result.removed)) == (["a", "b"], [], ["c"])
    assert topology.training_parameters("a") == kept
    assert [name for name, _ in host.get_submodule("late.seeds").named_children()] == ["a"]
    assert topology.state_dict() == state


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"version": 2}, "version 2; known is 1"),
        ({"version": 1, "seed": 0}, "malformed: KeyError"),
        ({"version": 1, "seed": 0, "seeds": [{"seed_id": "a"}]}, "malformed: KeyError"),
    ],
)
def test_a_malformed_structure_is_refused(topology: SeedTopology, broken: dict[str, Any], why: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(TopologyStateError, match=why):
        topology.load_state_dict(broken, 0)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("slot", "missing", "the model has no slot 'missing' for seed 'b'"),
        ("blueprint", "unknown", "blueprint 'unknown' is unknown"),
        ("stage", "NONSENSE", "malformed: ValueError"),
        ("extra", 1, "malformed: TypeError"),
        ("seed_id", "a", "seed 'a' appears twice"),
    ],
)
def test_a_structure_of_another_model_is_refused(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    topology: SeedTopology,
    seed: Seed,
    field: str,
    value: object,
    why: str,
) -> None:
    """The error says what is wrong, and the model is unchanged."""
    state = _structure(topology, seed)
    state["seeds"][1][field] = value
    model = make_host()
    fresh = make_topology(model)
    with pytest.raises(SeedError, match=why):
        fresh.load_state_dict(state, 0)
    assert (fresh.states(0), [n for n, _ in model.named_parameters() if ".seeds." in n]) == ([], [])
