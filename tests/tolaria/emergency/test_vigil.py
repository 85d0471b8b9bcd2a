from __future__ import annotations

from dataclasses import replace

import pytest

from tolaria.emergency.vigil import Action, Heart, Patience, Stage, Vigil, begin, look

PATIENCE = Patience(startup_s=5.0, timeout_s=3.0, grace_s=2.0, drain_s=4.0, look_s_max=1.0)
HEARTS = ("loop", "lane")


class Watcher:
    """Looks once a second, and remembers what was to be done, and at which second."""

    def __init__(self, startup_s: float = 0.0) -> None:
        self.patience = replace(PATIENCE, startup_s=startup_s)
        self.vigil = begin(HEARTS, self.patience)
        self.second = 0
        self.done: list[tuple[int, Action]] = []

    def see(self, loop: int, lane: int, elapsed_s: float = 1.0) -> None:
        self.second += 1
        self.vigil, actions = look(self.vigil, {"loop": loop, "lane": lane}, elapsed_s, self.patience)
        self.done += [(self.second, action) for action in actions]

    def see_silence(self, seconds: int) -> None:
        for _ in range(seconds):
            self.see(7, 7)


def test_silence_goes_all_the_way() -> None:
    """Alarm and stacks at the timeout, SIGTERM after the grace, SIGKILL after the drain, each once."""
    watcher = Watcher()
    watcher.see_silence(30)
    assert watcher.done == [
        (4, Action.RAISE_HALT),
        (4, Action.DUMP_STACKS),
        (6, Action.TERMINATE),
        (10, Action.KILL),
    ]


@pytest.mark.parametrize("silent", ["loop", "lane"])
def test_either_heart_is_enough(silent: str) -> None:
    """The other one's beating does not help."""
    watcher = Watcher()
    for beat in range(1, 6):
        watcher.see(7 if silent == "loop" else beat, 7 if silent == "lane" else beat)
    assert watcher.vigil.silent == (silent,)
    assert watcher.done[0] == (4, Action.RAISE_HALT)


@pytest.mark.parametrize("beat", [0, 2**63])
def test_what_a_beat_says_does_not_matter(beat: int) -> None:
    """Never beaten, or from the future: it stands still, so it is silent."""
    watcher = Watcher()
    for second in range(1, 6):
        watcher.see(second, beat)
    assert watcher.vigil.silent == ("lane",)


def test_a_beat_that_moves_in_any_direction_lives() -> None:
    """Another clock is no reason for an alarm."""
    watcher = Watcher()
    for second in range(1, 30):
        watcher.see(2**63 - second, second % 2)
    assert watcher.done == []


def test_nothing_counts_while_the_service_starts() -> None:
    """A job that takes its time to begin is not silent; then the timeout begins."""
    watcher = Watcher(startup_s=5.0)
    watcher.see_silence(7)
    assert watcher.done == []
    watcher.see_silence(2)
    assert watcher.done[0] == (8, Action.RAISE_HALT)


def test_the_time_that_nobody_looked_at_does_not_count() -> None:
    """A sentinel that was stopped for an hour, with the machine, has seen no silence."""
    watcher = Watcher()
    watcher.see_silence(2)
    watcher.see(7, 7, elapsed_s=3600.0)
    assert watcher.done == []
    watcher.see(8, 8)
    assert watcher.vigil.hearts["loop"] == Heart(8, 0.0)


def test_hearts_that_beat_again_within_the_grace_are_let_live() -> None:
    """The process is not ended; the next silence raises the alarm anew."""
    watcher = Watcher()
    watcher.see_silence(5)
    watcher.see(8, 8)
    watcher.see_silence(6)
    assert [action for _, action in watcher.done] == [
        Action.RAISE_HALT,
        Action.DUMP_STACKS,
        Action.CALM_DOWN,
        Action.RAISE_HALT,
        Action.DUMP_STACKS,
        Action.TERMINATE,
    ]


def test_a_process_that_was_asked_to_end_is_not_spared_again() -> None:
    """Its beats while it drains do not undo the request, nor keep it from being killed if it never ends."""
    watcher = Watcher()
    watcher.see_silence(6)
    for beat in range(10, 20):
        watcher.see(beat, beat)
    assert watcher.done[-1] == (10, Action.KILL)
    assert watcher.vigil.stage is Stage.KILLED


def test_a_vigil_is_not_changed_by_a_look() -> None:
    """Each look makes a new one."""
    vigil = Vigil({"loop": Heart()})
    look(vigil, {"loop": 3}, 1.0, PATIENCE)
    assert vigil == Vigil({"loop": Heart()})
