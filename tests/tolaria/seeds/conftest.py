"""Shared fixtures: a host with two slots, the built-in blueprints, desired states."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor, nn

from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from tolaria.seeds import Blueprints, SeedSlot, SeedTopology
from tolaria.values.seeds import stage_from_name

FEATURES = 6
BUILT_IN = ("residual_mlp", "bottleneck_adapter", "depthwise_conv_adapter", "lora")

torch.set_num_threads(1)


class Host(nn.Module):
    """Images (batch, 1, 4, 4) to logits (batch, 3), with a slot for images and one for vectors, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, FEATURES, 3, padding=1),
            SeedSlot("early", features=FEATURES, layout="image"),
            nn.ReLU(inplace=True),
        )
        self.neck = nn.Linear(FEATURES * 16, FEATURES)
        self.late = SeedSlot("late", features=FEATURES, layout="vector")
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(FEATURES, 3))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.late(self.neck(self.body(x).flatten(1)))
        out: Tensor = self.head(h)
        return out


@pytest.fixture
def make_host() -> Callable[[], Host]:
    """Makes identical hosts."""

    def make() -> Host:
        torch.manual_seed(7)
        return Host()

    return make


@pytest.fixture
def host(make_host: Callable[[], Host]) -> Host:
    """A host."""
    return make_host()


def entry(name: str, value: str) -> EntryPoint:
    """An entry point of the blueprints group."""
    return EntryPoint(name, value, "tolaria.blueprints")


@pytest.fixture
def blueprints() -> Blueprints:
    """The built-in blueprints, as pyproject declares them, and one that cannot be imported."""
    built_in = [entry(name, f"tolaria.seeds.blueprints:{name}") for name in BUILT_IN]
    return Blueprints([*built_in, entry("absent", "no.such.module:build")])


@pytest.fixture
def make_topology(blueprints: Blueprints) -> Callable[[nn.Module], SeedTopology]:
    """Makes topologies of run seed 3 whose culled seeds fade out over 4 steps."""
    return lambda model: SeedTopology(model, blueprints, seed=3, cull_steps=4)


@pytest.fixture
def topology(host: Host, make_topology: Callable[[nn.Module], SeedTopology]) -> SeedTopology:
    """The topology of `host`."""
    return make_topology(host)


@pytest.fixture
def seed() -> Callable[..., SeedState]:
    """Makes desired states; stages have their short names, alpha is (start, end, begin, duration)."""

    def make(
        seed_id: str,
        stage: str,
        blueprint: str = "bottleneck_adapter",
        *,
        slot: str = "late",
        alpha: tuple[float, float, int, int] | None = None,
    ) -> SeedState:
        schedule = None
        if alpha is not None:
            start, end, begin, duration = alpha
            schedule = AlphaSchedule(start=start, end=end, begin_step=begin, duration_steps=duration)
        return SeedState(
            seed_id=seed_id, stage=stage_from_name(stage), blueprint_id=blueprint, slot=slot, alpha=schedule
        )

    return make


@pytest.fixture
def batch() -> Tensor:
    """Eight images."""
    return torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def output_of(batch: Tensor) -> Callable[[nn.Module], Tensor]:
    """Computes the model's output for the batch in its present mode, always with the same dropout mask."""

    def output(model: nn.Module) -> Tensor:
        torch.manual_seed(11)
        out: Tensor = model(batch.clone())
        return out

    return output


@pytest.fixture
def randomize_seeds() -> Callable[[nn.Module], None]:
    """Gives every seed parameter a random value, so that its branch adds something."""

    def give(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".seeds." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

    return give
