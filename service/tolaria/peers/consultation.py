"""Consultations: Tamiyo is asked for a command, which is verified and sent to Kasmina; one consultation at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio

from leyline.v1 import enums_pb2 as enums
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import SeedsSettings
from tolaria.errors import BreakerOpenError, CommandRejectedError, PeerError, PeerProtocolError
from tolaria.peers.clients import KasminaClient, TamiyoClient
from tolaria.peers.verification import CommandVerifier, verify_growth
from tolaria.telemetry import events
from tolaria.telemetry.events import Emitter
from tolaria.values.spans import SpanContext, within

NOT_ASKED = "not asked (conservative mode)"
NOT_ENABLED = "not asked (seeds.enabled is off)"


@dataclass(slots=True)
class Consultation:
    """One question about a state, and its outcome. The events are set once Tamiyo has answered, and at the end.

    `refusals` are (seed_id, reason) of the desired seeds that were not realized. `command` is verified. `seeds` is None
    without a valid answer from Kasmina. `outdated`: a rollback has undone the state that was asked about. `span` is
    that of the boundary or epoch, to which the calls belong.
    `tamiyo_answer` and `kasmina_answer` are for display.
    """

    state: SystemStatePacket
    refusals: tuple[tuple[str, str], ...] = ()
    between_epochs: bool = False
    command: AdaptationCommand | None = None
    seeds: list[SeedState] | None = None
    applied: bool = False
    rejection: CommandRejectedError | None = None
    failed: bool = False
    outdated: bool = False
    tamiyo_answer: str = NOT_ASKED
    kasmina_answer: str = NOT_ASKED
    tamiyo_latency_ms: float = 0.0
    kasmina_latency_ms: float = 0.0
    kasmina_export_ms: float = 0.0
    span: SpanContext | None = None
    answered: anyio.Event = field(default_factory=anyio.Event)
    settled: anyio.Event = field(default_factory=anyio.Event)


class Consultations:
    """Holds consultations one at a time. Meanwhile only the newest question waits; older ones are dropped.

    `permits` returns whether a peer may be called now, by its name; otherwise it is skipped. Seed commands that `seeds`
    does not allow are refused. `on_settled` is called on the event loop at the end of each consultation.
    """

    def __init__(
        self,
        tamiyo: TamiyoClient,
        kasmina: KasminaClient,
        *,
        verifier: CommandVerifier,
        emitter: Emitter,
        seeds: SeedsSettings,
        permits: Callable[[str], bool],
        on_settled: Callable[[Consultation], None],
    ) -> None:
        self._tamiyo, self._kasmina = tamiyo, kasmina
        self._verifier, self._emitter = verifier, emitter
        self._seeds = seeds
        self._permits, self._on_settled = permits, on_settled
        self._waiting: Consultation | None = None
        self._held: Consultation | None = None
        self._asked = anyio.Event()

    def ask(self, state: SystemStatePacket, refusals: tuple[tuple[str, str], ...] = ()) -> Consultation:
        """Asks about the end of an epoch; returns the consultation, which is held as soon as possible."""
        self._waiting = Consultation(state, refusals, span=self._emitter.tracer.current)
        self._asked.set()
        return self._waiting

    def ask_between_epochs(self, state: SystemStatePacket) -> None:
        """Asks about a state between epochs; dropped if the question of an epoch's end is waiting."""
        if self._waiting is None or self._waiting.between_epochs:
            self._waiting = Consultation(state, between_epochs=True, span=self._emitter.tracer.current)
            self._asked.set()

    def rewound(self) -> None:
        """Marks the questions that were asked before a rollback as outdated: their answers are stale."""
        for consultation in (self._waiting, self._held):
            if consultation is not None:
                consultation.outdated = True

    async def serve(self) -> None:
        """Holds consultations until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            consultation, self._waiting = self._waiting, None
            if consultation is not None:
                self._held = consultation
                with within(consultation.span):
                    await self._hold(consultation)
                self._held = None

    async def _hold(self, consultation: Consultation) -> None:
        if self._permits("tamiyo") and not consultation.outdated:
            await self._ask_tamiyo(consultation)
        consultation.answered.set()
        # Between epochs Kasmina only receives commands, since the gates of seeds are evaluated by epochs.
        needed = not consultation.between_epochs or _is_for_kasmina(consultation.command)
        if not self._seeds.enabled:
            consultation.kasmina_answer = NOT_ENABLED
        needed = needed and self._seeds.enabled and not consultation.outdated
        # Evaluated after Tamiyo's answer, which may have changed the mode.
        if needed and self._permits("kasmina"):
            await self._ask_kasmina(consultation)
        self._on_settled(consultation)
        consultation.settled.set()

    async def _ask_tamiyo(self, consultation: Consultation) -> None:
        started_s = time.monotonic()
        try:
            between = consultation.between_epochs
            evaluate = self._tamiyo.evaluate_step if between else self._tamiyo.evaluate_epoch
            command = await evaluate(consultation.state)
            consultation.tamiyo_answer = "no change"
            if command is not None:
                self._verifier.verify(command, wall_s=time.time(), now_s=time.monotonic())
                verify_growth(command, consultation.state, self._seeds)
                consultation.command = command
                consultation.tamiyo_answer = describe_command(command)
        except CommandRejectedError as rejection:
            consultation.rejection = rejection
            consultation.tamiyo_answer = f"rejected: {rejection.reason}"
        except PeerError as error:
            # Training continues without a change.
            consultation.failed |= not isinstance(error, BreakerOpenError)  # which means that no call was made
            consultation.tamiyo_answer = f"no change ({error.detail})"
        consultation.tamiyo_latency_ms = _since_ms(started_s)

    async def _ask_kasmina(self, consultation: Consultation) -> None:
        started_s = time.monotonic()
        try:
            consultation.kasmina_answer = await self._apply_and_export(consultation)
        except PeerError as error:
            consultation.failed |= not isinstance(error, BreakerOpenError)
            consultation.kasmina_answer = f"no answer ({error.detail})"
            if isinstance(error, PeerProtocolError):
                latency_ms = _since_ms(started_s)
                self._emitter.emit(events.KASMINA_ERROR, method="answer", detail=error.detail, latency_ms=latency_ms)
        consultation.kasmina_latency_ms = _since_ms(started_s)

    async def _apply_and_export(self, consultation: Consultation) -> str:
        """Sends a seed command to Kasmina and asks for the desired seeds; returns the answer for display."""
        command, answer = consultation.command, ""
        if command is not None and _is_for_kasmina(command):
            response = await self._kasmina.apply(command, consultation.state)
            consultation.seeds, consultation.applied = list(response.seeds), response.applied
            answer = f"{'applied' if response.applied else 'refused'}: {response.detail}"
        # At each epoch's end, with or without a command, since Kasmina evaluates the gates then.
        if not consultation.between_epochs:
            started_s = time.monotonic()
            consultation.seeds = await self._kasmina.export_seeds(consultation.state, consultation.refusals)
            consultation.kasmina_export_ms = _since_ms(started_s)
        count = len(consultation.seeds or ())
        return answer or ("1 seed desired" if count == 1 else f"{count} seeds desired")


def describe_command(command: AdaptationCommand) -> str:
    """Returns a command for display: `pause`, or `germinate seed-1 lora` for a seed command."""
    if command.command_type != enums.COMMAND_SEED:
        return enums.CommandType.Name(command.command_type).removeprefix("COMMAND_").lower()
    operation = enums.SeedOperation.Name(command.seed_operation.operation).removeprefix("SEED_OP_").lower()
    return " ".join(filter(None, (operation, command.target_seed_id, command.seed_operation.blueprint_id)))


def _is_for_kasmina(command: AdaptationCommand | None) -> bool:
    return command is not None and command.command_type == enums.COMMAND_SEED


def _since_ms(started_s: float) -> float:
    return (time.monotonic() - started_s) * 1000
