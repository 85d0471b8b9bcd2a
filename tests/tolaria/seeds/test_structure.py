from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import SeedError, TopologyStateError
from tolaria.seeds import SeedTopology

Wish = Callable[..., SeedState]


def _grown(topology: SeedTopology, wish: Wish) -> dict[str, Any]:
    wishes = [wish("a", "BLENDING", alpha=(0.0, 1.0, 0, 3)), wish("b", "TRAINING", "lora", slot="early")]
    topology.reconcile(wishes, 0)
    topology.reconcile(wishes[1:], 1)  # culled a third of the way up, which no float has exactly
    return topology.state_dict()


def test_through_json(topology: SeedTopology, wish: Wish) -> None:
    """The structure is JSON, and comes back through it to the last bit."""
    state = _grown(topology, wish)
    assert json.loads(json.dumps(state)) == state
    assert [seed["stage"] for seed in state["seeds"]] == ["CULLED", "TRAINING"]
    assert state["seeds"][0]["ramp"]["start"] == 1 / 3


def test_into_a_fresh_model(
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    topology: SeedTopology,
    wish: Wish,
) -> None:
    """A fresh model gets the seeds, in their stages, under their names, with their first values."""
    state = json.loads(json.dumps(_grown(topology, wish)))
    model = make_host()
    fresh = make_topology(model)
    result = fresh.load_state_dict(state, 2)
    assert [change.kind.value for change in result.changes] == ["grafted", "grafted"]
    assert (list(result.added), result.frozen, result.removed) == (["b"], {}, {})
    assert fresh.states(2) == topology.states(2)
    for (_, expected), (_, got) in zip(topology.training_parameters("b"), fresh.training_parameters("b"), strict=True):
        assert torch.equal(expected, got)
    gone = fresh.advance(5)
    assert gone is not None
    assert list(gone.removed) == ["a"]


def test_back_in_the_same_model(host: nn.Module, topology: SeedTopology, wish: Wish) -> None:
    """Going back removes seeds that came later, brings back those that left, and unfreezes those that were frozen."""
    topology.reconcile([wish("a", "BLENDING", alpha=(0.0, 1.0, 0, 1)), wish("b", "TRAINING", slot="early")], 0)
    state = topology.state_dict()
    kept = topology.training_parameters("a")
    topology.reconcile([wish("a", "FOSSILIZED"), wish("c", "TRAINING")], 1)
    result = topology.load_state_dict(state, 0)
    assert (list(result.added), list(result.frozen), list(result.removed)) == (["a", "b"], [], ["c"])
    assert topology.training_parameters("a") == kept
    assert list(host.get_submodule("late.seeds")._modules) == ["a"]
    assert topology.state_dict() == state


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"version": 2}, "version 2; known is 1"),
        ({"version": 1, "seed": 0}, "malformed: KeyError"),
        ({"version": 1, "seed": 0, "seeds": [{"seed_id": "a"}]}, "malformed: KeyError"),
    ],
)
def test_no_structure(topology: SeedTopology, broken: dict[str, Any], why: str) -> None:
    """What is no structure, or of another version, is refused with what is wrong."""
    with pytest.raises(TopologyStateError, match=why):
        topology.load_state_dict(broken, 0)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("slot", "attic", "the model has no slot 'attic' for seed 'b'"),
        ("blueprint", "moss", "blueprint 'moss' is unknown"),
        ("stage", "MOSS", "malformed: ValueError"),
        ("moss", 1, "malformed: TypeError"),
        ("seed_id", "a", "seed 'a' stands twice"),
    ],
)
def test_structure_of_another_model(
    *,
    make_host: Callable[[], nn.Module],
    make_topology: Callable[[nn.Module], SeedTopology],
    topology: SeedTopology,
    wish: Wish,
    field: str,
    value: object,
    why: str,
) -> None:
    """A structure that this model cannot have is refused, and the model is left as it was."""
    state = _grown(topology, wish)
    state["seeds"][1][field] = value
    model = make_host()
    fresh = make_topology(model)
    with pytest.raises(SeedError, match=why):
        fresh.load_state_dict(state, 0)
    assert (fresh.states(0), [n for n, _ in model.named_parameters() if ".seeds." in n]) == ([], [])
