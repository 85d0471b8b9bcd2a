from __future__ import annotations

import json
from pathlib import Path

import anyio.to_thread
import grpc.aio
import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.admin import serving_run, stub_of
from support.runs import FakePeers, new_run, running
from tolaria.export import load

pytestmark = pytest.mark.anyio


async def test_an_operator_takes_the_model_out_while_training_goes_on(tmp_path: Path) -> None:
    """It is below the state directory; a repeat gets the first answer; names that lead elsewhere are refused."""
    sections: dict[str, object] = {"checkpoint": {}, "state": {"dir": str(tmp_path / "state")}}
    run = new_run(FakePeers(), job="support.export_jobs:ImagesJob", sections=sections, epochs=10_000)
    async with running(run), serving_run(run) as channel:
        stub = stub_of(channel)
        await run.until(lambda: run.checkpointing.saved_step > 0)
        request = admin.ExportModelRequest(request_id="1", reason="to serve it")
        answer = await stub.ExportModel(request, timeout=60)
        assert Path(answer.path).parent == tmp_path / "state" / "exports"
        assert json.loads(answer.card)["digest"] == answer.digest
        assert await stub.ExportModel(request, timeout=60) == answer
        named = await stub.ExportModel(
            admin.ExportModelRequest(request_id="2", reason="r", name="mine", checkpoint="best"), timeout=60
        )
        assert named.path == str(tmp_path / "state" / "exports" / "mine")
        for number, name in enumerate(("../x", "/x", ".hidden", "a/b")):
            with pytest.raises(grpc.aio.AioRpcError, match="name: must be the name of a directory"):
                await stub.ExportModel(admin.ExportModelRequest(request_id=f"n{number}", reason="r", name=name))
        for number, (field, value, code) in enumerate(
            (
                ("name", "mine", grpc.StatusCode.FAILED_PRECONDITION),
                ("checkpoint", "none-such", grpc.StatusCode.NOT_FOUND),
                ("format", admin.EXPORT_FORMAT_HF, grpc.StatusCode.FAILED_PRECONDITION),
            )
        ):
            fields = {"name": f"other{number}", field: value}
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.ExportModel(admin.ExportModelRequest(request_id=f"f{number}", reason="r", **fields))  # type: ignore[arg-type]
            assert raised.value.code() == code
        model = await anyio.to_thread.run_sync(load, answer.path, run.job.build_model)
    assert not model.training
    assert run.status.global_step > answer.exported_step
