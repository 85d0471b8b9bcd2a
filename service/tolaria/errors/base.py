"""The root of the tree, and the errors that stand alone. Knows nothing of who raises or catches."""

from __future__ import annotations


class TolariaError(Exception):
    """Base of all; never raised itself."""


class ConfigurationError(TolariaError):
    """Raised at start when settings are unknown, malformed or impossible together.

    `problems` has one line for each, naming the setting and where it came from.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"configuration has {len(problems)} {noun}:\n" + "\n".join(f"  {p}" for p in problems))


class BindError(TolariaError):
    """Raised when a server cannot listen on its address; the message holds the address."""

    def __init__(self, what: str, address: str, cause: str) -> None:
        self.address = address
        super().__init__(f"{what} cannot listen on {address}: {cause}")


class StateHeldError(TolariaError):
    """Raised at start when another process uses the state directory. `holder_pid` is 0 where it cannot be told."""

    def __init__(self, directory: str, holder_pid: int) -> None:
        self.directory = directory
        self.holder_pid = holder_pid
        holder = f"process {holder_pid}" if holder_pid else "another process"
        super().__init__(f"state.dir: {directory} is in use by {holder}; a directory serves one service at a time")


class CommandRejectedError(TolariaError):
    """Raised when a command fails a check. `reason` is its stable name in metrics and events."""

    def __init__(self, reason: str, command_id: str, detail: str) -> None:
        self.reason = reason
        self.command_id = command_id
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class NonFiniteStepError(TolariaError):
    """Raised when a loss or gradient is NaN or infinite, before any parameter changed."""


class ChildFailedError(TolariaError):
    """Raised when a child process cannot be started, ends early, or does not announce itself as expected."""

    def __init__(self, child: str, detail: str) -> None:
        self.child = child
        self.detail = detail
        super().__init__(f"{child}: {detail}")
