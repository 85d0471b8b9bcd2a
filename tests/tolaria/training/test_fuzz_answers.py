from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import grpc
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from leyline.v1.commands_pb2 import (
    AdaptationCommand,
    CommandCircuitBreaker,
    CommandOptimizerAdjustment,
    CommandSeedOperation,
)
from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, SeedLifecycleStage
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse, ExportSeedStatesResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochResponse
from support.fuzz import messages, weighted, wire
from support.raw_peers import Answer, RawPeers
from support.runs import RunUnderTest, new_run, running
from support.sessions import Taking, run_cases
from tolaria.config import ControlSettings
from tolaria.emergency import Clearer
from tolaria.peers.signing import NonceTable, sign
from tolaria.peers.verification import REJECTION_REASONS, CommandVerifier, Trust
from tolaria.training.consult import Consultation

CASES_PER_RUN = 40
SECRET = b"key"
RATE_FLOOR, RATE_CEILING = 1e-8, 0.06
REASONS = {*REJECTION_REASONS, "refused", "conservative", "unsupported", "late"}
OWN_BREAKERS = ("boundary", "lr_integrity", "optimizer")

# What gets a command past the first checks, most of the time.
SENSE: dict[str, SearchStrategy[Any]] = {
    "AdaptationCommand.version": st.sampled_from([1] * 9 + [0, 2]),
    "AdaptationCommand.command_id": st.sampled_from(["one", "two", "three", "", "𝔘" * 50]),
    "AdaptationCommand.execution_deadline_ms": st.sampled_from([0, 0, 0, 1, 60_000, 2**32 - 1]),
    "AdaptationCommand.issued_by": st.sampled_from(["", "tamiyo", "x" * 300] * 6 + ["x" * 70_000]),
    "AdaptationCommand.annotations": st.dictionaries(
        st.sampled_from(["reason", "signature", "x"]), st.text(max_size=9)
    ).flatmap(
        lambda others: st.builds(
            dict,
            st.just(others),
            breaker=st.sampled_from(["tamiyo", "optimizer", "lr_integrity", "nobody"]),
            level=st.sampled_from(["halt", "2", "EMERGENCY_LEVEL_CONSERVATIVE", "notice", "9", "", "é"]),
        )
    ),
    "CommandOptimizerAdjustment.optimizer_id": st.sampled_from(["", "host", "seed:a", "nobody"]),
    "CommandOptimizerAdjustment.hyperparameters": st.dictionaries(
        st.sampled_from(["lr", "lr_factor", "lr_expires_after_steps", "momentum", "momentum", "beta1", ""]),
        st.one_of(st.sampled_from([0.5, 0.01, 1.0, 0.0, 3e38, -1.0]), st.floats(width=32)),
        max_size=2,
    ),
    "CommandSeedOperation.operation": st.sampled_from([1, 2, 3, 7, 8, 9, 0, 77]),
    "CommandSeedOperation.parameters": st.sampled_from([{}, {}, {}, {"alpha": 1.0}, {"alpha": math.nan}]),
    "CommandCircuitBreaker.desired_state": st.sampled_from([0, 1, 2, 2, 3, 7]),
}
# Seeds that can live, mostly, and a few of which one thing cannot be meant.
SEED_SENSE: dict[str, SearchStrategy[Any]] = {
    "SeedState.seed_id": st.sampled_from(["a", "a", "b", "c"]),
    "SeedState.stage": st.sampled_from([2, 3, 3, 4, 4, 4, 6, 6, 7, 8, 11]),
    "SeedState.blueprint_id": st.sampled_from(["residual_mlp"] * 6 + ["", "lora", "depthwise_conv_adapter", "x"]),
    "SeedState.slot": st.sampled_from(["middle"] * 5 + ["", "nowhere"]),
    "SeedState.alpha": st.one_of(
        st.none(),
        st.builds(
            dict,
            start=st.sampled_from([0.0] * 6 + [1.0, -1.0]),
            end=st.sampled_from([1.0, 1.0, 0.5, 2.0]),
            begin_step=st.sampled_from([0, 5, 2**64 - 1]),
            duration_steps=st.sampled_from([0, 1, 3, 2**64 - 1]),
        ),
    ),
    "SeedState.gradient_norm": st.just(0.0),
    "SeedState.learning_rate": st.just(0.0),
    "SeedState.attribution": st.sampled_from([0.0] * 5 + [0.5, -1.0, 3e38]),
    "SeedState.risk_score": st.just(0.0),
    "SeedState.metrics": st.sampled_from([{}, {}, {"alpha": 0.25}, {"alpha": 9.0}]),
}
SEED_NONSENSE = SEED_SENSE | {
    "SeedState.seed_id": st.sampled_from(["a.b", "", "keys", "forward", "__class__", "_modules", "x" * 300, "\0", "é/"]),
    "SeedState.stage": st.sampled_from([*SeedLifecycleStage.values(), 77, -1]),
    "SeedState.learning_rate": st.sampled_from([0.0, 0.0, 0.0, math.inf]),
    "SeedState.metrics": st.sampled_from([{}, {}, {}, {"": math.nan}]),
}
SEEDS = st.lists(
    weighted((12, messages(SeedState, SEED_SENSE)), (1, messages(SeedState, SEED_NONSENSE))), max_size=3
)
KASMINAS = {"ApplyCommandResponse.seeds": SEEDS, "ExportSeedStatesResponse.seeds": SEEDS}

# The payload that goes with each type of command; of no matter for the others.
PAYLOADS: dict[int, tuple[str, type[Message]]] = {
    1: ("seed_operation", CommandSeedOperation),
    3: ("optimizer_adjustment", CommandOptimizerAdjustment),
    4: ("circuit_breaker", CommandCircuitBreaker),
}


def commands(kind: int) -> SearchStrategy[AdaptationCommand]:
    """Commands of one type, with its payload."""
    fixed: dict[str, SearchStrategy[Any]] = {"AdaptationCommand.command_type": st.just(kind)}
    if kind in PAYLOADS:
        name, payload = PAYLOADS[kind]
        fixed |= {f"AdaptationCommand.{other}": st.none() for other, _ in PAYLOADS.values()}
        fixed |= {"AdaptationCommand.rollback_payload": st.none()}
        fixed |= {f"AdaptationCommand.{name}": messages(payload, SENSE)}
    return messages(AdaptationCommand, SENSE | fixed)


@dataclass(frozen=True)
class Meant:
    """A command that is dated, signed and, if it is to be `fresh`, numbered as it is sent."""

    command: AdaptationCommand
    age_s: float | None
    signature: Literal["right", "wrong", "none"]
    fresh: bool

    def sent(self) -> EvaluateEpochResponse:
        """The answer that carries it. Without an age, its date is what was made up."""
        made = AdaptationCommand()
        made.CopyFrom(self.command)
        if self.fresh:
            made.command_id = uuid.uuid4().hex
        if self.age_s is not None:
            made.issued_at.FromNanoseconds(time.time_ns() - int(self.age_s * 1e9))
        if self.signature != "none":
            sign(made, SECRET if self.signature == "right" else b"another")
        return EvaluateEpochResponse(command=made)

    @property
    def doomed(self) -> bool:
        """Whether it must be refused, whatever else there is to it; signatures apart."""
        good_type = 0 < self.command.command_type < 7
        fresh = self.age_s is not None and abs(self.age_s) < 60
        undated = self.age_s is None and not self.command.HasField("issued_at")
        return (
            self.command.version != 1
            or not (self.command.command_id or self.fresh)
            or not good_type
            or undated
            or (self.age_s is not None and not fresh)
            or len(self.command.issued_by) > 64 * 1024
        )


@dataclass(frozen=True)
class Case:
    """What each method answers in one consultation; `late`: training has moved on too far when it settles."""

    tamiyo: Meant | Answer
    apply: Answer
    export: Answer
    late: bool


def _errors() -> SearchStrategy[Answer]:
    return st.sampled_from([grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED])


def _raw(kind: type[Message], sense: int) -> SearchStrategy[Answer]:
    sensible = messages(kind, KASMINAS).map(lambda message: message.SerializeToString())
    mad = messages(kind).map(lambda message: message.SerializeToString())
    return weighted((sense, sensible), (1, mad), (1, wire(kind, KASMINAS)), (1, _errors()))


MEANT = st.builds(
    Meant,
    weighted(*[(2 if kind in PAYLOADS else 1, commands(kind)) for kind in (1, 2, 3, 4, 5, 6, 7, 0, 99)]),
    st.sampled_from([0.0] * 12 + [59.0, 61.0, -59.0, -61.0, 1e9, None]),
    st.sampled_from(["right"] * 6 + ["wrong", "none"]),
    st.sampled_from([True] * 5 + [False]),
)
CASES = st.builds(
    Case,
    weighted((6, MEANT), (1, _raw(EvaluateEpochResponse, 0))),
    _raw(ApplyCommandResponse, 8),
    _raw(ExportSeedStatesResponse, 8),
    st.sampled_from([False] * 5 + [True]),
)


@dataclass(frozen=True)
class Picture:
    """All that answers could change, at one moment of a run that stands."""

    host: bytes
    global_step: int
    seeds: tuple[bytes, ...]
    controls: tuple[object, ...]
    applied: float
    rejected: dict[str, float]

    @classmethod
    def of(cls, run: RunUnderTest) -> Picture:
        """Taken while the lane stands."""
        rig: Any = run.rig
        (host,) = (group for group in rig.optimizer.param_groups if group["name"] == "host")
        named = [p for name, p in rig.model.named_parameters() if ".seeds." not in name]
        counted = {"applied": 0.0}
        rejected: dict[str, float] = {}
        for metric in run.metrics.registry.collect():
            for sample in metric.samples:
                if sample.name == "tolaria.command.rejected_total":
                    rejected[sample.labels["reason"]] = sample.value
                elif sample.name == "tolaria.command.applied_total":
                    counted["applied"] += sample.value
        breakers = run.safeguards.breakers
        return cls(
            host=b"".join(p.detach().numpy().tobytes() for p in named),
            global_step=rig.global_step,
            seeds=tuple(s.SerializeToString(deterministic=True) for s in rig.growth.topology.states(rig.global_step)),
            controls=(
                host["lr"],
                host["momentum"],
                rig.growth.controller.living,
                run.state,
                run.guardian.controller.state.level,
                tuple(breakers[name].state for name in OWN_BREAKERS),
                tuple(reason for reason in run.safeguards.mode.reasons if reason != "epoch_failed:peer_failure"),
            ),
            applied=counted["applied"],
            rejected=rejected,
        )


class Talk:
    """One run and its lying peers, one consultation after the other while the lane stands."""

    def __init__(self, run: RunUnderTest, peers: RawPeers, *, signed: bool) -> None:
        self.run, self.peers, self.signed = run, peers, signed
        self._done: set[str] = set()
        self._held = 0
        if signed:
            trust = Trust(secrets=(SECRET,))
            run.loop.consultant._verifier = CommandVerifier(trust, NonceTable(window_s=300.0))

    async def hold(self, case: Case) -> None:
        """Consult, and see that what was refused has changed nothing."""
        answer, response = _answered(case.tamiyo)
        self.peers.answers = {"EvaluateEpoch": answer, "ApplyCommand": case.apply, "ExportSeedStates": case.export}
        before = Picture.of(self.run)
        consultation = await self._consult(behind=case.late)
        self.peers.answers = {}
        after = Picture.of(self.run)
        delivered = response is not None and response.HasField("command")
        self._agree(case, consultation, (before, after), delivered=delivered)
        if response is not None and after.applied > before.applied:
            assert response.command.command_id not in self._done, "a replay was carried out"
            self._done.add(response.command.command_id)
        await self._mend()
        self._held += 1
        if self._held % 10 == 0:
            await self.rest()

    async def rest(self) -> None:
        """Training goes on, and is held again, with nothing on its way."""
        step = self.run.progress.global_step
        self.run.loop.resume("on")
        await self.run.until(lambda: self.run.progress.global_step > step)
        await self.pause()

    async def pause(self) -> None:
        """Held, with the last boundary's consultation over."""
        await self.run.loop.pause("look")
        # A boundary that was about to ask does so now, and is heard: a newer question would take its place.
        await anyio.wait_all_tasks_blocked()
        await self.run.until(lambda: self.run.loop.consultant._waiting is None)
        await self._consult(behind=False)

    def _agree(
        self, case: Case, consultation: Consultation, pictures: tuple[Picture, Picture], *, delivered: bool
    ) -> None:
        before, after = pictures
        assert (after.host, after.global_step) == (before.host, before.global_step)
        new = {reason for reason, count in after.rejected.items() if count > before.rejected.get(reason, 0)}
        applied = after.applied - before.applied
        assert applied + sum(after.rejected.values()) - sum(before.rejected.values()) == delivered, consultation
        assert new <= REASONS
        if not applied:
            assert after.controls == before.controls, consultation
        if case.late or consultation.seeds is None:
            assert after.seeds == before.seeds
        if isinstance(case.tamiyo, Meant):
            forged = self.signed and case.tamiyo.signature != "right"
            assert not (applied and (case.late or forged or case.tamiyo.doomed)), case
            assert not forged or new <= {"unsigned", "oversized"}
        rate, momentum = after.controls[0], after.controls[1]
        assert isinstance(rate, float)
        assert rate == 0.0 or RATE_FLOOR <= rate <= RATE_CEILING
        assert isinstance(momentum, float)
        assert 0.0 <= momentum < 1.0

    async def _consult(self, *, behind: bool) -> Consultation:
        step = self.run.progress.global_step - behind
        consultation = self.run.loop.consultant.ask(SystemStatePacket(current_epoch=1, global_step=step))
        with anyio.fail_after(10):
            await consultation.settled.wait()
        await self.run.until(lambda: not self.run.loop._desk._on_done)
        assert self.run.state in {"PAUSED", "HALTED"}
        return consultation

    async def _mend(self) -> None:
        """What an operator does: breakers closed, emergency cleared, mode off, and a halted run resumed."""
        safeguards, controller = self.run.safeguards, self.run.guardian.controller
        for name in safeguards.breakers:
            safeguards.force(name, CIRCUIT_STATE_CLOSED)
        if controller.state.level:
            controller.clear("fine", "operator", by=Clearer.OPERATOR)
        safeguards.mode.force_off()
        assert not safeguards.mode.on
        if self.run.state == "HALTED":
            await self.rest()


def _answered(tamiyo: Meant | Answer) -> tuple[Answer, EvaluateEpochResponse | None]:
    """What Tamiyo sends, and what can be read of it."""
    if isinstance(tamiyo, Meant):
        sent = tamiyo.sent()
        return sent.SerializeToString(), sent
    if isinstance(tamiyo, grpc.StatusCode):
        return tamiyo, None
    try:
        return tamiyo, EvaluateEpochResponse.FromString(tamiyo)
    except DecodeError:
        return tamiyo, None


@asynccontextmanager
async def talk(*, signed: bool) -> AsyncIterator[Taking[Case]]:
    """A run that takes case after case; at its end it trains on and was never failed."""
    peers = RawPeers()
    control = ControlSettings(boundary_budget_ms=30_000, tamiyo_budget_ms=20_000, max_staleness_steps=0)
    lasting = {"recovery_epochs": 10**9, "failed_epochs_max": 10**9}
    run = new_run(
        peers,
        job="StandingJob",
        epochs=10**6,
        control=control,
        sections={"emergency": lasting, "optimizer": {"lr_ceiling": RATE_CEILING}},
    )
    async with peers.connected(run.safeguards), running(run):
        await run.until(lambda: run.progress.global_step > 1)
        spoken = Talk(run, peers, signed=signed)
        await spoken.pause()
        yield spoken.hold
        await spoken.rest()
        await run.loop.stop("enough")
        assert run.state == "FINISHED"


def test_no_answer_breaks_the_run_and_the_refused_change_nothing(fuzz_cases: int) -> None:
    """Mad commands, seeds, bytes, errors: each command is applied once or counted by reason, and only that."""
    run_cases(CASES, lambda: talk(signed=False), count=fuzz_cases // 2, session_length=CASES_PER_RUN)


def test_with_a_secret_nothing_unsigned_changes_anything(fuzz_cases: int) -> None:
    """The same, where commands have to be signed."""
    run_cases(CASES, lambda: talk(signed=True), count=fuzz_cases // 2, session_length=CASES_PER_RUN)
