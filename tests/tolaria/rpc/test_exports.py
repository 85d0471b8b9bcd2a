from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import cast

import anyio
import anyio.to_thread
import grpc.aio
import pytest

from leyline.v1 import admin_service_pb2 as admin
from support.admin import serving_run, stub_of
from support.runs import FakePeers, new_run, running
from tolaria.errors import ExportFailedError
from tolaria.export import load
from tolaria.export.card import ExportCard
from tolaria.export.writing import ExportOrder
from tolaria.rpc import exports
from tolaria.rpc.exports import Exports

pytestmark = pytest.mark.anyio


async def test_an_operator_takes_the_model_out_while_training_goes_on(tmp_path: Path) -> None:
    """It is below the state directory; a repeat gets the first answer; names that lead elsewhere are refused."""
    sections: dict[str, object] = {"checkpoint": {}, "state": {"dir": str(tmp_path / "state")}}
    run = new_run(FakePeers(), job="support.export_jobs:ImagesJob", sections=sections, epochs=10_000)
    async with running(run), serving_run(run) as channel:
        stub = stub_of(channel)
        await run.until(lambda: run.checkpointing.saved_step > 0)
        request = admin.ExportModelRequest(request_id="1", reason="to serve it")
        answer = await stub.ExportModel(request, timeout=180)
        assert Path(answer.path).parent == tmp_path / "state" / "exports"
        assert json.loads(answer.card)["digest"] == answer.digest
        assert await stub.ExportModel(request, timeout=180) == answer
        named = await stub.ExportModel(
            admin.ExportModelRequest(request_id="2", reason="r", name="mine", checkpoint="best"), timeout=180
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


def _asked(name: str) -> admin.ExportModelRequest:
    return admin.ExportModelRequest(request_id=name, reason="r", name=name)


async def test_exports_are_carried_out_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a whole checkpoint in memory. The name of their directory is a name like others."""
    at_once, most, places = 0, 0, set()
    counting, second = threading.Lock(), threading.Event()

    def export_model(order: ExportOrder, *, stop: threading.Event) -> ExportCard:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
            places.add(order.target)
        if at_once > 1:
            second.set()
        second.wait(0.05)  # a second one at once would be noticed here
        with counting:
            at_once -= 1
        return cast("ExportCard", None)

    monkeypatch.setattr(exports, "export_model", export_model)
    those, names = Exports(tmp_path), ("a", "b", "c", "exports")
    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(those.carry_out, _asked(name))
    assert most == 1
    assert places == {tmp_path / "exports" / name for name in names}


@pytest.mark.parametrize("error", [MemoryError(), KeyError("ramp"), json.JSONDecodeError("bad", "{", 1)])
async def test_what_nothing_foresaw_fails_the_export_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The request is answered; the run's tasks see no error of another kind."""

    def export_model(order: ExportOrder, *, stop: threading.Event) -> ExportCard:
        raise error

    monkeypatch.setattr(exports, "export_model", export_model)
    with pytest.raises(ExportFailedError, match=type(error).__name__):
        await Exports(tmp_path).carry_out(_asked("a"))


async def test_a_cancelled_export_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends, so that the process can."""
    begun, stopped = threading.Event(), threading.Event()

    def export_model(order: ExportOrder, *, stop: threading.Event) -> ExportCard:
        begun.set()
        if stop.wait(60):
            stopped.set()
        raise ExportFailedError("stopped")

    monkeypatch.setattr(exports, "export_model", export_model)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Exports(tmp_path).carry_out, _asked("a"))
        await anyio.to_thread.run_sync(begun.wait, 60)
        tasks.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(stopped.wait, 60)
