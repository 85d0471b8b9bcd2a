"""Fuzzed answers of Tamiyo and Kasmina: each command is applied once or counted by reason, and nothing else changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import cast

import anyio
import grpc
from google.protobuf.message import DecodeError

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED, EMERGENCY_LEVEL_NOTICE
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochResponse
from support.peer_answers import CASES, SECRET, Case, SentCommand
from support.raw_peers import Answer, RawPeers
from support.runs import RunUnderTest, new_run, running
from support.sessions import CaseHandler, run_cases
from tolaria.config import ControlSettings
from tolaria.emergency import Clearer
from tolaria.lane.messages import SkipBatches
from tolaria.peers.consultation import Consultation
from tolaria.peers.verification import REJECTION_REASONS

CASES_PER_RUN = 40
RATE_FLOOR, RATE_CEILING = 1e-8, 0.06
REASONS = {*REJECTION_REASONS, "refused", "conservative", "unsupported", "late", "rollback_budget"}
PEER_REASONS = ("epoch_failed:peer_failure", "breaker_open:tamiyo", "breaker_open:kasmina")
OWN_BREAKERS = ("boundary", "lr_integrity", "optimizer")


@dataclass(frozen=True)
class RunImage:
    """Everything that answers could change, at one moment of a held run."""

    host: bytes
    global_step: int
    rollbacks: int
    seeds: tuple[bytes, ...]
    controls: tuple[object, ...]
    applied: float
    rejected: dict[str, float]

    @classmethod
    def of(cls, run: RunUnderTest) -> RunImage:
        """Returns the image of a run whose lane is held."""
        module = run.module
        (host,) = (group for group in module.optimizer.param_groups if group["name"] == "host")
        named = [p for name, p in module.model.named_parameters() if ".seeds." not in name]
        applied = 0.0
        rejected: dict[str, float] = {}
        for metric in run.metrics.registry.collect():
            for sample in metric.samples:
                if sample.name == "tolaria.command.rejected_total":
                    rejected[sample.labels["reason"]] = sample.value
                elif sample.name == "tolaria.command.applied_total":
                    applied += sample.value
        breakers = run.safeguards.breakers
        return cls(
            host=b"".join(p.detach().numpy().tobytes() for p in named),
            global_step=module.global_step,
            rollbacks=run.status.rollbacks,
            seeds=tuple(
                s.SerializeToString(deterministic=True) for s in module.seeds.topology.states(module.global_step)
            ),
            controls=(
                host["lr"],
                host["momentum"],
                host["weight_decay"],
                module.seeds.controller.adjustments,
                run.state,
                _level_not_of_peers(run),
                tuple(breakers[name].state for name in OWN_BREAKERS),
                tuple(reason for reason in run.safeguards.mode.reasons if reason not in PEER_REASONS),
            ),
            applied=applied,
            rejected=rejected,
        )


class FuzzedRun:
    """A run whose peers answer as the cases say: one consultation after the other while the lane is held."""

    def __init__(self, run: RunUnderTest, peers: RawPeers, *, signed: bool) -> None:
        self.run, self.peers, self.signed = run, peers, signed
        self._done: set[str] = set()
        self._last = b""
        self._handled = 0

    async def handle(self, case: Case) -> None:
        """Holds a consultation and checks that what was rejected has changed nothing."""
        if case.replayed and self._last:
            case = replace(case, tamiyo=self._last)
        if not self.run.status.global_step:  # rolled back to its start: no state is older
            case = replace(case, late=False)
        answer, response = _answered(case.tamiyo)
        self.peers.answers = {"EvaluateEpoch": answer, "ApplyCommand": case.apply, "ExportSeedStates": case.export}
        before = RunImage.of(self.run)
        consultation = await self._consult(behind=case.late)
        self.peers.answers = {}
        after = RunImage.of(self.run)
        delivered = response is not None and response.HasField("command")
        self._check(case, consultation, (before, after), delivered=delivered)
        if response is not None and after.applied > before.applied:
            assert response.command.command_id not in self._done, "a replay was carried out"
            self._done.add(response.command.command_id)
            self._last = response.SerializeToString()
        await self._recover()
        self._handled += 1
        if self._handled % 10 == 0:
            await self.train()

    async def train(self) -> None:
        """Trains for at least one step, then holds the run again."""
        step = self.run.status.global_step
        await self.run.run.resume("on")
        await self.run.until(lambda: self.run.status.global_step > step)
        await self.pause()

    async def pause(self) -> None:
        """Holds the run and waits until the last boundary's consultation is over."""
        await self.run.run.pause("look")
        # A boundary that was about to ask does so now; a newer question would replace its own before that.
        await anyio.wait_all_tasks_blocked()
        await self._consult(behind=False)

    def _check(
        self, case: Case, consultation: Consultation, images: tuple[RunImage, RunImage], *, delivered: bool
    ) -> None:
        before, after = images
        back = after.rollbacks > before.rollbacks  # by a rollback command
        assert back or (after.host, after.global_step) == (before.host, before.global_step)
        new = {reason for reason, count in after.rejected.items() if count > before.rejected.get(reason, 0)}
        applied = after.applied - before.applied
        assert applied + sum(after.rejected.values()) - sum(before.rejected.values()) == delivered, consultation
        assert new <= REASONS
        assert applied or not back
        if not applied:
            assert after.controls == before.controls, consultation
        if (case.late or consultation.seeds is None) and not back:
            assert after.seeds == before.seeds
        if isinstance(case.tamiyo, SentCommand):
            forged = self.signed and case.tamiyo.signature != "right"
            assert not (applied and (case.late or forged or case.tamiyo.must_be_refused)), case
            assert not forged or new <= {"unsigned", "oversized"}
        rate, momentum, decay = cast("tuple[float, float, float]", after.controls[:3])
        assert rate == 0.0 or RATE_FLOOR <= rate <= RATE_CEILING
        assert 0.0 <= momentum < 1.0
        assert 0.0 <= decay <= 10.0

    async def _consult(self, *, behind: bool) -> Consultation:
        step = self.run.status.global_step - behind
        consultation = self.run.consultations.ask(SystemStatePacket(current_epoch=1, global_step=step))
        with anyio.fail_after(180):
            await consultation.settled.wait()
        await self.run.until(lambda: not self.run.recovery.running)
        await self.run.core.lane.call(SkipBatches(()))  # changes nothing, and follows all commands before it
        assert self.run.state in {"PAUSED", "HALTED"}
        return consultation

    async def _recover(self) -> None:
        """Closes breakers, clears the emergency, leaves the mode and resumes a halted run, as an operator would."""
        safeguards, controller = self.run.safeguards, self.run.safety.controller
        for name in safeguards.breakers:
            safeguards.force(name, CIRCUIT_STATE_CLOSED)
        if controller.state.level:
            controller.clear("fine", "operator", by=Clearer.OPERATOR)
        safeguards.mode.force_off()
        assert not safeguards.mode.on
        if self.run.state == "HALTED":
            await self.train()


def _level_not_of_peers(run: RunUnderTest) -> bool:
    """Returns whether anything but a failing peer has raised the level (a refusal for the budget fails her breaker)."""
    state = run.safety.controller.state
    return state.level > EMERGENCY_LEVEL_NOTICE and state.reason.replace(" ", "") not in PEER_REASONS


def _answered(tamiyo: SentCommand | Answer) -> tuple[Answer, EvaluateEpochResponse | None]:
    """Returns what Tamiyo sends, and the response that a client decodes from it, if any."""
    if isinstance(tamiyo, SentCommand):
        sent = tamiyo.sent()
        return sent.SerializeToString(), sent
    if isinstance(tamiyo, grpc.StatusCode):
        return tamiyo, None
    try:
        return tamiyo, EvaluateEpochResponse.FromString(tamiyo)
    except DecodeError:
        return tamiyo, None


@asynccontextmanager
async def fuzzed_run(*, signed: bool) -> AsyncIterator[CaseHandler[Case]]:
    """Yields what handles a case; at the end the run must still train and finish."""
    peers = RawPeers()
    control = ControlSettings(boundary_budget_ms=30_000, tamiyo_budget_ms=20_000, max_staleness_steps=0)
    lasting = {"recovery_epochs": 10**9, "failed_epochs_max": 10**9}
    run = new_run(
        peers,
        job="WithoutValidationJob",
        epochs=10**6,
        control=control,
        sections={
            "emergency": lasting,
            "optimizer": {"lr_ceiling": RATE_CEILING},
            **({"leyline": {"secret": SECRET.decode()}} if signed else {}),
        },
    )
    async with peers.serving(run.safeguards), running(run):
        await run.until(lambda: run.status.global_step > 1)
        fuzzed = FuzzedRun(run, peers, signed=signed)
        await fuzzed.pause()
        yield fuzzed.handle
        await fuzzed.train()
        await run.run.stop("enough")
        assert run.state == "FINISHED"


def test_rejected_answers_change_nothing(fuzz_cases: int) -> None:
    """Whatever commands, seeds, bytes and errors arrive: each command is applied once or counted by reason."""
    run_cases(CASES, lambda: fuzzed_run(signed=False), count=fuzz_cases // 2, session_length=CASES_PER_RUN)


def test_with_a_secret_unsigned_commands_change_nothing(fuzz_cases: int) -> None:
    """The same where commands must be signed."""
    run_cases(CASES, lambda: fuzzed_run(signed=True), count=fuzz_cases // 2, session_length=CASES_PER_RUN)
