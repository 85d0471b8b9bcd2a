from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.exported import Trained, outputs, trained
from support.processes import python_path
from tolaria.errors import ExportDamagedError, ExportMismatchError, UnknownBlueprintError
from tolaria.export import load
from tolaria.export.card import CARD


def test_loading_needs_torch_and_nothing_else(tmp_path: Path) -> None:
    """In an environment where everything else that Tolaria depends on is missing, the seeds come along too."""
    it = trained(
        tmp_path / "state", "support.export_jobs:ImagesJob", [("lora", "filters"), ("residual_mlp", "filters")]
    )
    it.export(tmp_path / "out")
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING: raise ModuleNotFoundError(name)
MISSING = {"grpc", "anyio", "pydantic", "pydantic_settings", "google", "leyline", "xxhash", "aiohttp", "structlog",
           "typer", "rich", "sklearn", "prometheus_client", "safetensors", "transformers"}
sys.meta_path.insert(0, Missing())
import tolaria.export
assert "torch" not in sys.modules
from torch import nn
from tolaria.seeds import SeedSlot
model = tolaria.export.load(sys.argv[1], lambda: nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), SeedSlot("filters", features=8, layout="image"), nn.BatchNorm2d(8), nn.ReLU(),
    SeedSlot("rectified", features=8, layout="image"), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)))
print(sum(len(slot.seeds) for slot in model if isinstance(slot, SeedSlot)), model.training)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, timeout=100, check=False,
        env={"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["2", "False"]), done.stderr


@pytest.mark.parametrize(
    ("job", "seed"),
    [
        ("ImagesJob", ("residual_mlp", "filters")),
        ("ImagesJob", ("bottleneck_adapter", "filters")),
        ("ImagesJob", ("depthwise_conv_adapter", "filters")),
        ("ImagesJob", ("lora", "filters")),
        ("TokensJob", ("depthwise_conv_adapter", "tokens")),
    ],
)
def test_a_loaded_model_can_be_exported_by_torch(tmp_path: Path, job: str, seed: tuple[str, str]) -> None:
    """`torch.export` follows each built-in blueprint, and its program computes the same."""
    it = trained(tmp_path / "state", f"support.export_jobs:{job}", [seed])
    it.export(tmp_path / "out")
    model = load(tmp_path / "out", it.job.build_model)
    its_job: Any = it.job
    example = tuple(next(iter(its_job.validation_batches())).payload[:1])
    program = torch.export.export(model, example)
    with torch.no_grad():
        assert torch.allclose(program.module()(*example), outputs(it.job, model), atol=1e-6)


def test_changed_bytes_are_noticed(gpt: Trained, tmp_path: Path) -> None:
    """A changed weight file, a missing one and a card that is none are refused, and named."""
    gpt.export(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportDamagedError, match=r"model.safetensors is not what was written"):
        load(tmp_path / "out", gpt.job.build_model)
    file.unlink()
    with pytest.raises(ExportDamagedError, match=r"model.safetensors cannot be read"):
        load(tmp_path / "out", gpt.job.build_model)
    (tmp_path / "out" / CARD).write_text("{}")
    with pytest.raises(ExportDamagedError, match=CARD):
        load(tmp_path / "out", gpt.job.build_model)
    with pytest.raises(ExportDamagedError, match="cannot be read"):
        load(tmp_path / "elsewhere", gpt.job.build_model)


def test_another_model_is_refused_and_the_difference_named(gpt: Trained, tmp_path: Path) -> None:
    """A model without the slot, with another shape, or with more parameters gets no values."""
    gpt.export(tmp_path / "out")
    with pytest.raises(ExportMismatchError, match="no slot 'tokens' for 'seed-0'"):
        load(tmp_path / "out", lambda: nn.Linear(2, 2))

    def wider() -> nn.Module:
        model = gpt.job.build_model()
        model.extra = nn.Linear(2, 2)
        return model

    with pytest.raises(ExportMismatchError, match=r"it lacks extra\.weight"):
        load(tmp_path / "out", wider)

    def other_shape() -> nn.Module:
        model = gpt.job.build_model()
        model.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        return model

    with pytest.raises(ExportMismatchError, match=r"the model lacks attention\.in_proj_bias"):
        load(tmp_path / "out", other_shape)


def test_an_unknown_blueprint_is_named(gpt: Trained, tmp_path: Path) -> None:
    """A seed whose blueprint is not installed cannot be built."""
    gpt.export(tmp_path / "out")
    card = tmp_path / "out" / CARD
    card.write_text(card.read_text().replace('"lora"', '"theirs"'))
    with pytest.raises(UnknownBlueprintError, match="theirs"):
        load(tmp_path / "out", gpt.job.build_model)


def test_an_export_of_a_checkpoint_without_a_description_loads_too(tmp_path: Path) -> None:
    """Checkpoints of earlier versions do not say which tensors are tied or transient; the model knows."""
    it = trained(tmp_path / "state", "support.export_jobs:TokensJob", [("lora", "tokens")], described=False)
    card = it.export(tmp_path / "out")
    assert card.tied == {}
    assert it.evaluation(load(tmp_path / "out", it.job.build_model)) == it.evaluation()
