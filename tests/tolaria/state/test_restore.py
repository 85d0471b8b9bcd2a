from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch
from pydantic import JsonValue
from torch import nn

from faults.small_training import new_ring
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.errors import ImageDamagedError, RestoreAbandonedError, StateMismatchError
from tolaria.images import StateImage
from tolaria.state.encoding import packed_bytes
from tolaria.state.restore import stage_restore
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

if TYPE_CHECKING:
    from faults.small_training import MakeOptimizer, Training

Make = Callable[..., "Training"]


def restore(state: TrainingState, image: StateImage) -> None:
    """Stages and commits a restore."""
    stage_restore(state, image, verify=True).commit()


def test_training_from_a_snapshot_is_bit_exact(make_training: Make, make_optimizer: MakeOptimizer) -> None:
    """Losses and final digest after a rollback equal those of an uninterrupted run."""
    straight = make_training(make_optimizer)
    expected = straight.train(20)[7:]

    rolled_back = make_training(make_optimizer)
    ring = new_ring(seal=True)
    rolled_back.train(7)
    assert isinstance(ring.capture(rolled_back.state()), Position)
    rolled_back.train(9)
    lease = ring.lookup(10)
    assert lease is not None
    with lease as image:
        restore(rolled_back.state(), image)
        assert rolled_back.state().fingerprint().total == image.seal().total
    assert rolled_back.train(13) == expected
    assert rolled_back.state().fingerprint() == straight.state().fingerprint()


def test_training_from_a_checkpoint_in_new_objects_is_bit_exact(
    tmp_path: Path, make_training: Make, make_optimizer: MakeOptimizer
) -> None:
    """A checkpoint loaded into newly built objects continues the run bit for bit."""
    straight = make_training(make_optimizer)
    with open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest")).journal:
        pass
    straight.train(7)
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        row = storage.checkpoints.write(straight.state().copy())
    expected = straight.train(13)

    resumed = make_training(make_optimizer, seed=99)
    resumed.cursor = make_training(make_optimizer).cursor  # the same data at another position
    storage = open_storage(tmp_path, run_id="a", retention=Retention(last=3, best="highest"))
    with storage.journal:
        loaded = storage.checkpoints.load_newest()
    stage_restore(resumed.state(), loaded.image, verify=False).commit()
    assert resumed.state().fingerprint().total == row.digest
    assert resumed.train(13) == expected
    assert resumed.state().fingerprint() == straight.state().fingerprint()


def test_an_image_is_unchanged_by_training_after_its_restore(training: Training) -> None:
    """Neither model nor optimizer shares memory with the image."""
    training.train(3)
    image = training.state().copy()
    image.seal()
    training.train(2)
    restore(training.state(), image)
    training.train(5)
    image.verify()


def test_a_restore_copies_into_the_live_tensors(training: Training) -> None:
    """Parameters, buffers and optimizer state keep their memory."""
    training.train(3)
    image = training.state().copy()
    training.train(1)
    before = {name: t.data_ptr() for name, t in training.state().survey().tensors.items() if not name.startswith("rng")}
    restore(training.state(), image)
    after = {name: t.data_ptr() for name, t in training.state().survey().tensors.items() if not name.startswith("rng")}
    assert after == before


def test_lazy_optimizer_state_is_removed_and_created(training: Training) -> None:
    """A restore to before the first step empties the optimizer's state; one to a later step creates it."""
    early = training.state().copy()
    training.train(4)
    late = training.state().copy()
    restore(training.state(), early)
    assert len(training.optimizer.state) == 0
    assert training.state().fingerprint().total == early.seal().total
    restore(training.state(), late)
    assert training.state().fingerprint().total == late.seal().total
    training.train(3)
    late.verify()


def test_param_group_options_are_restored(training: Training) -> None:
    """Options are restored, later ones removed, and a learning rate that is a tensor keeps its identity."""
    rate = torch.tensor(0.25)
    training.optimizer.param_groups[0]["lr"] = rate
    image = training.state().copy()
    rate.fill_(9.0)
    training.optimizer.param_groups[0].update(betas=(0.5, 0.6), extra=1)
    restore(training.state(), image)
    group = training.optimizer.param_groups[0]
    assert (group["lr"] is rate, rate.item(), group["betas"], "extra" in group) == (True, 0.25, (0.9, 0.999), False)


def test_nested_optimizer_state_is_restored() -> None:
    """LBFGS, which keeps lists of tensors, continues bit for bit after a restore."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=3)
    inputs, wanted = torch.randn(20, 3), torch.randn(20, 1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> float:
        return float(optimizer.step(closure).detach())  # type: ignore[no-untyped-call]

    @dataclass
    class Live:
        model: nn.Module
        optimizer: torch.optim.Optimizer
        position: Position

    state = TrainingState(Live(model, optimizer, Position(0, 1)), {})
    for _ in range(2):
        step()
    image = state.copy()
    expected = [step() for _ in range(3)]
    restore(state, image)
    assert state.fingerprint().total == image.seal().total
    assert [step() for _ in range(3)] == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.model.register_buffer("new", torch.zeros(2)),
        lambda t: setattr(t.model, "leave", nn.Linear(8, 4)),
        lambda t: t.model.half(),
        lambda t: setattr(t, "optimizer", torch.optim.SGD(t.model.parameters(), lr=0.1)),
        lambda t: t.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
        lambda t: t.optimizer.param_groups[0]["params"].reverse(),
    ],
    ids=["name", "shape", "dtype", "optimizer", "group", "order"],
)
def test_an_image_that_does_not_fit_changes_nothing(training: Training, change: Callable[[Training], object]) -> None:
    """Each kind of mismatch is found before the first tensor changes."""
    training.train(2)
    image = training.state().copy()
    training.train(1)
    change(training)
    before = training.state().fingerprint()
    with pytest.raises(StateMismatchError):
        restore(training.state(), image)
    assert training.state().fingerprint() == before


def test_missing_parts_do_not_fit(training: Training) -> None:
    """The error names the part."""
    image = training.state().copy()
    with pytest.raises(StateMismatchError, match="parts/knob: in the image only"):
        restore(TrainingState(training, {"cursor": training.cursor}), image)


@pytest.mark.parametrize("name", ["parameter/enter.weight", "buffer/calls", "state/leave.bias/exp_avg", "rng/torch"])
def test_a_flipped_bit_in_an_image_is_found_before_anything_changes(training: Training, name: str) -> None:
    """The image is hashed again before it is used; the error names the tensor."""
    training.train(2)
    image = training.state().copy()
    image.seal()
    training.train(1)
    before = training.state().fingerprint()
    image.buffers[name][0] ^= 1
    with pytest.raises(ImageDamagedError, match=name):
        restore(training.state(), image)
    assert training.state().fingerprint() == before


class Broken:
    """A part that fails to load one state."""

    def __init__(self) -> None:
        self.count = 0
        self.refuses = -1

    def state_dict(self) -> dict[str, JsonValue]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, JsonValue]) -> None:
        torch.rand(3)
        self.count = cast("int", state["count"])
        if self.count == self.refuses:
            raise OSError("the loader is gone")


def test_a_part_that_fails_to_load_changes_nothing(training: Training) -> None:
    """Parts loaded before it get their old state, and tensors and generators are unchanged."""
    broken = Broken()
    state = TrainingState(training, {"cursor": training.cursor, "knob": training.knob, "zz": broken})
    training.train(2)
    image = state.copy()
    training.train(2)
    broken.count, broken.refuses = 7, 0
    before = state.fingerprint()
    with pytest.raises(OSError, match="the loader is gone"):
        restore(state, image)
    assert state.fingerprint() == before


def test_an_expired_restore_changes_nothing(training: Training) -> None:
    """A deadline that passes while parts load abandons the restore before the copy."""
    training.train(2)
    image = training.state().copy()
    training.train(2)
    before = training.state().fingerprint()
    with pytest.raises(RestoreAbandonedError):
        stage_restore(training.state(), image, verify=True).commit(lambda: True)
    assert training.state().fingerprint() == before


class Grafts:
    """A topology: the number of extra layers in the model, each with its parameter group."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.fails = False

    def count(self) -> int:
        return sum(1 for name, _ in self.training.model.named_children() if name.startswith("graft"))

    def state_dict(self) -> dict[str, JsonValue]:
        return {"count": self.count()}

    def load_state_dict(self, state: dict[str, JsonValue]) -> None:
        wanted = cast("int", state["count"])
        while self.count() > wanted:
            delattr(self.training.model, f"graft{self.count() - 1}")
            self.training.optimizer.param_groups.pop()
        while self.count() < wanted:
            self.add()
        if self.fails:
            self.fails = False
            raise OSError("the blueprint is gone")

    def add(self) -> None:
        layer = nn.Linear(2, 2)
        self.training.model.add_module(f"graft{self.count()}", layer)
        self.training.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.001})


@pytest.mark.parametrize(("then", "now"), [(0, 2), (2, 0), (1, 2)])
def test_the_topology_is_restored_before_the_tensors(training: Training, then: int, now: int) -> None:
    """Layers added or removed since the snapshot are removed or added again, then their tensors are restored."""
    grafts = Grafts(training)
    state = TrainingState(training, {}, topology=grafts)
    grafts.load_state_dict({"count": then})
    training.train(2)
    image = state.copy()
    grafts.load_state_dict({"count": now})
    training.train(2)
    restore(state, image)
    assert state.fingerprint().total == image.seal().total


def test_a_topology_that_fails_to_load_changes_nothing(training: Training) -> None:
    """If loading fails halfway, the old topology and all its tensors are restored."""
    grafts = Grafts(training)
    state = TrainingState(training, {"knob": training.knob}, topology=grafts)
    image = state.copy()
    grafts.load_state_dict({"count": 2})
    training.train(2)
    before = state.fingerprint()
    grafts.fails = True
    with pytest.raises(OSError, match="the blueprint is gone"):
        restore(state, image)
    assert state.fingerprint() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cpu_image_is_restored_on_a_cuda_device(make_training: Make) -> None:
    """Parameters and moments go to the device, step counts stay on the CPU."""
    on_cpu = make_training()
    on_cpu.train(2)
    image = on_cpu.state().copy()
    on_cuda = make_training(seed=6)
    on_cuda.model.cuda()
    restore(TrainingState(on_cuda, {"cursor": on_cuda.cursor, "knob": on_cuda.knob}), image)
    weight = next(on_cuda.model.parameters())
    assert packed_bytes(weight) == image.buffers["parameter/enter.weight"]
    assert (on_cuda.optimizer.state[weight]["exp_avg"].device, on_cuda.optimizer.state[weight]["step"].device.type) == (
        weight.device,
        "cpu",
    )
