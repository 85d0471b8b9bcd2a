from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.reference.rollback import TRANSITIONS, Call, Participant, Phase, RollbackAnswer
from tolaria.reference.runs import Undo


class Ledger:
    """Something revertible that is nothing but its step."""

    def __init__(self) -> None:
        self.step = 100

    def revert(self, target_step: int) -> Undo:
        before, self.step = self.step, target_step

        def undo() -> None:
            self.step = before

        return undo


WAYS: dict[Phase, list[Call]] = {
    Phase.UNSEEN: [],
    Phase.PREPARED: [Call.PREPARE],
    Phase.COMMITTED: [Call.PREPARE, Call.COMMIT],
    Phase.CONFIRMED: [Call.PREPARE, Call.COMMIT, Call.CONFIRM],
    Phase.ABORTED: [Call.ABORT],
}


@pytest.mark.parametrize(("phase", "call"), list(itertools.product(Phase, Call)))
def test_every_call_in_every_phase(phase: Phase, call: Call) -> None:
    """A call fits and is accepted, is a repeat and answered as before, or is refused and changes nothing."""
    ledger = Ledger()
    participant = Participant(ledger)
    before = {done: participant.answer(done, "r", 40) for done in WAYS[phase]}
    step = ledger.step
    answer = participant.answer(call, "r", 40)
    if call in before:
        assert answer is before[call]
        assert ledger.step == step
    elif call in TRANSITIONS[phase]:
        assert answer.accepted
    else:
        assert not answer.accepted
        assert phase.value in answer.detail
        assert ledger.step == step


def test_a_rollback_reverts_at_its_commit() -> None:
    """Preparing changes nothing, committing reverts, confirming keeps it."""
    ledger = Ledger()
    participant = Participant(ledger)
    steps = []
    for call in (Call.PREPARE, Call.COMMIT, Call.CONFIRM):
        assert participant.answer(call, "r", 40).accepted
        steps.append(ledger.step)
    assert steps == [100, 40, 40]


def test_an_abort_undoes_a_commit() -> None:
    """What was committed and not confirmed is as before after an abort; nothing can be committed then."""
    ledger = Ledger()
    participant = Participant(ledger)
    for call in (Call.PREPARE, Call.COMMIT, Call.ABORT):
        assert participant.answer(call, "r", 40).accepted
    assert ledger.step == 100
    assert not participant.answer(Call.CONFIRM, "r", 40).accepted


def test_the_newest_prepare_wins() -> None:
    """What a coordinator left open does not stand in the way: prepared is aborted, committed stays."""
    ledger = Ledger()
    participant = Participant(ledger)
    participant.answer(Call.PREPARE, "left prepared", 10)
    participant.answer(Call.PREPARE, "left committed", 20)
    participant.answer(Call.COMMIT, "left committed", 20)
    assert participant.answer(Call.PREPARE, "new", 5).accepted
    assert not participant.answer(Call.COMMIT, "left prepared", 10).accepted
    assert not participant.answer(Call.ABORT, "left committed", 20).accepted
    assert ledger.step == 20


@pytest.mark.parametrize(
    ("rollback_id", "target_step", "why"),
    [("", 40, "1 to 128"), ("x" * 129, 40, "1 to 128"), ("r", 41, "goes to step 40, not to 41")],
)
def test_refusals_say_why(rollback_id: str, target_step: int, why: str) -> None:
    """A call without a proper id, or with another step than before, is refused."""
    participant = Participant(Ledger())
    participant.answer(Call.PREPARE, "r", 40)
    answer = participant.answer(Call.COMMIT, rollback_id, target_step)
    assert not answer.accepted
    assert why in answer.detail


def test_memory_is_bounded() -> None:
    """Old rollbacks are forgotten."""
    participant = Participant(Ledger())
    for number in range(500):
        participant.answer(Call.PREPARE, f"r{number}", 1)
    assert len(participant._rollbacks) == 128


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Call), st.sampled_from("abc")), max_size=30))
def test_any_order_of_calls(calls: list[tuple[Call, str]]) -> None:
    """In any order of calls over several rollbacks, an accepted call is answered the same ever after."""
    participant = Participant(Ledger())
    accepted: dict[tuple[Call, str], RollbackAnswer] = {}
    for call, rollback_id in calls:
        answer = participant.answer(call, rollback_id, ord(rollback_id))
        if answer.accepted:
            assert accepted.setdefault((call, rollback_id), answer) is answer
        assert (call, rollback_id) not in accepted or answer.accepted
