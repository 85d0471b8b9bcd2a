from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import add_TolariaAdminServiceServicer_to_server
from support.admin_model import FINISHED, HALTED, OPEN_METHODS, PAUSED, AdminModel, Outcome
from support.fuzz import messages, weighted, wire
from support.runs import FakePeers, RunUnderTest, new_run, running
from support.sessions import Taking, run_cases
from tolaria.config import ControlSettings
from tolaria.grpc_server import grpc_server
from tolaria.rpc.admin import AdminService
from tolaria.rpc.requests import RequestLedger
from tolaria.training.recovery.answers import JournaledAnswers
from tolaria.training.recovery.operators import RecoveryDesk
from tolaria.training.safety_desk import SafetyDesk

SERVICE = admin.DESCRIPTOR.services_by_name["TolariaAdminService"]
KINDS = {method.name: getattr(admin, method.input_type.name) for method in SERVICE.methods}
STREAMS = {method.name for method in SERVICE.methods if method.server_streaming}
# Half of the walk goes where most happens, and few of its steps to the end of the run.
BUSY = [name for name in KINDS if name not in {"StopTraining", "GetStatus", "WatchStatus", *OPEN_METHODS}]
METHODS = st.sampled_from([*BUSY * 6, *KINDS])
CASES_PER_RUN = 40
RATE_FLOOR, RATE_CEILING = 1e-8, 10.0


@dataclass(frozen=True)
class Step:
    """One request, sent `copies` times at once.

    `again`: rather than it the one that came so many steps before. `fresh`: its id is to be one that was never used.
    """

    method: str
    raw: bytes
    copies: int
    again: int
    fresh: bool

    @property
    def request(self) -> Any:
        """The request that the bytes are; None where they are none."""
        try:
            return KINDS[self.method].FromString(self.raw)
        except DecodeError:
            return None

    def numbered(self, number: int) -> Step:
        """With an id of its own, if it is to be fresh and is a request that has one."""
        request = self.request
        if not self.fresh or request is None or "request_id" not in request.DESCRIPTOR.fields_by_name:
            return self
        request.request_id = f"fresh-{number}"
        return replace(self, raw=request.SerializeToString())


def sensible_fields(method: str) -> dict[str, SearchStrategy[Any]]:
    """What gets a request of this method past the first checks; ids of few names, so that many come twice."""
    kind = f"{method}Request"
    prefix = "open" if method in OPEN_METHODS else "id"
    return {
        f"{kind}.request_id": st.sampled_from([f"{prefix}-{number}" for number in range(5)]),
        f"{kind}.reason": st.sampled_from(["look", "😀" * 60, "x" * 1024, "\x00", "a\nb"]),
        f"{kind}.level": st.sampled_from([1, 2, 3, 4, 4, 4, 4, 0, 5, -1]),
        f"{kind}.group": st.sampled_from(["", "host", "nobody"]),
        f"{kind}.factor": st.sampled_from([None, None, 0.5, 0.99, 1.01, 1.1, 1e300, 0.0, -1.0, math.nan]),
        f"{kind}.expires_after_steps": st.sampled_from([0, 1, 50, 2**64 - 1]),
    }


def steps_of(method: str) -> SearchStrategy[Step]:
    """Requests of one method: sensible, mad, or no request at all."""
    kind = KINDS[method]
    sensible = messages(kind, sensible_fields(method)).map(lambda message: message.SerializeToString())
    mad = messages(kind).map(lambda message: message.SerializeToString())
    raw = weighted((6, sensible), (1, mad), (1, wire(kind, sensible_fields(method))))
    again, fresh = st.sampled_from([0] * 7 + [1, 4, 9]), st.sampled_from([True, True, True, False])
    return st.builds(Step, st.just(method), raw, st.sampled_from([1, 1, 1, 3]), again, fresh)


STEPS = {method: steps_of(method) for method in KINDS}


class Client:
    """Sends bytes to a method, whatever they are."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def send(self, method: str, raw: bytes) -> Outcome:
        """What became of it; of a stream, up to its first message."""
        path = f"/{SERVICE.full_name}/{method}"
        try:
            if method in STREAMS:
                stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(path)
                call = stream(raw, timeout=0.2 if method in OPEN_METHODS else 10)
                async for first in call:
                    call.cancel()
                    return grpc.StatusCode.OK, first
                return grpc.StatusCode.OK, b""
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(path)
            return grpc.StatusCode.OK, await unary(raw, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code(), b""

    async def send_at_once(self, step: Step) -> list[Outcome]:
        """All copies of a step."""
        outcomes: list[Outcome] = []

        async def send() -> None:
            outcomes.append(await self.send(step.method, step.raw))

        async with anyio.create_task_group() as tasks:
            for _ in range(step.copies):
                tasks.start_soon(send)
        return outcomes

    async def status(self) -> admin.GetStatusResponse:
        """How the run stands."""
        code, raw = await self.send("GetStatus", b"")
        assert code is grpc.StatusCode.OK, code
        return admin.GetStatusResponse.FromString(raw)

    async def ask(self, method: str, request_id: str) -> Outcome:
        """A request that makes sense."""
        return await self.send(method, KINDS[method](request_id=request_id, reason="x").SerializeToString())


@asynccontextmanager
async def served_run() -> AsyncIterator[tuple[RunUnderTest, Client]]:
    """A run that trains, behind the service on loopback; no emergency of it goes away by itself."""
    control = ControlSettings(boundary_budget_ms=30_000, tamiyo_budget_ms=20_000)
    run = new_run(
        FakePeers(),
        job="StandingJob",
        epochs=10**6,
        control=control,
        sections={
            "emergency": {"recovery_epochs": 10**9},
            "rollback": {"automatic": False, "halt_on_deadline": False, "fast_budget_s": 10.0},
        },
    )

    def register(server: grpc.aio.Server) -> None:
        service = AdminService(
            run.loop,
            safety=SafetyDesk(run.loop, run.guardian),
            complete=lambda _status: None,
            closing=anyio.Event(),
            interval_s=60.0,
            ledger=RequestLedger(1000, JournaledAnswers(run.parts.archive, run.progress)),
            recovery=RecoveryDesk(run.loop, run.parts.archive, run.parts.link.points),
        )
        add_TolariaAdminServiceServicer_to_server(service, server)

    async with (
        running(run),
        grpc_server("test", "127.0.0.1:0", register, service_names=[SERVICE.full_name], grace_s=1.0) as server,
        grpc.aio.insecure_channel(str(server.address)) as channel,
    ):
        await run.until(lambda: run.progress.global_step > 0)
        yield run, Client(channel)


@asynccontextmanager
async def walk() -> AsyncIterator[Taking[Step]]:
    """Takes one step after the other beside the model; afterwards training goes on as if nothing had been."""
    async with served_run() as (run, client):
        model, before, taken = AdminModel(), await client.status(), list[Step]()

        async def take(step: Step) -> None:
            nonlocal before
            step = taken[-step.again] if 0 < step.again <= len(taken) else step.numbered(len(taken))
            taken.append(step)
            outcomes = await client.send_at_once(step)
            await run.until(lambda: not run.loop.rollbacks.running)
            status = await client.status()
            agree(model, step, outcomes, status)
            stands_still(before, status)
            before = status

        yield take
        await goes_on(run, client)


def agree(model: AdminModel, step: Step, outcomes: list[Outcome], status: admin.GetStatusResponse) -> None:
    """The model allows every outcome, and stands where the run stands."""
    problem = ""
    for outcome in outcomes:
        allowed = model.allowed(step.method, step.request)
        assert outcome[0] in allowed, f"{step.method} got {outcome[0]}, not of {allowed}: {step.request}"
        problem = model.took(step.method, step.request, outcome, status)
    assert not problem, f"{problem}, after {step.method}: {step.request}"
    assert all(RATE_FLOOR <= rate <= RATE_CEILING or rate == 0.0 for rate in status.learning_rates.values())


def stands_still(before: admin.GetStatusResponse, after: admin.GetStatusResponse) -> None:
    """Steps only go up, and not while the run is held or over; but for rollbacks."""
    if after.rollbacks > before.rollbacks:
        return
    assert after.global_step >= before.global_step
    if after.state == before.state and after.state in {PAUSED, HALTED, FINISHED}:
        assert after.global_step == before.global_step


async def goes_on(run: RunUnderTest, client: Client) -> None:
    """The emergency is cleared, the run resumed, and it trains; unless it was stopped."""
    status = await client.status()
    if status.state != FINISHED:
        if status.emergency_level:
            assert (await client.ask("ClearEmergency", "last-1"))[0] is grpc.StatusCode.OK
        assert (await client.ask("ResumeTraining", "last-2"))[0] is grpc.StatusCode.OK
        await run.until(lambda: run.progress.global_step > status.global_step)
        assert (await client.ask("StopTraining", "last-3"))[0] is grpc.StatusCode.OK
    assert run.state == "FINISHED"


def test_no_request_breaks_the_service_and_a_model_agrees(fuzz_cases: int) -> None:
    """Mad, repeated, simultaneous requests: no INTERNAL, no UNKNOWN; the run stands where a model says it does."""
    steps = METHODS.flatmap(lambda method: STEPS[method])
    run_cases(steps, walk, count=fuzz_cases, session_length=CASES_PER_RUN)


def test_a_method_that_is_not_there_is_unimplemented() -> None:
    """Whatever its name and bytes."""

    async def send() -> None:
        async with served_run() as (_, client):
            for method in ("NoSuchMethod", "getstatus", "é", "GetStatus/"):
                assert (await client.send(method, b"\xff"))[0] is grpc.StatusCode.UNIMPLEMENTED
            await client.ask("StopTraining", "1")

    anyio.run(send)
