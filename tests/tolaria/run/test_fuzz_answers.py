from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
import grpc
from google.protobuf.message import DecodeError
from pydantic import SecretStr

from leyline.v1.enums_pb2 import CIRCUIT_STATE_CLOSED
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochResponse
from support.made_answers import CASES, SECRET, Case, SentCommand
from support.raw_peers import Answer, RawPeers
from support.runs import RunUnderTest, new_run, running
from support.sessions import Taking, run_cases
from tolaria.config import ControlSettings, LeylineSettings
from tolaria.emergency import Clearer
from tolaria.peers.consultation import Consultation
from tolaria.peers.verification import REJECTION_REASONS, CommandVerifier

CASES_PER_RUN = 40
RATE_FLOOR, RATE_CEILING = 1e-8, 0.06
REASONS = {*REJECTION_REASONS, "refused", "conservative", "unsupported", "late"}
OWN_BREAKERS = ("boundary", "lr_integrity", "optimizer")


@dataclass(frozen=True)
class Picture:
    """All that answers could change, at one moment of a run that stands."""

    host: bytes
    global_step: int
    rollbacks: int
    seeds: tuple[bytes, ...]
    controls: tuple[object, ...]
    applied: float
    rejected: dict[str, float]

    @classmethod
    def of(cls, run: RunUnderTest) -> Picture:
        """Taken while the lane stands."""
        rig: Any = run.module
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
            rollbacks=run.status.rollbacks,
            seeds=tuple(s.SerializeToString(deterministic=True) for s in rig.growth.topology.states(rig.global_step)),
            controls=(
                host["lr"],
                host["momentum"],
                host["weight_decay"],
                rig.growth.controller.adjustments,
                run.state,
                run.safety.controller.state.level,
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
        self._last = b""
        self._held = 0
        if signed:
            leyline = LeylineSettings(secret=SecretStr(SECRET.decode()))
            run.consultations._verifier = CommandVerifier(leyline)

    async def hold(self, case: Case) -> None:
        """Consult, and see that what was refused has changed nothing."""
        if case.replayed and self._last:
            case = replace(case, tamiyo=self._last)
        if not self.run.status.global_step:  # gone back to where it began: no state is older
            case = replace(case, late=False)
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
            self._last = response.SerializeToString()
        await self._mend()
        self._held += 1
        if self._held % 10 == 0:
            await self.rest()

    async def rest(self) -> None:
        """Training goes on, and is held again, with nothing on its way."""
        step = self.run.status.global_step
        self.run.run.resume("on")
        await self.run.until(lambda: self.run.status.global_step > step)
        await self.pause()

    async def pause(self) -> None:
        """Held, with the last boundary's consultation over."""
        await self.run.run.pause("look")
        # A boundary that was about to ask does so now, and is heard: a newer question would take its place.
        await anyio.wait_all_tasks_blocked()
        await self.run.until(lambda: self.run.consultations._waiting is None)
        await self._consult(behind=False)

    def _agree(
        self, case: Case, consultation: Consultation, pictures: tuple[Picture, Picture], *, delivered: bool
    ) -> None:
        before, after = pictures
        back = after.rollbacks > before.rollbacks  # which a command may ask for, and an emergency that one raises
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
        rate, momentum, decay = (float(str(value)) for value in after.controls[:3])
        assert rate == 0.0 or RATE_FLOOR <= rate <= RATE_CEILING
        assert 0.0 <= momentum < 1.0
        assert 0.0 <= decay <= 10.0

    async def _consult(self, *, behind: bool) -> Consultation:
        step = self.run.status.global_step - behind
        consultation = self.run.consultations.ask(SystemStatePacket(current_epoch=1, global_step=step))
        with anyio.fail_after(10):
            await consultation.settled.wait()
        await self.run.until(lambda: not self.run.recovery.running)
        await self.run.until(lambda: not self.run.core.link.desk._on_done)
        assert self.run.state in {"PAUSED", "HALTED"}
        return consultation

    async def _mend(self) -> None:
        """What an operator does: breakers closed, emergency cleared, mode off, and a halted run resumed."""
        safeguards, controller = self.run.safeguards, self.run.safety.controller
        for name in safeguards.breakers:
            safeguards.force(name, CIRCUIT_STATE_CLOSED)
        if controller.state.level:
            controller.clear("fine", "operator", by=Clearer.OPERATOR)
        safeguards.mode.force_off()
        assert not safeguards.mode.on
        if self.run.state == "HALTED":
            await self.rest()


def _answered(tamiyo: SentCommand | Answer) -> tuple[Answer, EvaluateEpochResponse | None]:
    """What Tamiyo sends, and what can be read of it."""
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
        await run.until(lambda: run.status.global_step > 1)
        spoken = Talk(run, peers, signed=signed)
        await spoken.pause()
        yield spoken.hold
        await spoken.rest()
        await run.run.stop("enough")
        assert run.state == "FINISHED"


def test_no_answer_breaks_the_run_and_the_refused_change_nothing(fuzz_cases: int) -> None:
    """Mad commands, seeds, bytes, errors: each command is applied once or counted by reason, and only that."""
    run_cases(CASES, lambda: talk(signed=False), count=fuzz_cases // 2, session_length=CASES_PER_RUN)


def test_with_a_secret_nothing_unsigned_changes_anything(fuzz_cases: int) -> None:
    """The same, where commands have to be signed."""
    run_cases(CASES, lambda: talk(signed=True), count=fuzz_cases // 2, session_length=CASES_PER_RUN)
