"""`tolaria peer`: one reference peer in a process of its own. Must not know what a peer decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import anyio
import typer

from tolaria.config import Address, load_settings
from tolaria.errors import ConfigurationError
from tolaria.reference.server import serve_peer
from tolaria.telemetry.logging import LogContext, logging_to


def peer(
    name: Literal["tamiyo", "kasmina"],
    listen: str,
    config_file: Path | None,
    overrides: list[str],
    *,
    board: Path | None,
    while_stdin: bool,
) -> None:
    """Serve the peer on `listen` until told to stop; its real address is one JSON line on stdout.

    Raises:
        ConfigurationError: when the settings or `listen` cannot be used.
        BindError: when `listen` cannot be had.
    """
    settings = load_settings(config_file, overrides)
    try:
        Address.parse(listen)
    except ValueError as error:
        raise ConfigurationError([f"--listen: {error}"]) from None

    async def serve() -> None:
        await serve_peer(name, listen, settings.leyline, announce=_announce, board=board, while_stdin=while_stdin)

    # stdout holds the announcement alone. A peer has no metrics in which lost lines could be counted.
    with logging_to(sys.stderr, settings.logging, LogContext(), on_dropped=lambda _priority: None):
        anyio.run(serve)


def _announce(address: Address) -> None:
    typer.echo(json.dumps({"listening": str(address)}))
