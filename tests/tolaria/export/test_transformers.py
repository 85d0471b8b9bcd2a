from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.export_jobs import TokensJob
from support.exported import Trained, trained
from tolaria.errors import ExportMismatchError, ExportRefusedError
from tolaria.export import load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", params=["PretrainedJob", "WrappedPretrainedJob"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small GPT-2 that has been trained: as the job's model, and inside it."""
    return trained(tmp_path_factory.mktemp("hf") / "state", f"support.export_jobs:{request.param}")


def test_from_pretrained_loads_the_trained_model(pretrained: Trained, tmp_path: Path) -> None:
    """With config and generation config, tied weights, and logits that are the same bits; also from shards."""
    inner: Any = pretrained.model["gpt"] if "Wrapped" in pretrained.name else pretrained.model  # type: ignore[index]
    tokens = TokensJob(pretrained.job.context).tokens[:, :-1]  # type: ignore[attr-defined]
    for name, shard_bytes in (("whole", 10**9), ("shards", 1000)):
        card = pretrained.export(tmp_path / name, "hf", shard_bytes=shard_bytes)
        assert (len(card.weights) > 1) == (name == "shards")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        assert type(model) is type(inner)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in inner.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids=tokens).logits, inner.eval()(input_ids=tokens).logits)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_what_is_outside_the_library_s_model_is_named(pretrained: Trained, tmp_path: Path) -> None:
    """The card lists the tensors that an hf export lacks, and `load` refuses to build the job's model of it."""
    card = pretrained.export(tmp_path / "out", "hf")
    if "Wrapped" not in pretrained.name:
        assert card.left_out == ()
        assert pretrained.evaluation(load(tmp_path / "out", pretrained.job.build_model)) == pretrained.evaluation()
        return
    assert card.left_out == ("extra.bias", "extra.weight")
    with pytest.raises(ExportMismatchError, match="lacks 2 tensors"):
        load(tmp_path / "out", pretrained.job.build_model)


def test_seeds_and_other_models_are_refused(gpt: Trained, tmp_path: Path) -> None:
    """The library knows neither seeds nor a model that is not its own."""
    with pytest.raises(ExportRefusedError, match="needs a job whose model is, or contains, a model of transformers"):
        gpt.export(tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []
