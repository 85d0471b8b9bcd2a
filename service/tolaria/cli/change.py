"""Makes a command of a request: a change to a running service needs only its own fields and one line of help.

Owns what all changes share (reason, request id, connection, JSON). Must not know which changes there are.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, ParamSpec, Protocol, TypeVar

import typer

from tolaria.cli.failures import ServiceUnreachableError
from tolaria.cli.options import TIMEOUT_S, AsJson, ConfigFile, Overrides, Reason, RequestId, ServiceAddress, Timeout

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from tolaria.cli.client import Rpc  # brings gRPC, which only a command that runs needs


class ChangeRequest(Protocol):
    """The two fields that the contract gives to every request that changes something."""

    request_id: str
    reason: str


P = ParamSpec("P")
RequestT = TypeVar("RequestT", bound=ChangeRequest)
ResponseT = TypeVar("ResponseT", bound="Message")
Register = Callable[[Callable[P, RequestT]], Callable[P, RequestT]]


@dataclass(frozen=True, slots=True)
class Telling(Generic[ResponseT]):
    """How an answer is told, where the step and its other fields are not enough.

    `show` prints it for people. `prove` raises a TolariaError when the answer is not what it should be, JSON or not.
    """

    show: Callable[[ResponseT], None]
    prove: Callable[[ResponseT], None] = lambda _: None


def changing(
    app: typer.Typer,
    rpc: Rpc[RequestT, ResponseT],
    *,
    name: str = "",
    timeout_s: float = TIMEOUT_S,
    telling: Telling[ResponseT] | None = None,
) -> Register[P, RequestT]:
    """Register the function below as a command of `app` that makes one call.

    The function's parameters are the command's own options, its docstring is the help, and it returns the request with
    its own fields set. The command is called `name`, or like the function; it waits `timeout_s` unless told otherwise.
    Options of every change, and `request_id` and `reason`, are added here:

        @changing(app, lambda admin: admin.AdjustLearningRate)
        def lr(factor: float) -> AdjustLearningRateRequest:
            "Multiply every learning rate."
            return AdjustLearningRateRequest(factor=factor)
    """

    def register(build: Callable[P, RequestT]) -> Callable[P, RequestT]:
        own = list(inspect.signature(build, eval_str=True).parameters.values())
        called = name or build.__name__.replace("_", "-")
        command = _command(build, rpc, name or build.__name__, telling)
        command.__doc__ = build.__doc__
        shared = [p.replace(default=timeout_s) if p.name == "timeout_s" else p for p in _SHARED]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        # typer reads a command's options from its signature: this is where they meet.
        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *shared]])
        setattr(command, "__signature__", signature)  # noqa: B010 - mypy knows no such attribute of a function
        app.command(called)(command)
        return build

    return register


def _command(
    build: Callable[..., RequestT], rpc: Rpc[RequestT, ResponseT], name: str, telling: Telling[ResponseT] | None
) -> Callable[..., None]:
    def command(
        *,
        reason: str,
        request_id: str | None,
        address: str | None,
        timeout_s: float,
        config_file: Path | None,
        overrides: list[str] | None,
        as_json: bool,
        **own: object,
    ) -> None:
        from tolaria.cli import asking  # noqa: PLC0415 - brings settings and gRPC, which --help does not need

        request = build(**own)
        request.request_id = request_id or str(uuid.uuid4())
        request.reason = reason
        whom = asking.target(address, timeout_s, config_file, overrides or [])
        show = telling.show if telling else partial(asking.show_change, name)
        try:
            answer = asking.ask(whom, rpc, request, as_json=as_json, show=show)
        except ServiceUnreachableError as error:
            # The change may have been made although its answer is lost.
            hint = f"--request-id {request.request_id} repeats it safely"
            raise ServiceUnreachableError(f"{error}; {hint}") from None
        if telling:
            telling.prove(answer)

    return command


def _shared(
    *,
    reason: Reason,
    request_id: RequestId = None,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Never called: its parameters are the options that every change has."""


_SHARED = list(inspect.signature(_shared, eval_str=True).parameters.values())
