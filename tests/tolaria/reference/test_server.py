"""Both reference peers over loopback gRPC, and on the signal board."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from pydantic import SecretStr

from leyline.v1 import enums_pb2 as e
from leyline.v1.commands_pb2 import AdaptationCommand, CommandSeedOperation
from leyline.v1.kasmina_service_pb2 import ApplyCommandRequest, ExportSeedStatesRequest
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from leyline.v1.rollback_service_pb2 import (
    AbortRollbackRequest,
    CommitRollbackRequest,
    ConfirmRollbackRequest,
    PrepareRollbackRequest,
)
from leyline.v1.rollback_service_pb2_grpc import RollbackParticipantServiceStub
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest, EvaluateStepRequest
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from support.boards import acknowledgements
from tolaria.config import LeylineSettings
from tolaria.errors import BindError
from tolaria.peers.connect import Peer
from tolaria.peers.verification import is_signed
from tolaria.reference.server import join_board, peer_server
from tolaria.signals import SignalBoard

pytestmark = pytest.mark.anyio

NAN = float("nan")


@asynccontextmanager
async def channel_to(peer: Peer, *, secret: str = "", state_dir: Path | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Yields a channel to a peer that serves in this process."""
    leyline = LeylineSettings(secret=SecretStr(secret))
    async with (
        peer_server(peer, "127.0.0.1:0", leyline, state_dir) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        yield channel


def packet(epoch: int, *, training_loss: float = 0.5, run: str = "run") -> SystemStatePacket:
    """Returns the state of an epoch; each epoch has 100 steps."""
    return SystemStatePacket(
        version=1,
        current_epoch=epoch,
        global_step=epoch * 100,
        packet_id=f"{run}-{epoch}",
        training_run_id=run,
        training_loss=training_loss,
        validation_loss=0.5,
        validation_accuracy=0.9,
    )


def germination(command_id: str) -> AdaptationCommand:
    """Returns a command for a new seed."""
    operation = CommandSeedOperation(operation=e.SEED_OP_GERMINATE, blueprint_id="lora")
    return AdaptationCommand(version=1, command_id=command_id, command_type=e.COMMAND_SEED, seed_operation=operation)


PLATEAU = range(1, 5)
"""Epochs after the last of which Tamiyo germinates a seed."""


async def test_tamiyo_answers_with_a_command_or_none() -> None:
    """A plateau gets an unsigned germination; a loss that is not finite gets nothing: the service judges health."""
    async with channel_to("tamiyo") as channel:
        stub = TamiyoServiceStub(channel)
        answers = [await stub.EvaluateEpoch(EvaluateEpochRequest(state=packet(epoch))) for epoch in PLATEAU]
        assert [answer.HasField("command") for answer in answers] == [False, False, False, True]
        grown = answers[-1].command
        assert (grown.command_type, grown.seed_operation.operation) == (e.COMMAND_SEED, e.SEED_OP_GERMINATE)
        assert set(grown.annotations) == {"reason"}
        diverged = await stub.EvaluateEpoch(EvaluateEpochRequest(state=packet(5, training_loss=NAN)))
        assert not diverged.HasField("command")
        step = await stub.EvaluateStep(EvaluateStepRequest(state=packet(6, training_loss=NAN)))
        assert not step.HasField("command")


async def test_tamiyo_signs_with_the_secret() -> None:
    """The signature is valid for the secret and for no other."""
    async with channel_to("tamiyo", secret="key") as channel:
        stub = TamiyoServiceStub(channel)
        for epoch in PLATEAU:
            answer = await stub.EvaluateEpoch(EvaluateEpochRequest(state=packet(epoch)))
        assert is_signed(answer.command, (b"key",))
        assert not is_signed(answer.command, (b"another",))


async def test_tamiyo_answers_a_repeated_packet_with_the_same_command() -> None:
    """Runs are independent of each other."""
    async with channel_to("tamiyo") as channel:
        stub = TamiyoServiceStub(channel)
        for epoch in PLATEAU:
            request = EvaluateEpochRequest(state=packet(epoch))
            last = await stub.EvaluateEpoch(request)
        assert last.HasField("command")
        assert last == await stub.EvaluateEpoch(request)
        other = await stub.EvaluateEpoch(EvaluateEpochRequest(state=packet(5, run="other")))
        assert not other.HasField("command")


async def test_tamiyo_remembers_a_run_after_a_restart(tmp_path: Path) -> None:
    """A new process reads the history of each run from the directory, and decides as the one before would have."""
    answered = []
    for epoch in PLATEAU:
        async with channel_to("tamiyo", state_dir=tmp_path / "peers") as channel:
            answer = await TamiyoServiceStub(channel).EvaluateEpoch(EvaluateEpochRequest(state=packet(epoch)))
            answered.append(answer.HasField("command"))
    assert answered == [False, False, False, True]
    async with channel_to("tamiyo", state_dir=tmp_path / "peers") as channel:
        again = await TamiyoServiceStub(channel).EvaluateEpoch(EvaluateEpochRequest(state=packet(5)))
    assert not again.HasField("command")  # the seed of the last decision is young


async def test_kasmina_answers_with_all_desired_seeds() -> None:
    """Every response contains the desired seeds of its run, also after repeats and refusals."""
    async with channel_to("kasmina") as channel:
        stub = KasminaServiceStub(channel)
        applied = await stub.ApplyCommand(ApplyCommandRequest(command=germination("c1"), state=packet(1)))
        assert (applied.applied, applied.detail) == (True, "seed-1 is germinated")
        assert applied == await stub.ApplyCommand(ApplyCommandRequest(command=germination("c1"), state=packet(1)))
        refused = await stub.ApplyCommand(ApplyCommandRequest(command=AdaptationCommand(), state=packet(1)))
        assert (refused.applied, refused.detail) == (False, "the command has no command_id")
        assert refused.seeds == applied.seeds
        exported = await stub.ExportSeedStates(ExportSeedStatesRequest(state=packet(2)))
        assert [seed.stage for seed in exported.seeds] == [e.SEED_STAGE_TRAINING]
        elsewhere = await stub.ExportSeedStates(ExportSeedStatesRequest(state=packet(2, run="other")))
        assert list(elsewhere.seeds) == []


@pytest.mark.parametrize(
    ("state", "field"),
    [
        (SystemStatePacket(), "state.version"),
        (SystemStatePacket(version=2), "state.version"),
        (SystemStatePacket(version=1, training_run_id="x" * 300), "state.training_run_id"),
    ],
)
async def test_an_invalid_state_is_refused(state: SystemStatePacket, field: str) -> None:
    """All four methods answer INVALID_ARGUMENT and name the field."""
    async with channel_to("tamiyo") as tamiyo, channel_to("kasmina") as kasmina:
        controller, executor = TamiyoServiceStub(tamiyo), KasminaServiceStub(kasmina)
        for call in (
            lambda: controller.EvaluateEpoch(EvaluateEpochRequest(state=state)),
            lambda: controller.EvaluateStep(EvaluateStepRequest(state=state)),
            lambda: executor.ApplyCommand(ApplyCommandRequest(state=state)),
            lambda: executor.ExportSeedStates(ExportSeedStatesRequest(state=state)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.details() or "").startswith(field)


async def test_a_rollback_reverts_the_desired_seeds() -> None:
    """A commit reverts to the target step; an abort undoes it, a confirm makes it final."""
    async with channel_to("kasmina") as channel:
        kasmina, participant = KasminaServiceStub(channel), RollbackParticipantServiceStub(channel)
        await kasmina.ExportSeedStates(ExportSeedStatesRequest(state=packet(1)))
        await kasmina.ApplyCommand(ApplyCommandRequest(command=germination("c1"), state=packet(2)))
        seen = []
        for rollback_id, last in (("r1", "abort"), ("r2", "confirm")):
            await participant.PrepareRollback(PrepareRollbackRequest(rollback_id=rollback_id, target_step=150))
            commit = CommitRollbackRequest(rollback_id=rollback_id, target_step=150)
            committed = await participant.CommitRollback(commit)
            assert (committed.rollback_id, committed.accepted) == (rollback_id, True)
            abort = AbortRollbackRequest(rollback_id=rollback_id, target_step=150)
            confirm = ConfirmRollbackRequest(rollback_id=rollback_id, target_step=150)
            end = (
                await participant.AbortRollback(abort)
                if last == "abort"
                else await participant.ConfirmRollback(confirm)
            )
            assert end.accepted
            probe = ApplyCommandRequest(command=AdaptationCommand(), state=packet(2))
            seen.append(len((await kasmina.ApplyCommand(probe)).seeds))
        assert seen == [1, 0]


async def test_a_rollback_reverts_the_history_of_tamiyo() -> None:
    """After the commit undone epochs are no part of a plateau."""
    async with channel_to("tamiyo") as channel:
        tamiyo, participant = TamiyoServiceStub(channel), RollbackParticipantServiceStub(channel)
        for epoch in (1, 2, 3):
            await tamiyo.EvaluateEpoch(EvaluateEpochRequest(state=packet(epoch)))
        out_of_order = await participant.CommitRollback(CommitRollbackRequest(rollback_id="r", target_step=100))
        assert (out_of_order.accepted, out_of_order.detail) == (False, "commit does not fit: unseen")
        await participant.PrepareRollback(PrepareRollbackRequest(rollback_id="r", target_step=100))
        await participant.CommitRollback(CommitRollbackRequest(rollback_id="r", target_step=100))
        answer = await tamiyo.EvaluateEpoch(EvaluateEpochRequest(state=packet(4)))
        assert not answer.HasField("command")


@pytest.mark.parametrize(
    ("peer", "service"), [("tamiyo", "leyline.v1.TamiyoService"), ("kasmina", "leyline.v1.KasminaService")]
)
async def test_health(peer: Peer, service: str) -> None:
    """The server and each service report SERVING."""
    async with channel_to(peer) as channel:
        for name in ("", service, "leyline.v1.RollbackParticipantService"):
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = await check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_address_in_use_raises() -> None:
    """The error names the address."""
    async with peer_server("tamiyo", "127.0.0.1:0", LeylineSettings()) as server:
        with pytest.raises(BindError, match=str(server.address)):
            async with peer_server("kasmina", str(server.address), LeylineSettings()):
                pass


async def test_a_peer_sends_heartbeats_acknowledges_and_joins_a_new_board(tmp_path: Path) -> None:
    """It waits for a board, acknowledges emergencies, and joins the next board under the same name."""
    path = tmp_path / "board"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(join_board, path, "kasmina")
        for run_id in ("one", "two"):
            board = await anyio.to_thread.run_sync(SignalBoard.create, path, run_id)
            me = board.claim("tolaria")
            with anyio.fail_after(180):
                while not board.read("kasmina").heartbeat_ns:
                    await anyio.sleep(0.01)
                signal_id = me.raise_level(e.EMERGENCY_LEVEL_HALT, "smoke")
                while "kasmina" not in acknowledgements(board, signal_id):
                    await anyio.sleep(0.01)
            await anyio.to_thread.run_sync(partial(board.close, unlink=True))
        tasks.cancel_scope.cancel()
