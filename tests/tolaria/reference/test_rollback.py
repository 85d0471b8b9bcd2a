from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.reference.rollback import Call, Phase, RollbackParticipantService, Runs, Undo


class Revertible:
    """State that consists of its step."""

    def __init__(self) -> None:
        self.step = 100

    def revert(self, target_step: int) -> Undo:
        before, self.step = self.step, target_step

        def undo() -> None:
            self.step = before

        return undo


CALLS: tuple[Call, ...] = ("prepare", "commit", "confirm", "abort")
# The calls that lead to each phase.
PATHS: dict[Phase, list[Call]] = {
    "unseen": [],
    "prepared": ["prepare"],
    "committed": ["prepare", "commit"],
    "confirmed": ["prepare", "commit", "confirm"],
    "aborted": ["abort"],
}
# The calls that are accepted in each phase for the first time.
ACCEPTED: dict[Phase, set[Call]] = {
    "unseen": {"prepare", "abort"},
    "prepared": {"commit", "abort"},
    "committed": {"confirm", "abort"},
    "confirmed": set(),
    "aborted": set(),
}


@pytest.mark.parametrize(("phase", "call"), list(itertools.product(PATHS, CALLS)))
def test_every_call_in_every_phase(phase: Phase, call: Call) -> None:
    """A call is accepted, or repeated with the same answer, or refused without any effect."""
    state = Revertible()
    participant = RollbackParticipantService(state)
    before = {done: participant.answer(done, "r", 40) for done in PATHS[phase]}
    step = state.step
    accepted, detail = participant.answer(call, "r", 40)
    if call in before:
        assert (accepted, detail) == before[call]
        assert state.step == step
    elif call in ACCEPTED[phase]:
        assert accepted
    else:
        assert not accepted
        assert phase in detail
        assert state.step == step


def accepts(participant: RollbackParticipantService, call: Call, rollback_id: str = "r", target_step: int = 40) -> bool:
    """Returns whether a call is accepted."""
    return participant.answer(call, rollback_id, target_step)[0]


def test_a_rollback_reverts_at_its_commit() -> None:
    """Prepare changes nothing, commit reverts, confirm keeps the reverted state."""
    state = Revertible()
    participant = RollbackParticipantService(state)
    steps = []
    calls: tuple[Call, ...] = ("prepare", "commit", "confirm")
    for call in calls:
        assert accepts(participant, call)
        steps.append(state.step)
    assert steps == [100, 40, 40]


def test_an_abort_undoes_a_commit() -> None:
    """After the abort the rollback cannot be confirmed."""
    state = Revertible()
    participant = RollbackParticipantService(state)
    assert all([accepts(participant, "prepare"), accepts(participant, "commit"), accepts(participant, "abort")])
    assert state.step == 100
    assert not accepts(participant, "confirm")


def test_a_prepare_closes_open_rollbacks() -> None:
    """Of the rollbacks that a coordinator left open a prepared one is aborted and a committed one confirmed."""
    state = Revertible()
    participant = RollbackParticipantService(state)
    accepts(participant, "prepare", "left prepared", 10)
    accepts(participant, "prepare", "left committed", 20)
    accepts(participant, "commit", "left committed", 20)
    assert accepts(participant, "prepare", "new", 5)
    assert not accepts(participant, "commit", "left prepared", 10)
    assert not accepts(participant, "abort", "left committed", 20)
    assert state.step == 20


@pytest.mark.parametrize(
    ("rollback_id", "target_step", "reason"),
    [("", 40, "1 to 128"), ("x" * 129, 40, "1 to 128"), ("r", 41, "goes to step 40, not to 41")],
)
def test_refusals_have_a_reason(rollback_id: str, target_step: int, reason: str) -> None:
    """A call with an invalid id, or with another step than the prepare, is refused."""
    participant = RollbackParticipantService(Revertible())
    participant.answer("prepare", "r", 40)
    accepted, detail = participant.answer("commit", rollback_id, target_step)
    assert not accepted
    assert reason in detail


@pytest.mark.parametrize(("number", "phase"), [(372, "aborted"), (371, "unseen")])
def test_rollbacks_are_remembered_within_bounds(number: int, phase: Phase) -> None:
    """Of 500 rollbacks the newest 128 are remembered."""
    participant = RollbackParticipantService(Revertible())
    for each in range(500):
        participant.answer("prepare", f"r{each}", 1)
    assert participant.answer("commit", f"r{number}", 1) == (False, f"commit does not fit: {phase}")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(CALLS), st.sampled_from("abc")), max_size=30))
def test_any_order_of_calls(calls: list[tuple[Call, str]]) -> None:
    """In any order of calls of several rollbacks, an accepted call gets the same answer ever after."""
    participant = RollbackParticipantService(Revertible())
    answers: dict[tuple[Call, str], str] = {}
    for call, rollback_id in calls:
        accepted, detail = participant.answer(call, rollback_id, ord(rollback_id))
        if accepted:
            assert answers.setdefault((call, rollback_id), detail) == detail
        assert (call, rollback_id) not in answers or accepted


def test_the_number_of_runs_is_bounded_and_the_last_used_run_is_reverted() -> None:
    """The least recently used of eight runs is forgotten; a rollback, which names no run, reverts the last used one."""
    runs = Runs(lambda _run_id: Revertible())
    runs.revert(1)()
    first, second = runs.of("first"), runs.of("second")
    assert runs.of("first") is first
    runs.revert(7)
    assert (first.step, second.step) == (7, 100)
    for number in range(3, 10):
        runs.of(f"run {number}")
    assert runs.of("first") is first
    assert runs.of("second") is not second
