"""Consultations: Tamiyo is asked, its command verified, Kasmina told; one at a time, whoever waits or not.

Owns the conversation with both peers. Must not know when it happens or what is done with its outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_SEED, CommandType, SeedOperation
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.errors import BreakerOpenError, CommandRejectedError, PeerError, PeerProtocolError
from tolaria.peers.kasmina import Applied
from tolaria.peers.verification import CommandVerifier
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter

NOT_ASKED = "not asked (conservative mode)"


class Controller(Protocol):
    """Tamiyo, as far as a consultation goes."""

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """The command for this state, not verified; None: go on."""

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        """The same between epochs."""


class Executor(Protocol):
    """Kasmina, as far as a consultation goes."""

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> Applied:
        """Carry a verified seed command out."""

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """The desired seeds for this state, after wishes that could not be met."""


@dataclass(slots=True)
class Consultation:
    """One question and what came of it. Words are for people; `seeds` is None where Kasmina said nothing valid."""

    state: SystemStatePacket
    refusals: tuple[tuple[str, str], ...] = ()
    between_epochs: bool = False
    command: AdaptationCommand | None = None
    seeds: list[SeedState] | None = None
    applied: bool = False
    rejection: CommandRejectedError | None = None
    failed: bool = False
    tamiyo_answer: str = NOT_ASKED
    kasmina_answer: str = NOT_ASKED
    tamiyo_latency_ms: float = 0.0
    kasmina_latency_ms: float = 0.0
    answered: anyio.Event = field(default_factory=anyio.Event)
    settled: anyio.Event = field(default_factory=anyio.Event)


class Consultant:
    """Holds consultations, one after the other. While one is held the newest question waits and older ones are dropped.

    Args:
        controller: whom to ask.
        executor: whom to tell.
        verifier: what a command has to pass.
        emitter: for events.
        permits: whether a peer, by name, may be asked now; one that may not is passed over.
        on_settled: called on the event loop with each consultation that has come to its end.
    """

    def __init__(
        self,
        *,
        controller: Controller,
        executor: Executor,
        verifier: CommandVerifier,
        emitter: Emitter,
        permits: Callable[[str], bool],
        on_settled: Callable[[Consultation], None],
    ) -> None:
        self._controller = controller
        self._executor = executor
        self._verifier = verifier
        self._emitter = emitter
        self._permits = permits
        self._on_settled = on_settled
        self._waiting: Consultation | None = None
        self._asked = anyio.Event()

    def ask(self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...] = ()) -> Consultation:
        """Put a question. Its events tell when Tamiyo has answered and when all is settled.

        `refusals` are Kasmina's wishes, by seed, that could not be met, and why.
        """
        self._waiting = Consultation(state, refusals)
        self._asked.set()
        return self._waiting

    def ask_between_epochs(self, state: SystemStatePacket) -> None:
        """Put a question that nobody waits for. An epoch's question that waits already comes first: this is dropped."""
        if self._waiting is None or self._waiting.between_epochs:
            self._waiting = Consultation(state, between_epochs=True)
            self._asked.set()

    async def serve(self) -> None:
        """Hold consultations until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            consultation, self._waiting = self._waiting, None
            if consultation is not None:
                await self._hold(consultation)

    async def _hold(self, consultation: Consultation) -> None:
        if self._permits("tamiyo"):
            await self._ask_tamiyo(consultation)
        consultation.answered.set()
        # Asked again: Tamiyo's answer, or the lack of one, may have switched the mode.
        # Between epochs she is only told of commands: she judges how seeds come along by epochs.
        told = not consultation.between_epochs or _is_for_kasmina(consultation.command)
        if told and self._permits("kasmina"):
            await self._tell_kasmina(consultation)
        self._on_settled(consultation)
        consultation.settled.set()

    async def _ask_tamiyo(self, consultation: Consultation) -> None:
        started_s = time.monotonic()
        try:
            evaluate = self._controller.evaluate_epoch
            if consultation.between_epochs:
                evaluate = self._controller.evaluate_step
            command = await evaluate(consultation.state)
            consultation.tamiyo_answer = "no change"
            if command is not None:
                self._verifier.verify(command, wall_s=time.time(), now_s=time.monotonic())
                consultation.command = command
                consultation.tamiyo_answer = in_words(command)
        except CommandRejectedError as rejection:
            consultation.rejection = rejection
            consultation.tamiyo_answer = f"rejected: {rejection.reason}"
        except PeerError as error:
            # The conservative command: no change. Training goes on.
            consultation.failed |= not isinstance(error, BreakerOpenError)  # then she was not asked
            consultation.tamiyo_answer = f"no change ({error.detail})"
        consultation.tamiyo_latency_ms = (time.monotonic() - started_s) * 1000

    async def _tell_kasmina(self, consultation: Consultation) -> None:
        started_s = time.monotonic()
        try:
            applied = await self._hand_over(consultation)
            # Asked at every boundary, command or not: this is when Kasmina judges how seeds come along.
            if not consultation.between_epochs:
                consultation.seeds = await self._executor.export_seeds(consultation.state, consultation.refusals)
            consultation.kasmina_answer = applied or _count(consultation.seeds or ())
        except PeerError as error:
            consultation.failed |= not isinstance(error, BreakerOpenError)
            consultation.kasmina_answer = f"no answer ({error.detail})"
            if isinstance(error, PeerProtocolError):
                self._emitter.emit(
                    events.KASMINA_ERROR, method="answer", detail=error.detail, latency_ms=_since_ms(started_s)
                )
        consultation.kasmina_latency_ms = _since_ms(started_s)

    async def _hand_over(self, consultation: Consultation) -> str:
        """Give a seed command to Kasmina; her answer in words, empty where there was no such command."""
        command = consultation.command
        if command is None or not _is_for_kasmina(command):
            return ""
        applied = await self._executor.apply(command, consultation.state)
        consultation.seeds = applied.seeds
        consultation.applied = applied.applied
        return f"{'applied' if applied.applied else 'refused'}: {applied.detail}"


def _is_for_kasmina(command: AdaptationCommand | None) -> bool:
    return command is not None and command.command_type == COMMAND_SEED


def in_words(command: AdaptationCommand) -> str:
    """A command as people read it."""
    name = CommandType.Name(command.command_type).removeprefix("COMMAND_").lower()
    if command.command_type == COMMAND_SEED:
        operation = SeedOperation.Name(command.seed_operation.operation).removeprefix("SEED_OP_").lower()
        return " ".join(
            word for word in (operation, command.target_seed_id, command.seed_operation.blueprint_id) if word
        )
    return name


def _count(seeds: Sequence[SeedState]) -> str:
    return "1 seed desired" if len(seeds) == 1 else f"{len(seeds)} seeds desired"


def _since_ms(started_s: float) -> float:
    return (time.monotonic() - started_s) * 1000
