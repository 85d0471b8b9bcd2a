"""The options that several commands share, each written once. Must not know what the commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file (default: tolaria.toml here, where there is one)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting, over environment and file. Repeatable."),
]
ServiceAddress = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="The service to ask (default: server.listen of the settings)."),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=0.1, max=3600.0, help="Longest wait for an answer."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: the contract's own mapping of the answer.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept beside the action.")]
RequestId = Annotated[
    str | None,
    typer.Option("--request-id", metavar="ID", help="A repeat with the same id gets the first answer (default: new)."),
]
WhileStdin = Annotated[bool, typer.Option("--while-stdin", help="End when standard input is closed.")]

TIMEOUT_S = 5.0
DEMO_EPOCHS = 60  # time for seeds to germinate, blend and become part of the host
