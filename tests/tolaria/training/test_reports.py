from __future__ import annotations

import threading

from tolaria.training.reports import HeldReport, ReportBox, StepReport


def step(number: int) -> StepReport:
    """A report of the step with this number."""
    return StepReport(number, 1, 0.0, 0.0, 1, 0.0, 0.0, 0.0)


class Notified:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def test_many_steps_make_few_notifications() -> None:
    """Step reports cross in frames: a thousand of them within a frame wake the loop once."""
    notified = Notified()
    box = ReportBox(notified, frame_s=60.0)
    for number in range(1000):
        box.put(step(number))
    assert notified.times == 1
    assert [r.global_step for r in box.take() if isinstance(r, StepReport)] == list(range(1000))
    assert box.take() == []


def test_everything_else_notifies_at_once_and_keeps_its_place() -> None:
    """A report that somebody waits for does not wait for the frame, and comes after the steps before it."""
    notified = Notified()
    box = ReportBox(notified, frame_s=60.0)
    box.put(step(1))
    box.put(step(2))
    box.put(HeldReport(2, 1))
    assert notified.times == 2
    assert box.take()[-1] == HeldReport(2, 1)


def test_a_lane_far_ahead_of_its_judge_waits_for_it() -> None:
    """The box is bounded: the lane stands until the reports are taken."""
    box = ReportBox(Notified(), capacity=2)
    box.put(step(1))
    box.put(step(2))
    thread = threading.Thread(target=box.put, args=(step(3),))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert len(box.take()) == 2
    thread.join(5)
    assert [r.global_step for r in box.take() if isinstance(r, StepReport)] == [3]


def test_closing_lets_a_waiting_lane_go() -> None:
    """At the end nobody takes reports any more, and no lane waits for that."""
    box = ReportBox(Notified(), capacity=1)
    box.put(step(1))
    thread = threading.Thread(target=box.put, args=(step(2),))
    thread.start()
    box.close()
    thread.join(5)
    assert not thread.is_alive()
    box.put(step(3))
    assert len(box.take()) == 1


def test_only_steps_wait_for_room() -> None:
    """A full box never holds up what somebody waits for: the lane may hold a lock that the loop needs."""
    notified = Notified()
    box = ReportBox(notified, capacity=1)
    box.put(step(1))
    box.put(HeldReport(1, 1))
    assert len(box.take()) == 2


def test_a_flush_has_the_rest_taken() -> None:
    """Before the lane is busy with something else, reports of the frame are not left behind."""
    notified = Notified()
    box = ReportBox(notified, frame_s=60.0)
    box.put(step(1))
    box.put(step(2))
    box.flush()
    assert notified.times == 2
