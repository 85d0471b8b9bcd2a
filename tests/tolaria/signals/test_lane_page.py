from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tolaria.config import EmergencySettings
from tolaria.segments import Segment
from tolaria.signals.lane_page import LanePage, PagePulse
from tolaria.signals.layout import LanePhase, LaneWork

TIMEOUT_S = 180.0
LIMITS = EmergencySettings(heartbeat_timeout_s=30, phase_timeout_s=600)


def shown(page: LanePage) -> tuple[str, float]:
    """The phase on the page and its seconds, to a millisecond."""
    name, phase_s = page.phase()
    return name, round(phase_s, 3)


def batch_of(page: LanePage) -> tuple[int, int] | None:
    """The batch on the page."""
    return page.batch


def other_side(page: LanePage) -> LanePage:
    """The same page, mapped once more as in another process."""
    return LanePage(Segment(0, os.dup(page.segment.descriptor)))


@pytest.fixture
def lane() -> LanePage:
    """The page as the lane has it."""
    return LanePage.create()


@pytest.fixture
def service(lane: LanePage) -> LanePage:
    """The page as the service has it."""
    return other_side(lane)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time of the page and the pulse, in its only element."""
    now_s = [100.0]
    monkeypatch.setattr("tolaria.signals.lane_page.time.monotonic_ns", lambda: int(now_s[0] * 1e9))
    monkeypatch.setattr("tolaria.signals.lane_pulse.time.monotonic", lambda: now_s[0])
    return now_s


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_new_page_is_that_of_a_lane_at_rest(lane: LanePage, service: LanePage) -> None:
    """It takes no batch, does nothing in particular, is not to be held, and no heartbeat is due."""
    assert (batch_of(service), service.work, service.phase()) == (None, LaneWork(0, 0), ("", 0.0))
    assert (service.silent_s(), lane.hold_number(), lane.forbidden(1)) == (0.0, 0, False)


def test_both_sides_see_the_same_words(lane: LanePage, service: LanePage) -> None:
    """Batch, hold and work; each word of one side is there at once for the other, and changes no other word."""
    lane.show_batch(3, 17)
    assert batch_of(service) == (3, 17)
    lane.show_batch(4, 0)
    assert batch_of(service) == (4, 0)
    service.hold(12)
    assert lane.hold_number() == 12
    lane.show_lane_work(LaneWork(LanePhase.COMPILING, 5000).word)
    assert service.work == LaneWork(LanePhase.COMPILING, 5000)
    lane.show_batch(0, 0)
    service.hold(0)
    assert (batch_of(service), lane.hold_number()) == (None, 0)
    assert service.work == LaneWork(LanePhase.COMPILING, 5000)
    assert lane.grant(2**63)
    assert not service.forbid(2**63)


def test_silence_counts_from_the_last_heartbeat(lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """It is none at rest and before the first heartbeat, and grows until the next one otherwise."""
    lane.show_rest(0)
    seconds[0] += 50
    assert service.silent_s() == 0.0
    lane.beat_lane()
    assert service.silent_s() == 0.0
    seconds[0] += 7
    assert service.silent_s() == pytest.approx(7)
    lane.show_rest(1)
    assert service.silent_s() == 0.0
    seconds[0] += 3
    lane.show_rest(0)
    assert service.silent_s() == pytest.approx(10)
    lane.beat_lane()
    assert service.silent_s() == 0.0
    seconds[0] -= 1  # a reader that has loaded the time before the lane has stored its own
    assert service.silent_s() == 0.0


def test_a_process_is_silent_also_at_rest(lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """One that is stopped then, or whose threads cannot run: sooner while it is idle than in the middle of work."""
    pulse = PagePulse(lane, LIMITS)
    seconds[0] += 1000
    assert service.overdue_s() == 0.0  # it has not given the first beat
    lane.beat_process()
    seconds[0] += 29
    assert service.overdue_s() == 0.0
    seconds[0] += 2
    assert service.overdue_s() == pytest.approx(31)
    with pulse.lane_works(), pulse.lane_rests():
        lane.beat_process()
        seconds[0] += 599
        assert service.overdue_s() == 0.0
        seconds[0] += 2
        assert service.overdue_s() == pytest.approx(601)
        lane.beat_process()
        assert service.overdue_s() == 0.0
    seconds[0] += 31
    assert service.overdue_s() == pytest.approx(31)


def test_phases_have_their_names_and_times(lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """Steps have none, nor have short waits for data."""
    lane.show_lane_work(LaneWork(LanePhase.EVALUATING, 0).word)
    seconds[0] += 5
    assert shown(service) == ("evaluating", 5)
    lane.show_lane_work(LaneWork(LanePhase.LOADING, 0).word)
    seconds[0] += 0.5
    assert service.phase() == ("", 0.0)
    seconds[0] += 2
    assert shown(service) == ("loading", 2.5)
    lane.show_lane_work(LaneWork(LanePhase.STEPPING, 0).word)
    seconds[0] += 5
    assert service.phase() == ("", 0.0)


# -- restores ----------------------------------------------------------------------------------------------------------


def test_a_forbidden_restore_is_not_granted(lane: LanePage, service: LanePage) -> None:
    """However often it is tried; the next restore is granted."""
    assert service.forbid(5)
    assert lane.forbidden(5)
    for _ in range(3):
        assert not lane.grant(5)
        assert service.forbid(5)
    assert not lane.forbidden(6)
    assert lane.grant(6)


def test_a_granted_restore_is_not_forbidden_any_more(lane: LanePage, service: LanePage) -> None:
    """The service learns that its change may have begun; another restore can be forbidden."""
    assert lane.grant(5)
    assert not service.forbid(5)
    assert not service.forbid(5)
    assert service.forbid(6)
    assert not lane.grant(6)


class TurnedWords:
    """Words of a page, each access to which waits for its turn."""

    def __init__(self, page: LanePage, side: int, turns: Turns) -> None:
        self._words, self._side, self._turns = page._words, side, turns  # noqa: SLF001 - the accesses are what counts

    def __getitem__(self, index: int) -> int:
        return self._turns.take(self._side, lambda: self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        def store() -> int:
            self._words[index] = value
            return value

        self._turns.take(self._side, store)


class Turns:
    """Lets two threads access memory in a given order of their sides; the rest is in any order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order, self._changed = list(order), threading.Condition()

    def take(self, side: int, access: Callable[[], int]) -> int:
        with self._changed:
            assert self._changed.wait_for(lambda: side not in self._order or self._order[0] == side, TIMEOUT_S)
            if side in self._order:
                self._order.pop(0)
            found = access()
            self._changed.notify_all()
            return found

    def leave(self, side: int) -> None:
        """Ends the turns of a side that needs no more."""
        with self._changed:
            self._order = [each for each in self._order if each != side]
            self._changed.notify_all()


def together(*functions: Callable[[], bool]) -> list[bool]:
    """Runs the functions in threads of their own; returns their results."""
    found = dict[int, bool]()

    def run(index: int) -> None:
        found[index] = functions[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return [found[index] for index in range(len(functions))]


ORDERS = sorted(set(itertools.permutations([0, 0, 0, 1, 1])))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join("gf"[side] for side in order))
def test_at_most_one_side_wins_in_any_order_of_accesses(
    order: tuple[int, ...], lane: LanePage, service: LanePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the lane's accesses (g) and the service's (f) come between; afterwards both agree on the outcome."""
    turns = Turns(order)
    for side, page in enumerate((lane, service)):
        monkeypatch.setattr(page, "_words", TurnedWords(page, side, turns))

    def grant() -> bool:
        granted = lane.grant(9)
        turns.leave(0)
        return granted

    def forbid() -> bool:
        forbidden = service.forbid(9)
        turns.leave(1)
        return forbidden

    granted, forbidden = together(grant, forbid)
    assert not (granted and forbidden)
    if order[:2] == (0, 0):
        assert (granted, forbidden) == (True, False)
    if order[:2] == (1, 1):
        assert (granted, forbidden) == (False, True)
    again = other_side(lane)
    assert again.forbid(9) == (not granted)  # what the lane was told stays true
    assert not (forbidden and again.grant(9))


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Has threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_race_is_never_won_by_both_sides(lane: LanePage, service: LanePage, frequent_switches: None) -> None:
    """Two thousand restores that the lane begins while the service forbids them; each side wins some of them."""
    rounds, barrier = 2000, threading.Barrier(2, timeout=TIMEOUT_S)

    def all_of(wins: Callable[[int], bool], found: list[bool]) -> None:
        for number in range(1, rounds + 1):
            barrier.wait()
            if number % 2 == (wins == lane.grant):  # so that neither is always the first
                time.sleep(0)
            found.append(wins(number))

    granted, forbidden = list[bool](), list[bool]()
    threads = [
        threading.Thread(target=all_of, args=(lane.grant, granted)),
        threading.Thread(target=all_of, args=(service.forbid, forbidden)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(granted), len(forbidden)) == (rounds, rounds)
    assert not any(map(all, zip(granted, forbidden, strict=True)))
    assert any(granted)
    assert any(forbidden)


# -- the pulse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [phase for phase in LanePhase if phase])
def test_a_pulse_shows_its_phases(phase: LanePhase, lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """At once, with the silence that each permits; nested ones end with the phase before."""
    pulse = PagePulse(lane, LIMITS)
    stepping, loading = LaneWork(LanePhase.STEPPING, 30_000), LaneWork(LanePhase.LOADING, 600_000)
    assert service.work == stepping
    with pulse.lane_phase(phase):
        assert service.work == LaneWork(phase, 600_000)
        seconds[0] += 4
        with pulse.lane_phase(LanePhase.LOADING):
            assert service.work == loading
        assert service.work == LaneWork(phase, 600_000)
        seconds[0] += 2
        assert shown(service) == (phase.name.lower(), 2)
        assert pulse.phase()[0] == phase.name.lower()
    assert service.work == stepping
    assert service.phase() == ("", 0.0)


def test_a_phase_that_fails_ends_too(lane: LanePage, service: LanePage) -> None:
    """An error within it leaves the phase before."""
    pulse = PagePulse(lane, LIMITS)
    with pytest.raises(ZeroDivisionError), pulse.lane_phase(LanePhase.EVALUATING):
        raise ZeroDivisionError
    assert service.work.phase == LanePhase.STEPPING


def test_a_long_phase_ends_with_a_heartbeat(lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """The silence that it permitted does not count afterwards."""
    pulse = PagePulse(lane, LIMITS)
    with pulse.lane_works(), pulse.lane_phase(LanePhase.COMPILING):
        seconds[0] += 300
        assert service.silent_s() == pytest.approx(300)
    with pulse.lane_works():
        with pulse.lane_phase(LanePhase.COMPILING):
            seconds[0] += 300
        assert service.silent_s() == 0.0


def test_a_pulse_shows_its_rests(lane: LanePage, service: LanePage, seconds: list[float]) -> None:
    """No beat is due before work, in a rest within it, nested or not, and afterwards."""
    pulse = PagePulse(lane, LIMITS)

    def silence() -> float:
        seconds[0] += 2
        return round(service.silent_s(), 3)

    assert (silence(), pulse.rests) == (0.0, True)
    with pulse.lane_works():
        assert (silence(), pulse.rests) == (2, False)
        with pulse.lane_rests():
            assert silence() == 0.0
            with pulse.lane_rests():
                assert silence() == 0.0
            assert silence() == 0.0
        assert service.silent_s() == 0.0
        assert silence() == 2
        pulse.lane_beat()
        assert silence() == 2
    assert (silence(), pulse.rests) == (0.0, True)


def test_a_pulse_shows_batches_and_long_steps(lane: LanePage, service: LanePage) -> None:
    """The batch at once; ten times the longest step, if that is more, with the next phase."""
    pulse = PagePulse(lane, LIMITS)
    pulse.lane_batch(2, 5)
    assert batch_of(service) == (2, 5)
    pulse.lane_batch(0, 0)
    assert batch_of(service) is None
    pulse.lane_step(7.0)
    with pulse.lane_phase(LanePhase.LOADING):
        pass
    assert service.work == LaneWork(LanePhase.STEPPING, 70_000)
