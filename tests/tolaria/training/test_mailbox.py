from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tolaria.errors import LaneError
from tolaria.training.mailbox import Mailbox


class Held:
    def __init__(self) -> None:
        self.times = 0
        self.event = threading.Event()

    def __call__(self) -> None:
        self.times += 1
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
        mailbox.hold()
        held.event.clear()
        thread, results = in_thread(mailbox.pass_microbatch)
        assert held.event.wait(5)
        assert thread.is_alive()
        assert held.times == times
        mailbox.release()
        thread.join(5)
        assert results == [True]


def test_a_held_idle_lane_takes_no_work_until_released() -> None:
    """A lane that is held while it waits says so and leaves the next epoch alone."""
    held = Held()
    mailbox: Mailbox[str] = Mailbox(held)
    mailbox.hold()
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
    mailbox.hold()
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
