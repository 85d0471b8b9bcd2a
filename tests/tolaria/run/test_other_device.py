from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import Settings
from tolaria.lane.build import build


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no second class of device on this machine: no CUDA")
@pytest.mark.parametrize(("origin", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_is_restored_on_another_class_of_device(origin: str, target: str, tmp_path: Path) -> None:
    """The tensors are on the new lane's device, and the digest is the same."""
    from_settings, to_settings = (
        Settings.model_validate({"training": {"job": "support.jobs:SlotJob", "device": device}})
        for device in (origin, target)
    )
    storage = open_storage(tmp_path, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        with build(from_settings).snapshots.capture_image() as image:
            row = storage.checkpoints.write(image)
        built = build(to_settings)
        restored = built.resume(storage.checkpoints.load_newest().image)
    assert restored.expected_digest == restored.state_digest == row.digest
    assert {parameter.device.type for parameter in built.module.model.parameters()} == {target}
