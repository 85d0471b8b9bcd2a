"""`tolaria signals`: the signal board itself, without the service: it works when no RPC is answered any more.

Must not know what a signal leads to.
"""

# ruff: noqa: PLC0415 - a command imports what it needs when it runs, as in `app`
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tolaria.cli.emergency import Level
from tolaria.cli.options import Reason

if TYPE_CHECKING:
    from tolaria.signals import SignalBoard

signals_app = typer.Typer(help="Look at and write to a signal board, service or not.", no_args_is_help=True)
Board = Annotated[Path, typer.Option("--board", metavar="FILE", help="The board, such as /dev/shm/tolaria-RUN.")]
_LOOK_S = 1.0


@signals_app.command()
def show(*, board: Board) -> None:
    """Print what the board says now, as one line of JSON."""
    with _attached(board) as attached:
        typer.echo(json.dumps(_told(attached)))


@signals_app.command()
def watch(*, board: Board) -> None:
    """Print what the board says whenever it changes, one line of JSON each, until the board is gone."""
    with _attached(board) as attached:
        told: dict[str, object] = {}
        while attached.current:
            seen = attached.bell  # before reading: what comes in between must not be slept through
            if (now := _told(attached)) != told:
                typer.echo(json.dumps(now))
                told = now
            attached.wait(seen, _LOOK_S)


@signals_app.command("raise")
def raise_(
    level: Annotated[Level, typer.Argument(help="The level to raise.")], *, board: Board, reason: Reason
) -> None:
    """Raise a level from the operator's own block."""
    with _attached(board) as attached:
        signal_id = attached.claim("operator").raise_level(level.number, reason)
        typer.echo(json.dumps({"signal_id": signal_id}))


@signals_app.command()
def clear(*, board: Board) -> None:
    """Void every signal on the board; training that was halted goes on when it is resumed."""
    with _attached(board) as attached:
        attached.claim("operator").clear_all()


@contextmanager
def _attached(path: Path) -> Iterator[SignalBoard]:
    from tolaria.signals import SignalBoard

    with SignalBoard.attach(path) as board:
        yield board


def _told(board: SignalBoard) -> dict[str, object]:
    from tolaria.cli.words import level_word, one_line

    standing = [
        {"level": level_word(s.level), "origin": s.origin, "reason": one_line(s.reason), "signal_id": s.signal_id}
        for s in board.active_signals()
    ]
    acknowledged = {
        state.name: state.record.acknowledged_id
        for state in board.read_all()
        if state.record is not None and state.record.acknowledged_id
    }
    return {"run_id": board.run_id, "standing": standing, "acknowledged": acknowledged}
