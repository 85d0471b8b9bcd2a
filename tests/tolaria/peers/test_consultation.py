from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, SEED_OP_GERMINATE, CommandType
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.events import RecordingEmitter
from support.peers import as_clients, command
from tolaria.config import LeylineSettings, SeedsSettings
from tolaria.errors import BreakerOpenError, PeerProtocolError, PeerUnavailableError
from tolaria.peers.consultation import NOT_ASKED, Consultation, Consultations, describe_command
from tolaria.peers.verification import CommandVerifier

pytestmark = pytest.mark.anyio

Outcome = AdaptationCommand | Exception | None


class ScriptedPeers:
    """Consultations with peers that answer as scripted. `calls` are the calls to them, in order."""

    def __init__(self, answer: Outcome = None, *, desired: list[SeedState] | Exception | None = None) -> None:
        self.answer = answer
        self.desired = desired if desired is not None else [SeedState(seed_id="a")]
        self.calls: list[str] = []
        self.forbidden: set[str] = set()
        self.settled: list[Consultation] = []
        self.may_answer, self.may_export = anyio.Event(), anyio.Event()
        self.may_answer.set()
        self.may_export.set()
        self.emitter = RecordingEmitter()
        self.consultations = Consultations(
            *as_clients(self),
            verifier=CommandVerifier(LeylineSettings()),
            emitter=self.emitter,
            seeds=SeedsSettings(),
            permits=lambda peer: peer not in self.forbidden,
            on_settled=self.settled.append,
        )

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self._evaluate(f"epoch {state.packet_id}")

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self._evaluate(f"step {state.packet_id}")

    async def _evaluate(self, call: str) -> AdaptationCommand | None:
        self.calls.append(call)
        await self.may_answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> ApplyCommandResponse:
        self.calls.append("apply")
        return ApplyCommandResponse(applied=True, detail="germinated", seeds=[SeedState(seed_id="applied")])

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        self.calls.append(f"export {dict(refusals)}")
        await self.may_export.wait()
        if isinstance(self.desired, Exception):
            raise self.desired
        return self.desired


@asynccontextmanager
async def serving(peers: ScriptedPeers) -> AsyncIterator[None]:
    """Serves the consultations while the block runs, and until all are settled."""
    with anyio.fail_after(180):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peers.consultations.serve)
            yield
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


def packet(name: str) -> SystemStatePacket:
    """Returns a state to ask about."""
    return SystemStatePacket(packet_id=name)


async def consult(peers: ScriptedPeers, *, between_epochs: bool = False) -> Consultation:
    """Asks one question and returns the settled consultation."""
    async with serving(peers):
        if between_epochs:
            peers.consultations.ask_between_epochs(packet("1"))
        else:
            peers.consultations.ask(packet("1"), (("b", "no room"),))
    (settled,) = peers.settled
    assert settled.answered.is_set()
    assert settled.settled.is_set()
    return settled


async def test_without_a_command_nothing_changes_and_the_desired_seeds_are_exported() -> None:
    """Kasmina is asked at each epoch's end, and receives the refusals."""
    peers = ScriptedPeers()
    settled = await consult(peers)
    assert peers.calls == ["epoch 1", "export {'b': 'no room'}"]
    assert settled.command is None
    assert settled.seeds == [SeedState(seed_id="a")]
    assert (settled.tamiyo_answer, settled.kasmina_answer) == ("no change", "1 seed desired")
    assert not settled.failed


async def test_a_seed_command_is_applied_before_the_seeds_are_exported() -> None:
    """The seeds of the export replace those of the response to the command."""
    peers = ScriptedPeers(command(COMMAND_SEED))
    settled = await consult(peers)
    assert peers.calls == ["epoch 1", "apply", "export {'b': 'no room'}"]
    assert settled.applied
    assert settled.seeds == [SeedState(seed_id="a")]
    assert settled.kasmina_answer == "applied: germinated"


@pytest.mark.parametrize(("kind", "asked"), [(COMMAND_PAUSE, ["step 1"]), (COMMAND_SEED, ["step 1", "apply"])])
async def test_between_epochs_kasmina_only_receives_seed_commands(
    kind: CommandType.ValueType, asked: list[str]
) -> None:
    """Seeds are not exported between epochs, since gates are evaluated by epochs."""
    peers = ScriptedPeers(command(kind))
    settled = await consult(peers, between_epochs=True)
    assert peers.calls == asked
    assert settled.command is not None
    assert (settled.kasmina_answer == NOT_ASKED) is ("apply" not in asked)


async def test_a_rejected_command_is_not_sent_to_kasmina() -> None:
    """The consultation has no command, and the rejection has the reason."""
    peers = ScriptedPeers(command(COMMAND_SEED, version=2))
    settled = await consult(peers)
    assert settled.command is None
    assert settled.rejection is not None
    assert settled.rejection.reason in settled.tamiyo_answer
    assert "apply" not in peers.calls
    assert not settled.failed


@pytest.mark.parametrize(
    ("error", "failed"),
    [(PeerUnavailableError("tamiyo", "gone"), True), (BreakerOpenError("tamiyo", "cooling down"), False)],
)
async def test_a_failed_call_to_tamiyo_changes_nothing(error: Exception, failed: bool) -> None:
    """Kasmina is asked all the same. With an open breaker no call was made, so none has failed."""
    peers = ScriptedPeers(error)
    settled = await consult(peers)
    assert (settled.command, settled.failed) == (None, failed)
    assert settled.tamiyo_answer.startswith("no change (")
    assert settled.seeds == [SeedState(seed_id="a")]


@pytest.mark.parametrize(
    ("error", "events"),
    [
        (PeerUnavailableError("kasmina", "gone"), []),
        (PeerProtocolError("kasmina", "duplicate id"), ["tolaria.kasmina_error"]),
    ],
)
async def test_a_failed_call_to_kasmina_leaves_the_desired_seeds_unknown(error: Exception, events: list[str]) -> None:
    """`seeds` is None, not empty; an invalid answer emits an event."""
    peers = ScriptedPeers(desired=error)
    settled = await consult(peers)
    assert settled.seeds is None
    assert settled.failed
    assert settled.kasmina_answer.startswith("no answer (")
    assert peers.emitter.names == events


@pytest.mark.parametrize(
    ("forbidden", "asked"),
    [({"tamiyo"}, ["export {'b': 'no room'}"]), ({"kasmina"}, ["epoch 1"]), ({"tamiyo", "kasmina"}, [])],
)
async def test_a_peer_that_is_not_permitted_is_skipped(forbidden: set[str], asked: list[str]) -> None:
    """Its answer says so; it does not count as a failure."""
    peers = ScriptedPeers()
    peers.forbidden = forbidden
    settled = await consult(peers)
    assert peers.calls == asked
    assert (settled.tamiyo_answer == NOT_ASKED, settled.kasmina_answer == NOT_ASKED) == (
        "tamiyo" in forbidden,
        "kasmina" in forbidden,
    )
    assert not settled.failed


async def test_the_newest_question_waits_and_an_epochs_end_has_priority() -> None:
    """Questions replace each other while waiting; one between epochs does not replace one of an epoch's end."""
    peers = ScriptedPeers()
    peers.may_answer = anyio.Event()
    async with serving(peers):
        peers.consultations.ask_between_epochs(packet("1"))
        await anyio.wait_all_tasks_blocked()
        peers.consultations.ask_between_epochs(packet("2"))
        peers.consultations.ask_between_epochs(packet("3"))
        peers.consultations.ask(packet("4"))
        peers.consultations.ask_between_epochs(packet("5"))
        peers.may_answer.set()
    assert [asked for asked in peers.calls if not asked.startswith("export")] == ["step 1", "epoch 4"]


async def test_tamiyos_answer_is_signalled_before_kasmina_is_asked() -> None:
    """`answered` is set after the call to Tamiyo, `settled` after those to Kasmina."""
    peers = ScriptedPeers()
    peers.may_answer, peers.may_export = anyio.Event(), anyio.Event()
    seen = list[tuple[bool, bool]]()
    async with serving(peers):
        consultation = peers.consultations.ask(packet("1"))
        for gate in (peers.may_answer, peers.may_export):
            await anyio.wait_all_tasks_blocked()
            seen.append((consultation.answered.is_set(), consultation.settled.is_set()))
            gate.set()
        await consultation.settled.wait()
    assert seen == [(False, False), (True, False)]
    assert peers.settled == [consultation]


def test_descriptions_of_commands() -> None:
    """A seed command is described by operation, seed and blueprint, any other by its type."""
    germinate = command(COMMAND_SEED)
    germinate.seed_operation.operation = SEED_OP_GERMINATE
    germinate.seed_operation.blueprint_id = "lora"
    assert describe_command(germinate) == "germinate seed-1 lora"
    assert describe_command(command(COMMAND_PAUSE)) == "pause"
