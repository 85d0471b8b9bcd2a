"""The admin service over loopback gRPC, and an in-memory journal for its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import grpc.aio

from leyline.v1.admin_service_pb2 import DESCRIPTOR, ReloadConfigResponse
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub, add_TolariaAdminServiceServicer_to_server
from support.runs import RunUnderTest
from tolaria.errors import JournalError
from tolaria.grpc_server import bound_server, grpc_server
from tolaria.journal.async_journal import AsyncJournal
from tolaria.journal.rows import AdminActionRow, AdminCallRow, CheckpointRow, Incident, Row
from tolaria.rpc.admin import AdminParts, AdminService
from tolaria.rpc.audit import AuditTrail
from tolaria.service.wiring import new_ledger

if TYPE_CHECKING:
    from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceAsyncStub  # in the type stubs only

SERVICE = DESCRIPTOR.services_by_name["TolariaAdminService"]


async def no_reload(origin: str) -> ReloadConfigResponse:
    """Finds no change."""
    del origin
    return ReloadConfigResponse()


class MemoryJournal(AsyncJournal):
    """Keeps answers by request id in memory. Every call hangs while `hangs`, and raises `error` if one is set."""

    def __init__(self, answers: dict[str, AdminActionRow] | None = None) -> None:
        self.answers = {} if answers is None else answers
        self.checkpoints: tuple[CheckpointRow, ...] = ()
        self.listed: tuple[Incident, ...] = ()
        self.limits: list[int] = []
        self.noted: list[Row] = []
        self.calls: dict[str, AdminCallRow] = {}
        self.hangs = False
        self.error: JournalError | None = None

    async def find_answer(self, request_id: str) -> AdminActionRow | None:
        """Returns the answer of this or an earlier process."""
        await self._respond()
        return self.answers.get(request_id)

    async def answer_once(self, row: AdminActionRow) -> AdminActionRow:
        """Keeps the first answer of a request."""
        await self._respond()
        return self.answers.setdefault(row.request_id, row)

    async def kept_points(self) -> tuple[CheckpointRow, ...]:
        """Returns `checkpoints`."""
        await self._respond()
        return self.checkpoints

    async def incidents(self, limit: int) -> tuple[Incident, ...]:
        """Returns at most `limit` of `listed`."""
        await self._respond()
        self.limits.append(limit)
        return self.listed[:limit]

    def note(self, row: Row) -> None:
        """Records a row that would be written later; calls of operators apart."""
        if isinstance(row, AdminCallRow):
            self.calls[row.call_id] = row
        else:
            self.noted.append(row)

    async def admin_calls(self, limit: int) -> tuple[AdminCallRow, ...]:
        """Returns at most `limit` calls, newest first."""
        await self._respond()
        return tuple(reversed(self.calls.values()))[:limit]

    async def _respond(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self.hangs:
            await anyio.sleep_forever()
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def serving_parts(parts: AdminParts, addresses: list[str] | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Serves the admin service with these parts; yields a channel to it, and adds its address to `addresses`."""

    def register(server: grpc.aio.Server) -> None:
        add_TolariaAdminServiceServicer_to_server(AdminService(parts), server)

    async with (
        grpc_server(
            await bound_server("test", "127.0.0.1:0"), register, service_names=[SERVICE.full_name], grace_s=1.0
        ) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        if addresses is not None:
            addresses.append(str(server.address))
        yield channel


@asynccontextmanager
async def serving_run(run: RunUnderTest, addresses: list[str] | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Serves the admin service of a run, wired as in the service; yields a channel to it as `serving_parts` does."""
    async with anyio.create_task_group() as operations:
        parts = AdminParts(
            run=run.run,
            status=run.status,
            points=run.core.foundation.points,
            safety=run.safety,
            journal=run.journal,
            ledger=new_ledger(run.core, operations),
            audit=AuditTrail(run.journal, run.status),
            complete=lambda _status: None,
            closing=anyio.Event(),
            interval_s=60.0,
            state_dir=Path(run.core.foundation.settings.state.dir),
            telemetry=run.core.telemetry,
            reload=no_reload,
        )
        async with serving_parts(parts, addresses) as channel:
            yield channel
        operations.cancel_scope.cancel()


def stub_of(channel: grpc.aio.Channel) -> TolariaAdminServiceAsyncStub:
    """Returns a typed client of the channel."""
    return TolariaAdminServiceStub(channel)
