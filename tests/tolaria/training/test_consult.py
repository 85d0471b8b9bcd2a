from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_PAUSE, COMMAND_SEED, SEED_OP_GERMINATE, CommandType
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.events import RecordingEmitter
from support.peers import command
from tolaria.config import LeylineSettings
from tolaria.errors import BreakerOpenError, PeerProtocolError, PeerUnavailableError
from tolaria.peers.kasmina import Applied
from tolaria.peers.verification import new_verifier
from tolaria.training.consult import NOT_ASKED, Consultant, Consultation, in_words

pytestmark = pytest.mark.anyio

Outcome = AdaptationCommand | Exception | None


class Talk:
    """A consultant whose peers answer as the test says, and what they were asked, in order."""

    def __init__(self, answer: Outcome = None, *, desired: list[SeedState] | Exception | None = None) -> None:
        self.answer = answer
        self.desired = desired if desired is not None else [SeedState(seed_id="a")]
        self.asked: list[str] = []
        self.forbidden: set[str] = set()
        self.settled: list[Consultation] = []
        self.may_answer, self.may_export = anyio.Event(), anyio.Event()
        self.may_answer.set()
        self.may_export.set()
        self.emitter = RecordingEmitter()
        self.it = Consultant(
            controller=self,
            executor=self,
            verifier=new_verifier(LeylineSettings()),
            emitter=self.emitter,
            permits=lambda peer: peer not in self.forbidden,
            on_settled=self.settled.append,
        )

    async def evaluate_epoch(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self._evaluate(f"epoch {state.packet_id}")

    async def evaluate_step(self, state: SystemStatePacket) -> AdaptationCommand | None:
        return await self._evaluate(f"step {state.packet_id}")

    async def _evaluate(self, asked: str) -> AdaptationCommand | None:
        self.asked.append(asked)
        await self.may_answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> Applied:
        self.asked.append("apply")
        return Applied(applied=True, detail="germinated", seeds=[SeedState(seed_id="applied")])

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        self.asked.append(f"export {dict(refusals)}")
        await self.may_export.wait()
        if isinstance(self.desired, Exception):
            raise self.desired
        return self.desired


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[None]:
    """Its consultations being held; at the end all is settled."""
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(talk.it.serve)
            yield
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


def packet(name: str) -> SystemStatePacket:
    """A state to ask about."""
    return SystemStatePacket(packet_id=name)


async def one(talk: Talk, *, between_epochs: bool = False) -> Consultation:
    """The consultation that this talk comes to."""
    async with serving(talk):
        if between_epochs:
            talk.it.ask_between_epochs(packet("1"))
        else:
            talk.it.ask(packet("1"), (("b", "no room"),))
    (settled,) = talk.settled
    assert settled.answered.is_set()
    assert settled.settled.is_set()
    return settled


async def test_a_content_tamiyo_changes_nothing_and_kasmina_is_heard() -> None:
    """Asked at every boundary, command or not, and told which of her wishes could not be met."""
    talk = Talk()
    settled = await one(talk)
    assert talk.asked == ["epoch 1", "export {'b': 'no room'}"]
    assert settled.command is None
    assert settled.seeds == [SeedState(seed_id="a")]
    assert (settled.tamiyo_answer, settled.kasmina_answer) == ("no change", "1 seed desired")
    assert not settled.failed


async def test_a_seed_command_is_applied_before_seeds_are_heard() -> None:
    """What she desires afterwards counts."""
    talk = Talk(command(COMMAND_SEED))
    settled = await one(talk)
    assert talk.asked == ["epoch 1", "apply", "export {'b': 'no room'}"]
    assert settled.applied
    assert settled.seeds == [SeedState(seed_id="a")]
    assert settled.kasmina_answer == "applied: germinated"


@pytest.mark.parametrize(("kind", "asked"), [(COMMAND_PAUSE, ["step 1"]), (COMMAND_SEED, ["step 1", "apply"])])
async def test_between_epochs_kasmina_is_only_told_of_her_commands(
    kind: CommandType.ValueType, asked: list[str]
) -> None:
    """She judges how seeds come along by epochs."""
    talk = Talk(command(kind))
    settled = await one(talk, between_epochs=True)
    assert talk.asked == asked
    assert settled.command is not None
    assert (settled.kasmina_answer == NOT_ASKED) is ("apply" not in asked)


async def test_a_command_that_does_not_pass_is_no_command() -> None:
    """Kasmina never hears of it; the rejection tells why."""
    talk = Talk(command(COMMAND_SEED, version=2))
    settled = await one(talk)
    assert settled.command is None
    assert settled.rejection is not None
    assert settled.rejection.reason in settled.tamiyo_answer
    assert "apply" not in talk.asked
    assert not settled.failed


@pytest.mark.parametrize(
    ("error", "failed"),
    [(PeerUnavailableError("tamiyo", "gone"), True), (BreakerOpenError("tamiyo", "cooling down"), False)],
)
async def test_a_tamiyo_that_fails_changes_nothing(error: Exception, failed: bool) -> None:
    """The conservative command; one whose breaker is open was not asked, and has not failed again."""
    talk = Talk(error)
    settled = await one(talk)
    assert (settled.command, settled.failed) == (None, failed)
    assert settled.tamiyo_answer.startswith("no change (")
    assert settled.seeds == [SeedState(seed_id="a")]


@pytest.mark.parametrize(
    ("error", "events"),
    [
        (PeerUnavailableError("kasmina", "gone"), []),
        (PeerProtocolError("kasmina", "seven seeds named a"), ["tolaria.kasmina_error"]),
    ],
)
async def test_a_kasmina_that_fails_desires_nothing_that_is_known(error: Exception, events: list[str]) -> None:
    """No seeds is not the same as none desired; an answer that makes no sense is an event of its own."""
    talk = Talk(desired=error)
    settled = await one(talk)
    assert settled.seeds is None
    assert settled.failed
    assert settled.kasmina_answer.startswith("no answer (")
    assert [event.name for event in talk.emitter.events] == events


@pytest.mark.parametrize(
    ("forbidden", "asked"),
    [({"tamiyo"}, ["export {'b': 'no room'}"]), ({"kasmina"}, ["epoch 1"]), ({"tamiyo", "kasmina"}, [])],
)
async def test_a_peer_that_may_not_be_asked_is_passed_over(forbidden: set[str], asked: list[str]) -> None:
    """Its answer says so, and that is no failure."""
    talk = Talk()
    talk.forbidden = forbidden
    settled = await one(talk)
    assert talk.asked == asked
    assert (settled.tamiyo_answer == NOT_ASKED, settled.kasmina_answer == NOT_ASKED) == (
        "tamiyo" in forbidden,
        "kasmina" in forbidden,
    )
    assert not settled.failed


async def test_the_newest_question_waits_and_an_epochs_comes_first() -> None:
    """While one is held, later ones replace each other; none between epochs replaces an epoch's."""
    talk = Talk()
    talk.may_answer = anyio.Event()
    async with serving(talk):
        talk.it.ask_between_epochs(packet("1"))
        await anyio.wait_all_tasks_blocked()
        talk.it.ask_between_epochs(packet("2"))
        talk.it.ask_between_epochs(packet("3"))
        talk.it.ask(packet("4"))
        talk.it.ask_between_epochs(packet("5"))
        talk.may_answer.set()
    assert [asked for asked in talk.asked if not asked.startswith("export")] == ["step 1", "epoch 4"]


async def test_tamiyos_answer_is_told_before_kasmina_is() -> None:
    """So that a boundary knows whether what remains of its budget is worth waiting for."""
    talk = Talk()
    talk.may_answer, talk.may_export = anyio.Event(), anyio.Event()
    told = list[tuple[bool, bool]]()
    async with serving(talk):
        consultation = talk.it.ask(packet("1"))
        for may_go_on in (talk.may_answer, talk.may_export):
            await anyio.wait_all_tasks_blocked()
            told.append((consultation.answered.is_set(), consultation.settled.is_set()))
            may_go_on.set()
        await consultation.settled.wait()
    assert told == [(False, False), (True, False)]
    assert talk.settled == [consultation]


def test_commands_in_words() -> None:
    """A seed's operation, which seed, and of what; else the type."""
    germinate = command(COMMAND_SEED)
    germinate.seed_operation.operation = SEED_OP_GERMINATE
    germinate.seed_operation.blueprint_id = "lora"
    assert in_words(germinate) == "germinate seed-1 lora"
    assert in_words(command(COMMAND_PAUSE)) == "pause"
