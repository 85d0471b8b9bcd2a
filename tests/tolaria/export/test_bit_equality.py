from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread
import pytest
import torch

from support.exported import Seed, evaluate, outputs, trained
from support.runs import FakePeers, new_run, running
from tolaria.errors import ExportRefusedError
from tolaria.export import load
from tolaria.export.card import Format
from tolaria.export.writing import ExportOrder, export_model

EVERY_BLUEPRINT = [
    ("residual_mlp", "early"), ("bottleneck_adapter", "early"), ("depthwise_conv_adapter", "late"), ("lora", "late"),
]  # fmt: skip
MODELS: dict[str, tuple[str, Sequence[Seed], Sequence[Seed]]] = {
    "digits with every blueprint": ("digits", EVERY_BLUEPRINT, [("residual_mlp", "late")]),
    "a tied GPT": ("support.export_jobs:TokensJob", [("lora", "tokens")], [("depthwise_conv_adapter", "tokens")]),
    "batch statistics": ("support.export_jobs:ImagesJob", [("lora", "filters")], [("lora", "rectified")]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_export_evaluates_as_the_service_does(tmp_path: Path, name: str) -> None:
    """Outputs and sums are the same bits, with seeds of every blueprint, also one whose alpha is between 0 and 1."""
    it = trained(tmp_path / "state", *MODELS[name][:2], growing=MODELS[name][2])
    form: Format = "torch" if "tied" in name else "safetensors"
    card = it.export(tmp_path / "out", form)
    assert len(card.grown) == len(MODELS[name][1]) + len(MODELS[name][2])
    assert any(0 < seed.alpha < 1 for seed in card.grown if seed.stage == "BLENDING")
    model = load(tmp_path / "out", it.job.build_model)
    assert it.evaluation(model) == it.evaluation()
    assert torch.equal(outputs(it.job, model), outputs(it.job, it.model))


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_average_evaluates_as_the_service_evaluates_it(tmp_path: Path, name: str) -> None:
    """The same bits, with seeds, tied weights and batch statistics; the model's own are others, and stay."""
    it = trained(tmp_path / "state", *MODELS[name][:2], growing=MODELS[name][2], ema=0.9)
    form: Format = "torch" if "tied" in name else "safetensors"
    assert it.export(tmp_path / "out", form, values="ema").values == "ema"
    it.export(tmp_path / "own", form)
    own, averaged = (load(tmp_path / place, it.job.build_model) for place in ("own", "out"))
    assert it.averages is not None
    with it.averages.in_model():
        assert it.evaluation(averaged) == it.evaluation()
        assert torch.equal(outputs(it.job, averaged), outputs(it.job, it.model))
    assert it.evaluation(own) == it.evaluation() != it.evaluation(averaged)


@pytest.mark.anyio
@pytest.mark.parametrize("job", ["support.export_jobs:ImagesJob", "support.export_jobs:TokensJob"])
async def test_the_figures_of_the_average_are_those_of_its_export(tmp_path: Path, job: str) -> None:
    """In status and card, to the last bit; `checkpoint.best` may be one of them."""
    sections: dict[str, object] = {
        "checkpoint": {"best": "ema/loss:min"}, "state": {"dir": str(tmp_path / "state")}, "ema": {"decay": 0.8},
    }  # fmt: skip
    run = new_run(FakePeers(), job=job, sections=sections, epochs=2)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.last_epoch is not None
    figures = run.status.last_epoch.evaluation.figures()
    order = ExportOrder(tmp_path / "state", "newest", "safetensors", tmp_path / "out", values="ema")
    card = await anyio.to_thread.run_sync(export_model, order)
    assert card.metrics == figures
    model = await anyio.to_thread.run_sync(load, tmp_path / "out", run.job.build_model)
    found = evaluate(run.job, model)
    assert (found.loss, found.accuracy) == (figures["ema/loss"], figures["ema/accuracy"])
    assert found.loss != figures["loss"]


def test_an_average_that_no_checkpoint_has_is_refused(tmp_path: Path) -> None:
    """With the setting that makes one; nothing is written."""
    it = trained(tmp_path / "state", "support.export_jobs:TokensJob")
    with pytest.raises(ExportRefusedError, match=r"no average of the weights: ema.decay of its run was 0"):
        it.export(tmp_path / "out", values="ema")
    assert not (tmp_path / "out").exists()


@pytest.mark.anyio
async def test_the_last_checkpoint_of_a_run_evaluates_as_the_run_did(tmp_path: Path) -> None:
    """The figures of the last epoch, which status and card show, are those of the loaded export, to the last bit."""
    sections: dict[str, object] = {"checkpoint": {}, "state": {"dir": str(tmp_path / "state")}}
    run = new_run(FakePeers(), job="support.export_jobs:ImagesJob", sections=sections, epochs=2)
    async with running(run):
        await run.until(lambda: run.state == "FINISHED")
    assert run.status.last_epoch is not None
    evaluation = run.status.last_epoch.evaluation
    order = ExportOrder(tmp_path / "state", "newest", "safetensors", tmp_path / "out")
    card = await anyio.to_thread.run_sync(export_model, order)
    assert card.metrics == {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
    assert card.evaluated_step == card.global_step == run.status.global_step
    model = await anyio.to_thread.run_sync(load, tmp_path / "out", run.job.build_model)
    assert evaluate(run.job, model) == evaluation
