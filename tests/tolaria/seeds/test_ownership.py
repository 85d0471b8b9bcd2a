from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import OwnershipError
from tolaria.seeds import SeedSlot, SeedTopology, parameters_by_owner
from tolaria.values.training import HOST


def test_every_parameter_has_one_owner(host: nn.Module, topology: SeedTopology, seed: Callable[..., SeedState]) -> None:
    """A seed owns its branch in every stage; the host owns the rest, without overlap or gap."""
    topology.reconcile([seed("a", "GERMINATED"), seed("a2", "TRAINING", slot="early")], 0)
    owned = parameters_by_owner(host)
    assert list(owned) == [HOST, "a2", "a"]
    assert [name for name, _ in owned["a"]] == [
        f"late.seeds.a.branch.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert sorted(name for held in owned.values() for name, _ in held) == sorted(dict(host.named_parameters()))


def test_a_parameter_with_two_owners_is_refused(
    host: nn.Module, topology: SeedTopology, seed: Callable[..., SeedState]
) -> None:
    """The error names both owners and both names."""
    topology.reconcile([seed("a", "TRAINING")], 0)
    host.get_submodule("late.seeds.a.branch.0").weight = host.get_submodule("neck").weight
    with pytest.raises(
        OwnershipError, match=r"as 'neck.weight' by 'host' and as 'late.seeds.a.branch.0.weight' by 'a'"
    ):
        parameters_by_owner(host)


def test_a_parameter_tied_within_the_host_is_listed_once() -> None:
    """It appears under its first name."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, SeedSlot("s", features=2, layout="vector"), second)
    assert [name for name, _ in parameters_by_owner(model)[HOST]] == ["0.weight", "0.bias"]
