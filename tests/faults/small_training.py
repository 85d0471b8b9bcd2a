from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from tolaria.jobs import TensorCursor
from tolaria.state.snapshots import SnapshotRing
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Network(nn.Module):
    """Dropout, batch statistics, tied weights, a buffer that is not persistent, an int one and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.middle = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.middle.weight
        self.leave = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.drop(torch.relu(self.norm(self.enter(x))))
        return cast("torch.Tensor", self.leave(self.again(torch.relu(self.middle(hidden)))))


@dataclass
class Knob:
    """A state part that holds one number."""

    value: float = 1.0

    def state_dict(self) -> dict[str, JsonValue]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, JsonValue]) -> None:
        self.value = cast("float", state["value"])


@dataclass
class Training:
    """A small training run in place of a lane."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    cursor: TensorCursor
    position: Position = field(default_factory=lambda: Position(0, 1))
    knob: Knob = field(default_factory=Knob)

    def state(self) -> TrainingState:
        return TrainingState(self, {"cursor": self.cursor, "knob": self.knob})

    def train(self, steps: int) -> list[float]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        batch = self.cursor.next_batch()
        if batch is None:
            self.position = Position(self.position.global_step, self.position.epoch + 1)
            self.cursor.begin_epoch(self.position.epoch)
            return self._step()
        inputs, labels = batch.payload
        noise = float(np.random.rand()) + random.random()  # noqa: NPY002 - the global generators are part of the state
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(inputs + 0.01 * noise), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.knob.value *= 1.5
        self.position = Position(self.position.global_step + 1, self.position.epoch)
        return loss.item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with default betas."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def new_training(make_optimizer: MakeOptimizer = adamw, seed: int = 5) -> Training:
    """Returns a run at its start. Equal arguments give equal runs."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    inputs, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    cursor = TensorCursor([inputs, labels], batch_size=8, seed=seed)
    cursor.begin_epoch(1)
    model = Network()
    return Training(model, make_optimizer(model), cursor)


def new_ring(*, entries_max: int = 5, seal: bool = False) -> SnapshotRing:
    """Returns an empty snapshot ring of 256 MiB."""
    return SnapshotRing(bytes_max=2**28, entries_max=entries_max, seal=seal)
