from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from leyline.v1 import admin_service_pb2 as admin
from support.admin import MemoryJournal
from tolaria.errors import InvalidFieldError, NotPermittedError
from tolaria.rpc import audit
from tolaria.rpc.audit import CHANGES, AuditTrail
from tolaria.rpc.callers import Caller
from tolaria.run.status import RunStatus
from tolaria.security.tokens import Role

OLGA = Caller("olga", Role.OPERATOR, "192.0.2.1:5", "laptop")
PAUSE = admin.PauseTrainingRequest(request_id="q", reason="why")


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> tuple[AuditTrail, MemoryJournal]:
    """A trail, with a journal in memory, of calls that olga makes."""
    monkeypatch.setattr(audit, "present_caller", lambda: OLGA)
    journal, status = MemoryJournal(), RunStatus("run", "job", "default", 1, 0.0)
    status.global_step = 7
    return AuditTrail(journal, status), journal


def test_every_change_is_known() -> None:
    """By the id that its request has."""
    assert {"PauseTraining", "StopTraining", "TriggerRollback", "ClearEmergency"} <= CHANGES
    assert not {"GetStatus", "WatchStatus", "ListAdminCalls"} & CHANGES


def test_a_call_is_recorded_before_and_after(trail: tuple[AuditTrail, MemoryJournal]) -> None:
    """Who, from where, when, what and why; the outcome is added when it has ended. One line in the log."""
    recorder, journal = trail
    with capture_logs() as logs, recorder.recorded("PauseTraining", PAUSE):
        (begun,) = journal.calls.values()
        assert (begun.caller, begun.role, begun.peer) == ("olga (laptop)", "operator", "192.0.2.1:5")
        assert (begun.method, begun.request_id, begun.reason, begun.global_step) == ("PauseTraining", "q", "why", 7)
        assert begun.outcome == ""
        assert logs == []
    (ended,) = journal.calls.values()
    assert (ended.call_id, ended.at_ns, ended.outcome) == (begun.call_id, begun.at_ns, "OK")
    (line,) = logs
    assert (line["event"], line["caller"], line["peer"], line["reason"]) == (
        "admin_call", "olga (laptop)", "192.0.2.1:5", "why",
    )  # fmt: skip


def test_a_call_is_recorded_at_the_step_of_its_answer(trail: tuple[AuditTrail, MemoryJournal]) -> None:
    """As `tolaria lr` says it, also if training has gone on since."""
    recorder, journal = trail
    with recorder.recorded("AdjustLearningRate", PAUSE) as took_effect:
        took_effect(5)
    (ended,) = journal.calls.values()
    assert ended.global_step == 5


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidFieldError("reason", "x"), "INVALID_ARGUMENT"),
        (asyncio.CancelledError(), "CANCELLED"),
        (KeyError(), "UNKNOWN"),
    ],
)
def test_a_call_that_fails_is_recorded(
    error: BaseException, outcome: str, trail: tuple[AuditTrail, MemoryJournal]
) -> None:
    """With the status; the error goes on."""
    recorder, journal = trail
    with pytest.raises(type(error)), recorder.recorded("PauseTraining", PAUSE):
        raise error
    assert [row.outcome for row in journal.calls.values()] == [outcome]


def test_long_texts_are_cut(trail: tuple[AuditTrail, MemoryJournal]) -> None:
    """A request that is refused for its length is recorded with the part that would have been allowed."""
    recorder, journal = trail
    with recorder.recorded("PauseTraining", admin.PauseTrainingRequest(request_id="i" * 999, reason="r" * 9999)):
        pass
    (row,) = journal.calls.values()
    assert (len(row.request_id), len(row.reason)) == (128, 1024)


def test_denied_changes_are_recorded_now_and_then(trail: tuple[AuditTrail, MemoryJournal]) -> None:
    """One of each caller and method in a while; calls that would only read are not."""
    recorder, journal = trail
    error = NotPermittedError("no")
    for _ in range(50):
        for method in ("PauseTraining", "StopTraining", "ListAdminCalls"):
            recorder.denied(method, OLGA, error)
    found = [(row.method, row.outcome, row.caller) for row in journal.calls.values()]
    assert found == [(name, "PERMISSION_DENIED", "olga (laptop)") for name in ("PauseTraining", "StopTraining")]


def test_a_repeat_is_recorded_once(trail: tuple[AuditTrail, MemoryJournal]) -> None:
    """A client that repeats a request in a loop does not fill the journal. The log has each."""
    recorder, journal = trail
    with capture_logs() as logs:
        for number in range(5):
            with recorder.recorded("PauseTraining", PAUSE, repeat=number > 0):
                pass
    assert len(journal.calls) == 2
    assert len(logs) == 5
    with recorder.recorded("PauseTraining", PAUSE):  # not remembered any more: it has been carried out again
        pass
    assert len(journal.calls) == 3
