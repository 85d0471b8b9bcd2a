from __future__ import annotations

from tolaria.reference.runs import Runs, Undo


class Steps:
    """Something revertible that notes where it was sent."""

    def __init__(self) -> None:
        self.step = 100

    def revert(self, target_step: int) -> Undo:
        self.step = target_step
        return lambda: None


def test_runs_are_bounded_and_the_last_heard_of_is_reverted() -> None:
    """The run that was silent longest is forgotten; a rollback, which names no run, is of the one heard of last."""
    runs = Runs(Steps, runs_max=2)
    runs.revert(1)()
    first, second = runs.of("first"), runs.of("second")
    assert runs.of("first") is first
    runs.revert(7)
    assert (first.step, second.step) == (7, 100)
    runs.of("third")
    assert runs.of("second") is not second
