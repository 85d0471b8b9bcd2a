from __future__ import annotations

import json

import torch
from torch import nn

from support.export_jobs import TiedGpt
from tolaria.lane.model_description import describe
from tolaria.seeds import SeedSlot
from tolaria.seeds.blueprints import lora
from tolaria.seeds.slots import Graft


def test_tied_and_transient_tensors_and_slots_are_described() -> None:
    """As `state_dict` has them, and the same when the model has been compiled."""
    model = TiedGpt()
    found = json.loads(describe(model))
    assert found == {
        "tied": {"head.weight": "embedding.weight"},
        "transient": ["mask"],
        "slots": {"tokens": {"path": "slot", "features": 8, "layout": "sequence"}},
    }
    compiled = nn.ModuleDict({"_orig_mod": model})
    assert json.loads(describe(compiled)) == found


def test_seeds_do_not_change_the_description() -> None:
    """They come and go; what the job has built stays."""
    model = nn.Sequential(nn.Linear(4, 4), SeedSlot("s", features=4, layout="vector"))
    before = describe(model)
    slot = model[1]
    assert isinstance(slot, SeedSlot)
    slot.arrange({"a": Graft("a", lora(slot.spec, torch.Generator()), slot.spec, isolated=False)})
    assert describe(model) == before


class Refusing(nn.Linear):
    """A module whose `state_dict` takes no arguments, as no caller expects."""

    def state_dict(self) -> dict[str, object]:  # type: ignore[override]
        return {}


def test_a_model_that_refuses_is_not_described() -> None:
    """Training does not depend on the description."""
    assert describe(Refusing(2, 2)) == ""
