"""What every client command shares: settings, a connection, one call, and the answer as JSON or as words.

Must not know which commands there are.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import typer
from google.protobuf.json_format import MessageToDict, MessageToJson
from google.protobuf.message import Message
from rich.console import Console

from leyline.v1.admin_service_pb2 import GetStatusRequest
from tolaria.cli import words
from tolaria.cli.client import Rpc, admin_client, service_address
from tolaria.cli.view import print_status
from tolaria.config import Address, load_settings

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Target:
    """A service to ask, and how long to wait for each answer."""

    address: Address
    timeout_s: float


def target(address: str | None, timeout_s: float, config_file: Path | None, overrides: list[str]) -> Target:
    """Whom to ask.

    Raises:
        ConfigurationError: when the settings or the address cannot be used.
    """
    settings = load_settings(config_file, overrides)
    return Target(service_address(address, settings), timeout_s)


def ask(
    whom: Target,
    rpc: Rpc[RequestT, ResponseT],
    request: RequestT,
    *,
    as_json: bool,
    show: Callable[[ResponseT], None],
) -> ResponseT:
    """Make one call, print its answer, as JSON or else by `show`, and return it.

    Raises:
        ServiceUnreachableError: when nobody answers.
        RequestRefusedError: when the service refuses.
    """

    async def call() -> ResponseT:
        async with admin_client(whom.address, whom.timeout_s) as client:
            return await client.call(rpc, request)

    answer = asyncio.run(call())
    if as_json:
        typer.echo(json_text(answer))
    else:
        show(answer)
    return answer


def status(whom: Target, *, as_json: bool) -> None:
    """Print the state of the service. Raises what `ask` does."""
    ask(
        whom,
        lambda admin: admin.GetStatus,
        GetStatusRequest(),
        as_json=as_json,
        show=lambda answer: print_status(Console(file=sys.stdout), answer),
    )


def show_change(name: str, answer: Message) -> None:
    """Print what a change came to: at which step it took effect, then the other fields as `name value`."""
    values = MessageToDict(answer, preserving_proto_field_name=True)
    step = values.pop("global_step", 0)
    rest = ", ".join(f"{field.replace('_', ' ')} {_plain(value)}" for field, value in values.items())
    typer.echo(f"{name}: took effect at step {step}{': ' if rest else ''}{rest}")


def json_text(message: Message, *, indent: int | None = 2) -> str:
    """The contract's own JSON mapping, zeros included, so that a script finds every field."""
    return MessageToJson(message, indent=indent, always_print_fields_with_no_presence=True)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return words.one_line(str(value)).removeprefix("RUN_STATE_")
