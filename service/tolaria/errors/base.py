"""The root of all errors, and those that have no branch."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


class TolariaError(Exception):
    """Base class of all errors; `fields` are the constructor's arguments if they are not just the message."""

    def __init__(self, message: str, *fields: object) -> None:
        super().__init__(message)
        self.fields = fields or (message,)


class ConfigurationError(TolariaError):
    """Settings are unknown, malformed or inconsistent; each of `problems` names a setting and its source."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems, head = list(problems), f"configuration has {len(problems)} problem{'s' * (len(problems) != 1)}:"
        super().__init__("\n  ".join([head, *problems]), problems)


class ExposedError(ConfigurationError):
    """Other machines could reach a server that does not know its callers; the message says what to set."""

    def __init__(self, problem: str) -> None:
        self.problems = [problem]
        TolariaError.__init__(self, problem)


class CredentialsError(TolariaError):
    """A file with certificates, keys, tokens or passwords cannot be used; `setting` names it."""

    def __init__(self, setting: str, path: str, detail: str) -> None:
        self.setting, self.path, self.detail = setting, path, detail
        super().__init__(f"{setting}: {path}: {detail}", setting, path, detail)


class BindError(TolariaError):
    """A server cannot listen on `address`."""

    def __init__(self, what: str, address: str, cause: str) -> None:
        super().__init__(f"{what} cannot listen on {address}: {cause}", what, address, cause)


class ChildFailedError(TolariaError):
    """A child process cannot be started, ends early, or does not announce itself as expected."""

    def __init__(self, child: str, detail: str) -> None:
        self.child, self.detail = child, detail
        super().__init__(f"{child}: {detail}", child, detail)


class StateHeldError(TolariaError):
    """Another process uses the state directory; `holder_pid` is 0 when it is unknown."""

    def __init__(self, directory: str, holder_pid: int) -> None:
        self.directory, self.holder_pid = directory, holder_pid
        held = f"is in use by {f'process {holder_pid}' if holder_pid else 'another process'}"
        super().__init__(
            f"state.dir: {directory} {held}; a directory serves one service at a time", directory, holder_pid
        )


class IllegalTransitionError(TolariaError):
    """A circuit breaker or conservative mode has no transition for this event; its state is unchanged."""


class CommandRejectedError(TolariaError):
    """A controller's command fails a check; `reason` is its stable name in metrics and events."""

    def __init__(self, reason: str, command_id: str, detail: str) -> None:
        self.reason, self.command_id, self.detail = reason, command_id, detail
        super().__init__(f"{reason}: {detail}", reason, command_id, detail)


class IllegalMoveError(TolariaError):
    """A seed's lifecycle does not allow this command; the seed stays in its stage."""
