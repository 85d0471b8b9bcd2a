from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import OwnershipError
from tolaria.seeds import SeedSlot, SeedTopology, ownership
from tolaria.values.training import HOST


def test_every_parameter_has_one_owner(host: nn.Module, topology: SeedTopology, wish: Callable[..., SeedState]) -> None:
    """Seeds own what grows under their ids, whatever their stage; the host owns the rest, without overlap or gap."""
    topology.reconcile([wish("a", "GERMINATED"), wish("a2", "TRAINING", slot="early")], 0)
    owned = ownership(host).by_owner
    assert list(owned) == [HOST, "a2", "a"]
    assert [name for name, _ in owned["a"]] == [
        f"late.seeds.a.branch.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    assert sorted(name for held in owned.values() for name, _ in held) == sorted(dict(host.named_parameters()))
    assert ownership(host).owner_of("body.1.seeds.a2.branch.0.weight") == "a2"
    assert ownership(host).owner_of("neck.weight") == HOST


def test_unknown_parameter(host: nn.Module) -> None:
    """A name that the model lacks has no owner."""
    with pytest.raises(OwnershipError, match="no parameter 'moss'"):
        ownership(host).owner_of("moss")


def test_double_ownership(host: nn.Module, topology: SeedTopology, wish: Callable[..., SeedState]) -> None:
    """A parameter that a seed shares with the host is told under both names."""
    topology.reconcile([wish("a", "TRAINING")], 0)
    host.get_submodule("late.seeds.a.branch.0").weight = host.get_submodule("neck").weight
    with pytest.raises(
        OwnershipError, match=r"as 'neck.weight' by 'host' and as 'late.seeds.a.branch.0.weight' by 'a'"
    ):
        ownership(host)


def test_ties_within_the_host() -> None:
    """A parameter tied within the host is owned once, under its first name."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, SeedSlot("s", features=2, layout="vector"), second)
    assert [name for name, _ in ownership(model).by_owner[HOST]] == ["0.weight", "0.bias"]
