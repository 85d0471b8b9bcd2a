"""The reference Kasmina's servicer: a seed bed for each run, over gRPC. Decides nothing itself."""

from __future__ import annotations

from typing import Any

import grpc.aio
import structlog

from leyline.v1.kasmina_service_pb2 import (
    ApplyCommandRequest,
    ApplyCommandResponse,
    ExportSeedStatesRequest,
    ExportSeedStatesResponse,
)
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceServicer
from tolaria.reference.checks import require_state
from tolaria.reference.runs import Runs
from tolaria.reference.seed_bed import SeedBed

_log = structlog.get_logger(__name__)


class KasminaService(KasminaServiceServicer):
    """Executor of seed commands. Both answers carry the whole desired set of the state's run."""

    def __init__(self, beds: Runs[SeedBed]) -> None:
        self._beds = beds

    async def ApplyCommand(  # noqa: N802 - the contract's name
        self, request: ApplyCommandRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ApplyCommandResponse:
        """Carry out a command, once. A command that cannot be is answered with `applied` false and the reason."""
        await require_state(request, context)
        bed = self._beds.of(request.state.training_run_id)
        answer = bed.apply(request.command, request.state)
        _log.info("command", command_id=request.command.command_id[:128], applied=answer.applied, detail=answer.detail)
        return ApplyCommandResponse(seeds=bed.desired(), applied=answer.applied, detail=answer.detail)

    async def ExportSeedStates(  # noqa: N802 - the contract's name
        self, request: ExportSeedStatesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ExportSeedStatesResponse:
        """Judge the gates on an epoch's state, once an epoch, and tell what is desired now."""
        await require_state(request, context)
        bed = self._beds.of(request.state.training_run_id)
        bed.observe(request.state)
        return ExportSeedStatesResponse(seeds=bed.desired())
