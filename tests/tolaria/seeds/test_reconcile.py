from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_CULLED
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.errors import SeedError
from tolaria.seeds import Blueprints, SeedTopology

Wish = Callable[..., SeedState]
OutputOf = Callable[[nn.Module], Tensor]
Excite = Callable[[nn.Module], None]
UP = (0.0, 1.0, 10, 4)
LIFE = [("GERMINATED", 0), ("TRAINING", 5), ("BLENDING", 10), ("SHADOWING", 14), ("PROBATIONARY", 15)]
PLACES = [
    ("early", "residual_mlp"),
    ("early", "depthwise_conv_adapter"),
    ("late", "bottleneck_adapter"),
    ("late", "lora"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("slot", "blueprint"), PLACES)
def test_no_move_changes_the_output(
    *,
    host: nn.Module,
    topology: SeedTopology,
    wish: Wish,
    output_of: OutputOf,
    excite: Excite,
    slot: str,
    blueprint: str,
    training: bool,
) -> None:
    """Germinating, training, blending, fossilizing and ending leave the output bit-equal at the moment they happen."""
    host.train(training)
    for stage, step in [*LIFE, ("FOSSILIZED", 20), ("TERMINATED", 21)]:
        topology.advance(step)
        before = output_of(host)
        result = topology.reconcile([wish("a", stage, blueprint, slot=slot, alpha=UP)], step)
        assert [change.after is not None for change in result.changes] == [True]
        assert torch.equal(before, output_of(host)), stage
        excite(host)
    assert not topology.training_parameters("a")


def test_blend_follows_its_schedule(
    host: nn.Module, topology: SeedTopology, wish: Wish, output_of: OutputOf, excite: Excite
) -> None:
    """While it blends the output moves with alpha, a step at a time, and stands still at the end."""
    plain = output_of(host.eval())
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    excite(host)
    outputs = []
    for step in range(10, 17):
        topology.advance(step)
        outputs.append(output_of(host))
    assert torch.equal(outputs[0], plain)
    full = outputs[-1] - plain
    for taken, output in zip((0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0), outputs, strict=True):
        torch.testing.assert_close(output - plain, taken * full)


def test_fence_and_restore_set_alpha(
    host: nn.Module, topology: SeedTopology, wish: Wish, output_of: OutputOf, excite: Excite
) -> None:
    """After a fence or a restore, alpha is that of its step, without an advance."""
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    excite(host)
    outputs = {}
    for step in (11, 12):
        topology.advance(step)
        outputs[step] = output_of(host)
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 11)
    assert torch.equal(output_of(host), outputs[11])
    topology.load_state_dict(topology.state_dict(), 12)
    assert torch.equal(output_of(host), outputs[12])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stage", "step"), LIFE[:3])
def test_culled_at_alpha_zero(
    *,
    host: nn.Module,
    topology: SeedTopology,
    wish: Wish,
    output_of: OutputOf,
    excite: Excite,
    stage: str,
    step: int,
    training: bool,
) -> None:
    """A seed culled at alpha 0 leaves at once, and the output is bit-equal."""
    host.train(training)
    topology.reconcile([wish("a", stage, alpha=UP)], step)
    excite(host)
    before = output_of(host)
    result = topology.reconcile([wish("a", "CULLED")], step)
    assert [name for name, _ in result.removed["a"]] == [
        f"late.seeds.a.branch.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert torch.equal(before, output_of(host))
    assert not any(".seeds." in name for name, _ in host.named_parameters())
    assert topology.states(step) == []


@pytest.mark.parametrize("training", [True, False])
def test_culled_above_alpha_zero(
    *, host: nn.Module, topology: SeedTopology, wish: Wish, output_of: OutputOf, excite: Excite, training: bool
) -> None:
    """A seed culled above alpha 0 ramps down frozen, and is bit-equal when culled and when it goes."""
    host.train(training)
    plain = output_of(host)
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    excite(host)
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


def test_faded_seed_can_come_again(host: nn.Module, topology: SeedTopology, wish: Wish) -> None:
    """When a fence comes before the next advance, a seed that has ramped down goes there, and may germinate anew."""
    topology.reconcile([wish("a", "BLENDING", alpha=(0.5, 0.5, 0, 1))], 0)
    topology.reconcile([], 0)
    result = topology.reconcile([wish("a", "TRAINING")], 4)
    assert [change.kind.value for change in result.changes] == ["removed", "grafted"]
    (old, new) = (result.removed["a"], result.added["a"])
    assert [name for name, _ in old] == [name for name, _ in new]
    assert all(p is not q for (_, p), (_, q) in zip(old, new, strict=True))


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("slot", "blueprint"), PLACES)
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_training_seed_cannot_move_the_host(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    wish: Wish,
    output_of: OutputOf,
    excite: Excite,
    slot: str,
    blueprint: str,
    value: float,
) -> None:
    """With a seed in training, sick or sound, the host's output and gradients are those of a model without seeds."""
    plain, grown = make_host(), make_host()
    make_topology(grown).reconcile([wish("a", "TRAINING", blueprint, slot=slot)], 0)
    excite(grown)
    with torch.no_grad():
        next(p for name, p in grown.named_parameters() if ".seeds." in name).mul_(value)
    expected = _gradients(plain, output_of(plain))
    got = _gradients(grown, output_of(grown))
    assert torch.equal(output_of(plain), output_of(grown))
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert sum(".seeds." in name for name in got) == sum(".seeds." in name for name, _ in grown.named_parameters())


def test_blending_reaches_the_host(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    wish: Wish,
    output_of: OutputOf,
    excite: Excite,
) -> None:
    """While a seed blends, the host's gradients before the slot differ from those without it; so do a fossil's."""
    host = make_host()
    topology = make_topology(host)
    expected = _gradients(host, output_of(host))["neck.weight"]
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    excite(host)
    topology.advance(12)
    assert not torch.equal(_gradients(host, output_of(host))["neck.weight"], expected)
    topology.reconcile([wish("a", "FOSSILIZED")], 14)
    fossil = _gradients(host, output_of(host))
    assert not torch.equal(fossil["neck.weight"], expected)
    assert not any(".seeds." in name for name in fossil)


def test_parameters_come_and_go(topology: SeedTopology, wish: Wish) -> None:
    """Parameters are added when a seed begins to train, and frozen when it becomes part of the host."""
    germinated = topology.reconcile([wish("a", "GERMINATED")], 0)
    assert not germinated.added
    assert not topology.training_parameters("a")
    trained = topology.reconcile([wish("a", "TRAINING")], 1)
    assert trained.added["a"] == topology.training_parameters("a")
    assert topology.training_seeds == ("a",)
    blended = topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    assert (blended.added, blended.frozen, blended.removed) == ({}, {}, {})
    fossilized = topology.reconcile([wish("a", "FOSSILIZED")], 14)
    assert fossilized.frozen == trained.added
    assert topology.training_parameters("a") == []
    assert topology.training_parameters("nobody") == []


def test_seed_behind_a_fossil(
    host: nn.Module, topology: SeedTopology, wish: Wish, output_of: OutputOf, excite: Excite
) -> None:
    """A fossil leaves its slot free: the next seed grows behind it, and hears what it makes of the activations."""
    topology.reconcile([wish("a", "BLENDING", alpha=UP)], 10)
    excite(host)
    topology.reconcile([wish("a", "FOSSILIZED")], 14)
    before = output_of(host)
    result = topology.reconcile([wish("b", "TRAINING", slot="")], 15)
    assert [str(change) for change in result.changes] == ["b grafted in slot early, TRAINING"]
    assert topology.reconcile([wish("b", "TRAINING", slot=""), wish("c", "TRAINING")], 15).refusals == ()
    assert list(host.get_submodule("late.seeds")._modules) == ["a", "c"]
    assert torch.equal(before, output_of(host))


def test_states_tell_what_is_in_the_model(topology: SeedTopology, wish: Wish) -> None:
    """A state has stage, place, schedule, alpha, attribution and the names of the parameters."""
    late = wish("a", "BLENDING", "lora", alpha=(0.0, 1.0, 6, 8))
    late.attribution = 0.25
    topology.reconcile([late, wish("b", "GERMINATED", slot="early")], 10)
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


def test_own_states_are_no_news(topology: SeedTopology, wish: Wish) -> None:
    """A Kasmina that wishes for precisely what is reported changes nothing."""
    topology.reconcile([wish("a", "BLENDING", "lora", alpha=(0.1, 0.7, 6, 8)), wish("b", "TRAINING", slot="early")], 10)
    result = topology.reconcile(topology.states(12), 12)
    assert (result.changes, result.refusals) == ((), ())


def test_the_rest_applies(topology: SeedTopology, wish: Wish) -> None:
    """Impossible wishes are refused one by one with their reasons, and the others are met."""
    wishes = [
        wish("a", "TRAINING", "moss"),
        wish("b", "TRAINING", slot="attic"),
        wish("c", "TRAINING", "depthwise_conv_adapter"),
        wish("d", "TRAINING", "absent"),
        wish("e", "TRAINING"),
        wish("f", "TRAINING"),
        wish("g", "FOSSILIZED", slot="early"),
    ]
    result = topology.reconcile(wishes, 0)
    assert topology.training_seeds == ("e",)
    reasons = {refusal.seed_id: refusal.reason for refusal in result.refusals}
    expected = {
        "a": "blueprint 'moss' is unknown",
        "b": "slot 'attic' is unknown",
        "c": "blueprint 'depthwise_conv_adapter' does not fit slot 'late': vectors",
        "d": "blueprint 'absent' cannot be imported: ModuleNotFoundError",
        "f": "slot 'late' is taken",
        "g": "was never grafted here",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[seed_id].startswith(start) for seed_id, start in expected.items())


def test_first_values_repeat(make_host: Callable[[], nn.Module], blueprints: Blueprints, wish: Wish) -> None:
    """A seed's first values depend on the run's seed and its id alone, and the global RNG is not drawn from."""

    def values(run_seed: int, seed_id: str, slot: str) -> Tensor:
        host = make_host()
        topology = SeedTopology(host, blueprints, seed=run_seed, cull_steps=4)
        before = torch.get_rng_state()
        topology.reconcile([wish("other", "TRAINING", slot="late" if slot == "early" else "early")], 0)
        topology.reconcile([wish("other", "TRAINING"), wish(seed_id, "TRAINING", "lora", slot=slot)], 0)
        assert torch.equal(torch.get_rng_state(), before)
        return topology.training_parameters(seed_id)[0][1].detach().flatten()

    first = values(1, "a", "late")
    assert torch.equal(first, values(1, "a", "late"))
    assert torch.equal(first, values(1, "a", "early"))
    assert not torch.equal(first, values(2, "a", "late"))
    assert not torch.equal(first, values(1, "b", "late"))


def test_precision_and_mode_of_the_host(host: nn.Module, blueprints: Blueprints, wish: Wish) -> None:
    """A branch takes the host's dtype and mode."""
    host.double().eval()
    topology = SeedTopology(host, blueprints, seed=0, cull_steps=1)
    topology.reconcile([wish("a", "TRAINING")], 0)
    assert {p.dtype for _, p in topology.training_parameters("a")} == {torch.float64}
    assert not host.get_submodule("late.seeds.a.branch").training


def test_model_without_slots(make_topology: Callable[[nn.Module], SeedTopology], wish: Wish) -> None:
    """Where nothing can grow, every wish is refused and nothing is raised."""
    topology = make_topology(nn.Linear(2, 2))
    (refusal,) = topology.reconcile([wish("a", "TRAINING", slot="")], 0).refusals
    assert refusal.reason == "no slot is free"
    assert (topology.states(0), topology.advance(1)) == ([], None)


def test_culling_takes_a_step(host: nn.Module, blueprints: Blueprints) -> None:
    """A culling without a ramp would jump, and is refused at the start."""
    with pytest.raises(SeedError, match="cull_steps must be at least 1"):
        SeedTopology(host, blueprints, seed=0, cull_steps=0)


def test_two_seeds_never_share_parameters(
    host: nn.Module, topology: SeedTopology, wish: Wish, monkeypatch: pytest.MonkeyPatch, blueprints: Blueprints
) -> None:
    """A blueprint that gives out the same module twice is refused the second time."""
    shared = nn.Linear(6, 6)
    monkeypatch.setattr(blueprints, "grow", lambda *_, **__: shared)
    wishes = [wish("a", "TRAINING", slot="late"), wish("b", "TRAINING", slot="early")]
    monkeypatch.setattr(topology._blueprints, "try_out", lambda *_: None)
    result = topology.reconcile(wishes, 0)
    assert topology.training_seeds == ("a",)
    assert [r.reason for r in result.refusals] == [
        "blueprint 'bottleneck_adapter' gave out parameters that are another's already"
    ]
