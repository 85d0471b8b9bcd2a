from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tolaria.errors import LaneError
from tolaria.training.mailbox import Mailbox


class Held:
    def __init__(self) -> None:
        self.times = 0
        self.last = 0
        self.event = threading.Event()

    def __call__(self, hold: int) -> None:
        self.times += 1
        self.last = hold
        self.event.set()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Make a call in a thread; its result is put into the list."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def test_epochs_come_in_order() -> None:
    """What was asked first is run first."""
    mailbox: Mailbox[str] = Mailbox(Held())
    mailbox.run_epoch(1)
    mailbox.run_epoch(2)
    assert [mailbox.next_work(), mailbox.next_work()] == [1, 2]


def test_the_mailbox_is_bounded() -> None:
    """A shell that asks without end is told so."""
    mailbox: Mailbox[str] = Mailbox(Held())
    for epoch in range(4):
        mailbox.run_epoch(epoch)
    with pytest.raises(LaneError, match="waiting for the lane"):
        mailbox.run_epoch(5)


def test_an_open_mailbox_lets_microbatches_pass() -> None:
    """Nothing is waited for and nothing reported while the lane is not held."""
    held = Held()
    assert Mailbox(held).pass_microbatch()
    assert held.times == 0


def test_a_held_lane_stands_between_microbatches_until_released() -> None:
    """Held: told once, stands; released: goes on, and can be held again."""
    held = Held()
    mailbox: Mailbox[str] = Mailbox(held)
    for times in (1, 2):
        mailbox.hold(times)
        held.event.clear()
        thread, results = in_thread(mailbox.pass_microbatch)
        assert held.event.wait(5)
        assert thread.is_alive()
        assert held.times == held.last == times
        mailbox.release()
        thread.join(5)
        assert results == [True]


def test_a_held_idle_lane_takes_no_work_until_released() -> None:
    """A lane that is held while it waits says so and leaves the next epoch alone."""
    held = Held()
    mailbox: Mailbox[str] = Mailbox(held)
    mailbox.hold(1)
    thread, results = in_thread(mailbox.next_work)
    assert held.event.wait(5)
    mailbox.run_epoch(3)
    thread.join(0.05)
    assert thread.is_alive()
    mailbox.release()
    thread.join(5)
    assert results == [3]


def test_stopping_gives_a_held_step_up_and_ends_an_idle_lane() -> None:
    """A stop reaches a lane that stands, and one that waits for work."""
    held = Held()
    mailbox: Mailbox[str] = Mailbox(held)
    mailbox.hold(1)
    thread, results = in_thread(mailbox.pass_microbatch)
    assert held.event.wait(5)
    mailbox.stop()
    thread.join(5)
    assert results == [False]
    assert mailbox.next_work() is None


def test_a_stop_lets_a_running_step_finish() -> None:
    """A lane that is not held passes its microbatches though it shall end after the step."""
    mailbox: Mailbox[str] = Mailbox(Held())
    mailbox.stop()
    assert mailbox.pass_microbatch()
    assert mailbox.stopping


def test_a_hold_anew_is_told_anew() -> None:
    """A lane that stands already answers a second order with the second's number: no order takes another's answer."""
    held = Held()
    mailbox: Mailbox[str] = Mailbox(held)
    mailbox.hold(1)
    thread, results = in_thread(mailbox.pass_microbatch)
    assert held.event.wait(5)
    held.event.clear()
    mailbox.hold(2)
    assert held.event.wait(5)
    assert held.last == 2
    mailbox.release()
    thread.join(5)
    assert results == [True]


def test_commands_come_at_fences_also_while_held_and_at_the_end() -> None:
    """A command is taken between two updates, by a lane that stands too, and before an end that was asked for."""
    mailbox: Mailbox[str] = Mailbox(Held())
    assert mailbox.pass_fence() is None
    mailbox.post(7, "seeds")
    mailbox.hold(1)
    assert mailbox.fence_due
    posted = mailbox.pass_fence()
    assert posted is not None
    assert (posted.ticket, posted.command) == (7, "seeds")
    mailbox.post(8, "rates")
    mailbox.stop()
    last = mailbox.next_work()
    assert not isinstance(last, int)
    assert last is not None
    assert last.ticket == 8
    assert mailbox.next_work() is None


def test_too_many_commands_are_refused() -> None:
    """Whoever asks without end is told so."""
    mailbox: Mailbox[str] = Mailbox(Held())
    for ticket in range(256):
        mailbox.post(ticket, "x")
    with pytest.raises(LaneError, match="commands are waiting"):
        mailbox.post(256, "x")
