from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tolaria.checkpoint.retention import Retention
from tolaria.checkpoint.storage import open_storage
from tolaria.config import Settings
from tolaria.service.start import new_keeper
from tolaria.training.rig import build_rig


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has one class of device, the CPU: no CUDA")
@pytest.mark.parametrize(("origin", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_of_one_class_of_device_comes_back_on_another(origin: str, target: str, tmp_path: Path) -> None:
    """Tensors are where the new rig has its own; the state's digest is the same, and it trains on from there."""
    from_settings, to_settings = (
        Settings.model_validate({"training": {"job": "support.jobs:SlotJob", "device": device}})
        for device in (origin, target)
    )
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        kept = new_keeper(from_settings, build_rig(from_settings)).keep()
        with kept.lease as image:
            row = storage.checkpoints.write(image)
        rig = build_rig(to_settings)
        restored = new_keeper(to_settings, rig).resume(storage.checkpoints.load_newest().image)
    assert restored.expected_digest == row.digest
    assert {parameter.device.type for parameter in rig.model.parameters()} == {target}
