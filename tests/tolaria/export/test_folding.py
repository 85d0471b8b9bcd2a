from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from support.exported import Trained, outputs, trained
from support.processes import python_path
from tolaria.errors import ExportRefusedError
from tolaria.export import load
from tolaria.export.folding import fold
from tolaria.seeds import SeedSlot
from tolaria.seeds.blueprints import Blueprint, lora, residual_mlp
from tolaria.seeds.slots import Graft


def grafted(slot: SeedSlot, *alphas: float, blueprint: Blueprint = lora) -> SeedSlot:
    """Puts random seeds with these alphas into a slot."""
    grafts = {}
    for number, alpha in enumerate(alphas):
        branch = blueprint(slot.spec, torch.Generator().manual_seed(number))
        for parameter in branch.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        graft = grafts[f"s{number}"] = Graft(f"s{number}", branch, slot.spec, isolated=False)
        graft.alpha = alpha
    slot.arrange(grafts)
    return slot


def image_slot(*alphas: float, blueprint: Blueprint = lora) -> SeedSlot:
    """A slot of images with seeds."""
    return grafted(SeedSlot("s", features=6, layout="image"), *alphas, blueprint=blueprint)


def vector_slot(*alphas: float) -> SeedSlot:
    """A slot of vectors with seeds."""
    return grafted(SeedSlot("s", features=6, layout="vector"), *alphas)


def conv() -> nn.Conv2d:
    """A layer before a slot."""
    return nn.Conv2d(3, 6, 3)


def conv_behind() -> nn.Conv2d:
    """A layer behind a slot, which pads."""
    return nn.Conv2d(6, 4, 3, padding=1)


@pytest.mark.parametrize(
    ("make", "shape", "into"),
    [
        (lambda: nn.Sequential(conv(), image_slot(0.5)), (2, 3, 8, 8), {"s0": "0"}),
        (lambda: nn.Sequential(conv(), image_slot(0.5, 0.25), nn.ReLU()), (2, 3, 8, 8), {"s0": "0", "s1": "0"}),
        (lambda: nn.Sequential(nn.ReLU(), image_slot(0.5), conv_behind()), (2, 6, 8, 8), {"s0": "2"}),
        (lambda: nn.Sequential(nn.ReLU(), image_slot(0.5, 1.0), conv_behind()), (2, 6, 8, 8), {"s0": "2", "s1": "2"}),
        (lambda: nn.Sequential(nn.Linear(4, 6), vector_slot(0.5), nn.ReLU()), (2, 4), {"s0": "0"}),
        (lambda: nn.Sequential(vector_slot(0.5), nn.Dropout(0.3), nn.Linear(6, 2)), (2, 6), {"s0": "2"}),
    ],
)
def test_a_linear_seed_is_folded_into_the_layer_beside_it(
    make: Callable[[], nn.Module], shape: tuple[int, ...], into: dict[str, str]
) -> None:
    """Before the slot or behind it; the output stays the same but for rounding, and the seeds are gone."""
    torch.manual_seed(1)
    model: nn.Module = make().eval()
    example = torch.randn(shape)
    with torch.no_grad():
        before = model(example)
        found = fold(model)
        after = model(example)
    assert (found.folded, found.kept) == (into, {})
    assert not any("seeds" in name for name in model.state_dict())
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


class Residual(nn.Module):
    """Reads the layer's output beside the slot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.slot = nn.Linear(6, 6), vector_slot(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        made: Tensor = h + torch.tanh(self.slot(h))
        return made


class Branching(Residual):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (Residual, (2, 6), "no linear layer"),
        (Branching, (2, 6), "cannot be traced"),
        (lambda: nn.Sequential(nn.ReLU(), vector_slot(0.5), nn.ReLU()), (2, 6), "no linear layer"),
        (lambda: nn.Sequential(conv(), image_slot(0.5, blueprint=residual_mlp)), (2, 3, 8, 8), "not a linear map"),
        (lambda: nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), image_slot(0.5)), (2, 6, 4, 4), "no linear layer"),
        (lambda: nn.Sequential(layer := nn.Linear(6, 6), vector_slot(0.5), nn.ReLU(), layer), (2, 6), "no linear"),
    ],
)
def test_what_cannot_be_folded_stays_with_a_reason(
    make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    """A layer that others read, a seed that is not linear, a forward pass that cannot be followed, a shared layer."""
    torch.manual_seed(1)
    model: nn.Module = make().eval()
    example = torch.randn(shape)
    with torch.no_grad():
        before = model(example)
        found = fold(model)
        assert torch.equal(model(example), before)
    assert found.folded == {}
    assert set(found.kept) == {"s0"}
    assert reason in found.kept["s0"]


def test_a_folded_export_reports_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded seeds are in no file; the others are grafted as before; the card has the largest difference."""
    monkeypatch.setenv("PYTHONPATH", python_path())
    seeds = [("lora", "filters"), ("lora", "rectified"), ("residual_mlp", "rectified")]
    it = trained(tmp_path / "state", "support.export_jobs:ImagesJob", seeds)
    card = it.export(tmp_path / "out", fold=True)
    assert card.fold["folded"] == {"seed-0": "0"}
    assert set(card.fold["kept"]) == {"seed-1", "seed-2"}
    names = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any("seed-0" in name for name in names)
    model = load(tmp_path / "out", it.job.build_model)
    difference = float((outputs(it.job, model) - outputs(it.job, it.model)).abs().max())
    assert difference == pytest.approx(card.fold["largest_difference"], rel=1e-3, abs=1e-9)
    assert 0 < difference < 1e-4 * card.fold["largest_output"]


def test_the_job_gets_no_settings_and_no_secrets(gpt: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that builds it to fold has the environment of the command without Tolaria's variables."""
    monkeypatch.setenv("TOLARIA_LEYLINE__SECRET", "hidden")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{python_path()}")
    (tmp_path / "curious.py").write_text("import os\nraise SystemExit([n for n in os.environ if 'TOLARIA' in n])\n")
    curious = Trained(gpt.model, gpt.job, gpt.directory, gpt.checkpoint_id, "curious:Job")
    with pytest.raises(ExportRefusedError, match=r"SystemExit: \[\]"):
        curious.export(tmp_path / "out", fold=True)


def test_folding_needs_the_job(gpt: Trained, tmp_path: Path) -> None:
    """A job that cannot be built is named, and nothing is written."""
    elsewhere = Trained(gpt.model, gpt.job, gpt.directory, gpt.checkpoint_id, "no_such_module:Job")
    with pytest.raises(ExportRefusedError, match="no_such_module"):
        elsewhere.export(tmp_path / "out", fold=True)
    assert list(tmp_path.iterdir()) == []
