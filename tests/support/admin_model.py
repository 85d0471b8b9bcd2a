"""A model of a run as an operator sees it: the answers that the admin service may give, and the state after them.

Written from the contract and the documents; shares no code with the service.
"""

from __future__ import annotations

import math
from typing import Any

from grpc import StatusCode

from leyline.v1 import admin_service_pb2 as admin

OK, INVALID, WRONG = StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION
CONSERVATIVE, HALT = 3, 4
RUNNING, PAUSED, HALTED, FINISHED = (
    admin.RUN_STATE_RUNNING, admin.RUN_STATE_PAUSED, admin.RUN_STATE_HALTED, admin.RUN_STATE_FINISHED,
)  # fmt: skip

# Calls whose effect depends on restore points on disk and in memory: several answers are allowed.
_OPEN = {OK, StatusCode.UNIMPLEMENTED, INVALID, WRONG, StatusCode.NOT_FOUND, StatusCode.ABORTED}
OPEN_METHODS: dict[str, set[StatusCode]] = {
    "TriggerRollback": {*_OPEN, StatusCode.DEADLINE_EXCEEDED},
    "ListRestorePoints": _OPEN,
    "CreateCheckpoint": {*_OPEN, StatusCode.DEADLINE_EXCEEDED},
    "ListIncidents": _OPEN,
    "ListAdminCalls": _OPEN,
    "ExportModel": {*_OPEN, StatusCode.DEADLINE_EXCEEDED},
    "CaptureProfile": {*_OPEN, StatusCode.DEADLINE_EXCEEDED},
    "StreamTelemetry": {*_OPEN, StatusCode.DEADLINE_EXCEEDED},  # no event within the test's timeout
}
READING = {"GetStatus", "WatchStatus", "ListDataSkips"}

Outcome = tuple[StatusCode, bytes]


class AdminModel:
    """The state, the emergency level and the reasons that operators cause; nothing else changes them in this run."""

    def __init__(self) -> None:
        self.state = RUNNING
        self.level = 0
        self.operator = False
        self.emergency = False
        self._first: dict[str, tuple[str, bytes, Outcome]] = {}
        self._open_ids: set[str] = set()

    def allowed(self, method: str, request: Any) -> set[StatusCode]:
        """Returns the status codes that the next answer may have; `request` is None for bytes that cannot be parsed."""
        if request is None:
            return {INVALID}
        if method in READING:
            return {OK}
        if method in OPEN_METHODS:
            return OPEN_METHODS[method]
        return self._allowed_once(method, request) if _is_complete(request) else {INVALID}

    def apply(self, method: str, request: Any, outcome: Outcome, status: admin.GetStatusResponse) -> str:
        """Applies an allowed outcome; returns how it, or the `status` after it, differs from the model."""
        changes = request is not None and method not in READING | OPEN_METHODS.keys() and _is_complete(request)
        if method in OPEN_METHODS:
            self._open_ids.add(getattr(request, "request_id", ""))
            self._adopt(status)
        elif changes and request.request_id in self._open_ids:
            self._adopt(status)
        elif changes:
            problem = self._apply_once(method, request, outcome)
            if problem:
                return problem
        return self._status_problem(status)

    def _apply_once(self, method: str, request: Any, outcome: Outcome) -> str:
        if request.request_id in self._first:
            of, raw, first = self._first[request.request_id]
            same = (of, raw) == (method, _bytes(request))
            return f"a repeat got {outcome}, first was {first}" if same and outcome != first else ""
        self._first[request.request_id] = (method, _bytes(request), outcome)
        if outcome[0] is OK:
            self._change(method, request)
            return self._answer_problem(method, outcome[1])
        return ""

    def _allowed_once(self, method: str, request: Any) -> set[StatusCode]:
        if request.request_id in self._open_ids:
            return {INVALID, *self._expected(method, request)}
        if request.request_id in self._first:
            of, raw, (code, _) = self._first[request.request_id]
            return {code} if (of, raw) == (method, _bytes(request)) else {INVALID}
        return self._expected(method, request)

    def _expected(self, method: str, request: Any) -> set[StatusCode]:
        ended = self.state == FINISHED
        match method:
            case "PauseTraining" | "StopTraining" | "ResumeTraining":
                return {WRONG if ended or (method == "ResumeTraining" and self.level == HALT) else OK}
            case "SkipData":  # which batches there are is not modelled
                return {OK, INVALID, WRONG}
            case "RaiseEmergency":
                return {OK if request.level in {1, 2, 3, 4} else INVALID}
            case "ClearEmergency":
                return {OK if self.level else WRONG}
            case "AdjustLearningRate":
                return {WRONG} if ended else _adjusting(request)
            case _:
                return {OK}

    def _change(self, method: str, request: Any) -> None:
        match method:
            case "PauseTraining":
                self.state = HALTED if self.state == HALTED else PAUSED
            case "ResumeTraining":
                self.state = RUNNING
            case "StopTraining":
                self.state = FINISHED
            case "RaiseEmergency" if request.level > self.level:
                self.level = request.level
                self.emergency = self.emergency or self.level == CONSERVATIVE
                if self.level == HALT and self.state != FINISHED:
                    self.state = HALTED
            case "ClearEmergency":
                self.level, self.emergency = 0, False
            case "SetConservativeMode":
                self.operator = request.enabled
            case _:
                pass  # a lower level or another rate, which the model does not represent

    def _answer_problem(self, method: str, raw: bytes) -> str:
        answer = getattr(admin, f"{method}Response").FromString(raw)
        shown = {
            "state": (getattr(answer, "state", self.state), self.state),
            "level": (getattr(answer, "level", self.level), self.level),
            "operator": ("operator" in getattr(answer, "conservative_reasons", ()), self.operator),
        }
        if method != "SetConservativeMode":
            del shown["operator"]
        return ", ".join(f"{method} answers {name} {a}, not {b}" for name, (a, b) in shown.items() if a != b)

    def _status_problem(self, status: admin.GetStatusResponse) -> str:
        shown = {
            "state": (status.state, self.state),
            "level": (status.emergency_level, self.level),
            "operator": ("operator" in status.conservative_reasons, self.operator),
            "emergency": ("emergency" in status.conservative_reasons, self.emergency),
        }
        return ", ".join(f"the status says {name} {a}, not {b}" for name, (a, b) in shown.items() if a != b)

    def _adopt(self, status: admin.GetStatusResponse) -> None:
        self.state, self.level = status.state, status.emergency_level
        self.operator = "operator" in status.conservative_reasons
        self.emergency = "emergency" in status.conservative_reasons


def _is_complete(request: Any) -> bool:
    return all(
        text.strip() and len(text) <= longest for text, longest in ((request.request_id, 128), (request.reason, 1024))
    )


def _bytes(request: Any) -> bytes:
    raw: bytes = request.SerializeToString(deterministic=True)
    return raw


def _adjusting(request: admin.AdjustLearningRateRequest) -> set[StatusCode]:
    """A rate that is not a positive number must be refused; any other rate may be out of bounds."""
    change = request.WhichOneof("change")
    plausible = {
        None: False,
        "factor": math.isfinite(request.factor) and request.factor > 0,
        "value": math.isfinite(request.value) and request.value >= 0,
    }
    return {OK, INVALID} if plausible[change] else {INVALID}
