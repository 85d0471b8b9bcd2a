"""Fuzzed requests to the admin service of a training run, whose answers are compared with a model."""

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
from support.admin import SERVICE, serving_run
from support.admin_model import FINISHED, HALTED, OPEN_METHODS, PAUSED, AdminModel, Outcome
from support.fuzz import messages, weighted, wire
from support.runs import FakePeers, RunUnderTest, new_run, running
from support.sessions import CaseHandler, run_cases
from tolaria.config import ControlSettings

# Without Shutdown, which ends the service: it has tests of its own.
KINDS = {method.name: getattr(admin, method.input_type.name) for method in SERVICE.methods if method.name != "Shutdown"}
STREAMS = {method.name for method in SERVICE.methods if method.server_streaming}
# Methods that change most are chosen most often, those that end the run rarely.
BUSY = [name for name in KINDS if name not in {"StopTraining", "GetStatus", "WatchStatus", *OPEN_METHODS}]
METHODS = st.sampled_from([*BUSY * 6, *KINDS])
CASES_PER_RUN = 40
RATE_FLOOR, RATE_CEILING = 1e-8, 10.0


@dataclass(frozen=True)
class Step:
    """One request, sent `copies` times at once.

    `again`: the request that came so many steps before is sent instead. `fresh`: the request gets an unused id.
    """

    method: str
    raw: bytes
    copies: int
    again: int
    fresh: bool

    @property
    def request(self) -> Any:
        """The parsed request; None if the bytes cannot be parsed."""
        try:
            return KINDS[self.method].FromString(self.raw)
        except DecodeError:
            return None

    def numbered(self, number: int) -> Step:
        """Returns the step with an unused id if it is fresh and its request has an id."""
        request = self.request
        if not self.fresh or request is None or "request_id" not in request.DESCRIPTOR.fields_by_name:
            return self
        request.request_id = f"fresh-{number}"
        return replace(self, raw=request.SerializeToString())


def plausible_fields(method: str) -> dict[str, SearchStrategy[Any]]:
    """Returns values with which a request passes the first checks; there are few ids, so that many repeat."""
    kind = f"{method}Request"
    prefix = "open" if method in OPEN_METHODS else "id"
    return {
        f"{kind}.request_id": st.sampled_from([f"{prefix}-{number}" for number in range(5)]),
        f"{kind}.reason": st.sampled_from(["look", "😀" * 60, "x" * 1024, "\x00", "a\nb"]),
        f"{kind}.level": st.sampled_from([1, 2, 3, 4, 4, 4, 4, 0, 5, -1]),
        f"{kind}.group": st.sampled_from(["", "host", "unknown"]),
        f"{kind}.factor": st.sampled_from([None, None, 0.5, 0.99, 1.01, 1.1, 1e300, 0.0, -1.0, math.nan]),
        f"{kind}.expires_after_steps": st.sampled_from([0, 1, 50, 2**64 - 1]),
    }


def steps_of(method: str) -> SearchStrategy[Step]:
    """Returns a strategy for steps of one method: plausible requests, arbitrary ones, and arbitrary bytes."""
    kind = KINDS[method]
    plausible = messages(kind, plausible_fields(method)).map(lambda message: message.SerializeToString())
    arbitrary = messages(kind).map(lambda message: message.SerializeToString())
    raw = weighted((6, plausible), (1, arbitrary), (1, wire(kind, plausible_fields(method))))
    again, fresh = st.sampled_from([0] * 7 + [1, 4, 9]), st.sampled_from([True, True, True, False])
    return st.builds(Step, st.just(method), raw, st.sampled_from([1, 1, 1, 3]), again, fresh)


STEPS = {method: steps_of(method) for method in KINDS}


class Client:
    """Sends arbitrary bytes to a method."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def send(self, method: str, raw: bytes) -> Outcome:
        """Returns the outcome; of a stream, the one up to its first message."""
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
        """Sends all copies of a step; returns their outcomes."""
        outcomes: list[Outcome] = []

        async def send() -> None:
            outcomes.append(await self.send(step.method, step.raw))

        async with anyio.create_task_group() as tasks:
            for _ in range(step.copies):
                tasks.start_soon(send)
        return outcomes

    async def status(self) -> admin.GetStatusResponse:
        """Returns the status of the run."""
        code, raw = await self.send("GetStatus", b"")
        assert code is grpc.StatusCode.OK, code
        return admin.GetStatusResponse.FromString(raw)

    async def ask(self, method: str, request_id: str) -> Outcome:
        """Sends a valid request."""
        return await self.send(method, KINDS[method](request_id=request_id, reason="x").SerializeToString())


@asynccontextmanager
async def served_run() -> AsyncIterator[tuple[RunUnderTest, Client]]:
    """Yields a training run behind the service on loopback; its emergencies are not cleared automatically."""
    control = ControlSettings(boundary_budget_ms=30_000, tamiyo_budget_ms=20_000)
    run = new_run(
        FakePeers(),
        job="WithoutValidationJob",
        epochs=10**6,
        control=control,
        sections={
            "emergency": {"recovery_epochs": 10**9},
            "rollback": {"automatic": False, "fast_budget_s": 10.0},
        },
    )
    async with running(run), serving_run(run) as channel:
        await run.until(lambda: run.status.global_step > 0)
        yield run, Client(channel)


@asynccontextmanager
async def fuzzed_run() -> AsyncIterator[CaseHandler[Step]]:
    """Yields what sends a step to the run and to the model; at the end the run must still train and finish."""
    async with served_run() as (run, client):
        model, before, sent = AdminModel(), await client.status(), list[Step]()

        async def send(step: Step) -> None:
            nonlocal before
            step = sent[-step.again] if 0 < step.again <= len(sent) else step.numbered(len(sent))
            sent.append(step)
            outcomes = await client.send_at_once(step)
            await run.until(lambda: not run.recovery.running)
            status = await client.status()
            check_model(model, step, outcomes, status)
            check_steps(before, status)
            before = status

        yield send
        await train_on(run, client)


def check_model(model: AdminModel, step: Step, outcomes: list[Outcome], status: admin.GetStatusResponse) -> None:
    """Checks that the model allows every outcome and ends in the state of the run."""
    problem = ""
    for outcome in outcomes:
        allowed = model.allowed(step.method, step.request)
        assert outcome[0] in allowed, f"{step.method} got {outcome[0]}, not of {allowed}: {step.request}"
        problem = model.apply(step.method, step.request, outcome, status)
    assert not problem, f"{problem}, after {step.method}: {step.request}"
    assert all(RATE_FLOOR <= rate <= RATE_CEILING or rate == 0.0 for rate in status.learning_rates.values())


def check_steps(before: admin.GetStatusResponse, after: admin.GetStatusResponse) -> None:
    """Checks that steps increase only while the run trains, and decrease in rollbacks only."""
    if after.rollbacks > before.rollbacks:
        return
    assert after.global_step >= before.global_step
    if after.state == before.state and after.state in {PAUSED, HALTED, FINISHED}:
        assert after.global_step == before.global_step


async def train_on(run: RunUnderTest, client: Client) -> None:
    """Clears the emergency, resumes the run, trains and stops it, unless it was stopped."""
    status = await client.status()
    if status.state != FINISHED:
        if status.emergency_level:
            assert (await client.ask("ClearEmergency", "last-1"))[0] is grpc.StatusCode.OK
        assert (await client.ask("ResumeTraining", "last-2"))[0] is grpc.StatusCode.OK
        await run.until(lambda: run.status.global_step > status.global_step)
        assert (await client.ask("StopTraining", "last-3"))[0] is grpc.StatusCode.OK
    assert run.state == "FINISHED"


def test_the_run_agrees_with_a_model(fuzz_cases: int) -> None:
    """Arbitrary, repeated and simultaneous requests: no INTERNAL, no UNKNOWN, and the state that the model has."""
    steps = METHODS.flatmap(lambda method: STEPS[method])
    run_cases(steps, fuzzed_run, count=fuzz_cases, session_length=CASES_PER_RUN)


def test_an_unknown_method_is_unimplemented() -> None:
    """Whatever its name and bytes are."""

    async def send() -> None:
        async with served_run() as (_, client):
            for method in ("NoSuchMethod", "getstatus", "é", "GetStatus/"):
                assert (await client.send(method, b"\xff"))[0] is grpc.StatusCode.UNIMPLEMENTED
            await client.ask("StopTraining", "1")

    anyio.run(send)
