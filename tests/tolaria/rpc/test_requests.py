from __future__ import annotations

import anyio
import pytest
from google.protobuf.message import Message

from leyline.v1.admin_service_pb2 import PauseTrainingRequest, PauseTrainingResponse
from support.answers import FakeAnswers
from tolaria.errors import InvalidFieldError, StillUnderwayError, WrongStateError
from tolaria.rpc.requests import RequestLedger

pytestmark = pytest.mark.anyio


class Effect:
    """Counts how often a request was carried out; each answer is another."""

    def __init__(self) -> None:
        self.times = 0
        self.go_on = anyio.Event()
        self.error: Exception | None = None

    async def now(self) -> PauseTrainingResponse:
        self.times += 1
        if self.error is not None:
            raise self.error
        return PauseTrainingResponse(global_step=self.times)

    async def later(self) -> PauseTrainingResponse:
        await self.go_on.wait()
        return await self.now()


def request(request_id: str = "a", reason: str = "why") -> PauseTrainingRequest:
    """A request that is fine, unless its id or reason is not."""
    return PauseTrainingRequest(request_id=request_id, reason=reason)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("request_id", request(request_id="")),
        ("request_id", request(request_id="  ")),
        ("request_id", request(request_id="x" * 129)),
        ("reason", request(reason="")),
        ("reason", request(reason="x" * 1025)),
    ],
)
async def test_common_fields_are_checked(field: str, bad: PauseTrainingRequest) -> None:
    """A request without id or reason, or with one too long, is refused with the field's name; nothing happens."""
    effect = Effect()
    with pytest.raises(InvalidFieldError) as caught:
        await RequestLedger(10, FakeAnswers()).once("PauseTraining", bad, effect.now)
    assert caught.value.field == field
    assert effect.times == 0


async def test_a_repeat_gets_the_first_answer() -> None:
    """The same id twice is carried out once; another id is another request."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    answers = [await ledger.once("PauseTraining", request(i), effect.now) for i in ("a", "a", "b", "a")]
    assert [a.global_step for a in answers] == [1, 1, 2, 1]


async def test_a_repeat_gets_the_first_refusal() -> None:
    """What the first was refused for, the repeat is refused for, without trying again."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    effect.error = WrongStateError("ended")
    for _ in range(2):
        with pytest.raises(WrongStateError, match="ended"):
            await ledger.once("PauseTraining", request(), effect.now)
    assert effect.times == 1


async def test_an_id_belongs_to_its_request() -> None:
    """The same id with another reason or for another method is a mistake of the client."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    await ledger.once("PauseTraining", request(), effect.now)
    for method, other in (("PauseTraining", request(reason="other")), ("Resume", request())):
        with pytest.raises(InvalidFieldError, match="request_id: was used for another request"):
            await ledger.once(method, other, effect.now)


async def test_repeats_that_come_early_wait_for_the_one_answer() -> None:
    """Twenty at once are carried out once."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    answers: list[int] = []

    async def ask() -> None:
        answers.append((await ledger.once("PauseTraining", request(), effect.later)).global_step)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(ask)
        await anyio.lowlevel.checkpoint()
        effect.go_on.set()
    assert answers == [1] * 20


async def test_a_caller_that_goes_away_leaves_the_request_to_its_repeat() -> None:
    """A cancelled call has no answer to remember: the repeat carries the request on."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    with anyio.move_on_after(0.01):
        await ledger.once("PauseTraining", request(), effect.later)
    assert (await ledger.once("PauseTraining", request(), effect.now)).global_step == 1


async def test_the_memory_is_bounded() -> None:
    """Only the newest ids are remembered here; the others are the store's to know."""
    answers = FakeAnswers()
    ledger, effect = RequestLedger(3, answers), Effect()
    for number in range(5):
        await ledger.once("PauseTraining", request(str(number)), effect.now)
    assert (await ledger.once("PauseTraining", request("4"), effect.now)).global_step == 5
    assert (await ledger.once("PauseTraining", request("0"), effect.now)).global_step == 1
    answers.found.clear()
    assert (await ledger.once("PauseTraining", request("1"), effect.now)).global_step == 6


async def test_a_repeat_after_a_restart_gets_the_first_answer() -> None:
    """What an earlier process answered stands; under another method's id nothing is carried out."""
    answers, effect = FakeAnswers(), Effect()
    first = await RequestLedger(10, answers).once("PauseTraining", request("a"), effect.now)
    again = await RequestLedger(10, answers).once("PauseTraining", request("a"), effect.now)
    assert again == first
    assert effect.times == 1
    with pytest.raises(InvalidFieldError, match="another request"):
        await RequestLedger(10, answers).once("ResumeTraining", request("a"), effect.now)
    assert effect.times == 1
    assert answers.reasons[0]


class HangingAnswers(FakeAnswers):
    """A store whose disk hangs."""

    async def find(self, request_id: str) -> tuple[str, bytes] | None:
        await anyio.sleep_forever()
        return None

    async def keep(self, request_id: str, reason: str, answer: Message) -> None:
        await anyio.sleep_forever()


async def test_a_store_that_hangs_holds_up_neither_the_effect_nor_the_answer() -> None:
    """An emergency cannot wait for the disk: it is carried out, answered, and remembered here."""
    ledger, effect = RequestLedger(10, HangingAnswers()), Effect()
    with anyio.fail_after(5):
        first = await ledger.once("PauseTraining", request(), effect.now)
        assert await ledger.once("PauseTraining", request(), effect.now) == first
    assert effect.times == 1


async def test_what_is_still_under_way_is_asked_for_again() -> None:
    """That it takes long is no answer to remember: the repeat gets what has become of it."""
    ledger, effect = RequestLedger(10, FakeAnswers()), Effect()
    effect.error = StillUnderwayError("not yet")
    with pytest.raises(StillUnderwayError):
        await ledger.once("PauseTraining", request(), effect.now)
    effect.error = None
    assert (await ledger.once("PauseTraining", request(), effect.now)).global_step == 2
