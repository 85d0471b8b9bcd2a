"""`tolaria emergency`: raise, clear and show emergencies through the service. Must not know how a call is made."""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, as in `app`
from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from leyline.v1.admin_service_pb2 import (
    ClearEmergencyRequest,
    GetStatusRequest,
    GetStatusResponse,
    RaiseEmergencyRequest,
)
from leyline.v1.enums_pb2 import EmergencyLevel
from tolaria.cli.change import changing
from tolaria.cli.options import TIMEOUT_S, AsJson, ConfigFile, Overrides, ServiceAddress, Timeout

emergency_app = typer.Typer(help="Raise, clear and show emergencies of a running service.", no_args_is_help=True)


class Level(StrEnum):
    """How bad it is."""

    NOTICE = "notice"
    ELEVATED = "elevated"
    CONSERVATIVE = "conservative"
    HALT = "halt"

    @property
    def number(self) -> EmergencyLevel.ValueType:
        """The contract's value."""
        return EmergencyLevel.Value(f"EMERGENCY_LEVEL_{self.name}")


@changing(emergency_app, lambda admin: admin.RaiseEmergency, name="raise")
def raise_(
    level: Annotated[Level, typer.Argument(help="halt freezes training; conservative leaves seeds alone.")],
) -> RaiseEmergencyRequest:
    """Raise an emergency; the answer tells who has acknowledged it."""
    return RaiseEmergencyRequest(level=level.number)


@changing(emergency_app, lambda admin: admin.ClearEmergency)
def clear() -> ClearEmergencyRequest:
    """End the emergency; training that it halted goes on when it is resumed."""
    return ClearEmergencyRequest()


@emergency_app.command()
def show(
    *,
    address: ServiceAddress = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the level, what stands because of it, and the breakers."""
    from tolaria.cli import asking
    from tolaria.cli.words import safety_rows

    def told(answer: GetStatusResponse) -> None:
        for label, words in safety_rows(answer):
            typer.echo(f"{label}: {words}")

    whom = asking.target(address, timeout_s, config_file, overrides or [])
    asking.ask(whom, lambda admin: admin.GetStatus, GetStatusRequest(), as_json=as_json, show=told)
