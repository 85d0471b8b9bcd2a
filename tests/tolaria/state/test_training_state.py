from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from tolaria.errors import StateUnsupportedError
from tolaria.state.restore import stage_restore
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import Training


@dataclass
class Live:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


def test_the_state_names_everything_in_canonical_order(training: Training) -> None:
    """Parameters (tied ones once), all buffers, optimizer state and RNGs, sorted by name."""
    training.train(1)
    names = list(training.state().survey().tensors)
    assert names == sorted(names)
    assert "parameter/middle.weight" in names
    assert "parameter/again.weight" not in names
    assert {"buffer/calls", "buffer/norm.running_mean", "state/leave.bias/exp_avg", "state/leave.bias/step"} <= set(
        names
    )
    assert {"rng/torch", "rng/numpy", "rng/python"} <= set(names)


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_every_generator_is_part_of_the_state(training: Training, generator: str) -> None:
    """Drawing a number changes the digest; after a restore the same number is drawn."""
    draws: dict[str, Callable[[], float]] = {
        "torch": lambda: torch.rand(1).item(),
        "numpy": lambda: float(np.random.normal()),  # noqa: NPY002
        "python": lambda: random.gauss(0, 1),
    }
    draw = draws[generator]
    draw()  # normal generators cache a second number
    image = training.state().copy()
    expected = draw()
    assert training.state().fingerprint().total != image.seal().total
    stage_restore(training.state(), image, verify=True).commit()
    assert draw() == expected


def test_every_change_changes_the_digest(training: Training) -> None:
    """One bit of any tensor, one option, one part, the position: each gives another digest."""
    training.train(1)
    seen = {training.state().fingerprint().total}
    for name, tensor in training.state().survey().tensors.items():
        if not name.startswith("rng/"):
            tensor.detach().reshape(-1).view(torch.uint8)[0] ^= 1
            seen.add(training.state().fingerprint().total)
    tensors = len(seen)
    training.optimizer.param_groups[0]["lr"] *= 2
    seen.add(training.state().fingerprint().total)
    training.knob.value += 1
    seen.add(training.state().fingerprint().total)
    training.position = Position(9, 9)
    seen.add(training.state().fingerprint().total)
    assert len(seen) == tensors + 3 == 1 + len(training.state().survey().tensors) - 3 + 3


KINDS = {
    "bf16": torch.randn(3, 4).bfloat16(),
    "fp16": torch.randn(5).half(),
    "bool": torch.tensor([True, False]),
    "int": torch.arange(4, dtype=torch.int32),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(3, 5).t(),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.arange(3).expand(4, 3),
    "complex": torch.randn(3, dtype=torch.complex64),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_restored(kind: str) -> None:
    """Low precision, booleans, scalars, empty, strided, expanded and NaN: bit-equal, with the live layout."""
    model = nn.Linear(2, 2)
    live = KINDS[kind].clone(memory_format=torch.preserve_format) if kind != "expanded" else KINDS[kind]
    model.register_buffer("odd", live)
    state = TrainingState(Live(model, torch.optim.SGD(model.parameters(), lr=0.1), Position(0, 1)), {})
    image = state.copy()
    expected = live.clone(memory_format=torch.contiguous_format)
    base = live if kind != "expanded" else live[0]
    base.zero_()
    stage_restore(state, image, verify=True).commit()
    assert live.stride() == KINDS[kind].stride()
    assert torch.equal(
        live.contiguous().view(torch.uint8) if live.dim() else live,
        expected.view(torch.uint8) if live.dim() else expected,
    )


def test_sparse_tensors_and_extra_state_are_refused() -> None:
    """State that cannot be captured is an error."""

    class WithExtraState(nn.Linear):
        def get_extra_state(self) -> object:
            return {"extra": 1}

    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    live = Live(model, torch.optim.SGD(model.parameters(), lr=0.1), Position(0, 1))
    with pytest.raises(StateUnsupportedError, match="buffer/sparse"):
        TrainingState(live, {}).fingerprint()
    live.model = nn.Sequential(WithExtraState(2, 2))
    with pytest.raises(StateUnsupportedError, match="extra state"):
        TrainingState(live, {})


def test_parameters_outside_the_model_are_part_of_the_state() -> None:
    """A parameter that only the optimizer has, such as a learnt temperature, is captured and restored."""
    model, alone = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    state = TrainingState(Live(model, torch.optim.SGD([*model.parameters(), alone], lr=0.1), Position(0, 1)), {})
    image = state.copy()
    alone.data.zero_()
    stage_restore(state, image, verify=True).commit()
    assert alone.tolist() == [1.0, 1.0]


def test_a_compiled_model_has_the_names_of_the_eager_model() -> None:
    """The prefix of torch.compile is dropped, so that compiled and eager runs share checkpoints."""
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eager = TrainingState(Live(model, optimizer, Position(0, 1)), {}).fingerprint()
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)
    assert TrainingState(Live(compiled, optimizer, Position(0, 1)), {}).fingerprint() == eager
