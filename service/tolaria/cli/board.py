"""`tolaria signals`: reads and writes a signal board directly, whether or not its service is running."""

# ruff: noqa: PLC0415 - tolaria.signals is imported when a command runs, so that --help is quick
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.cli.admin_commands import Level, Reason
from tolaria.cli.render import enum_word, one_line

if TYPE_CHECKING:
    from tolaria.signals import SignalBoard

board_app = typer.Typer(help="Read and write a signal board, with or without its service.", no_args_is_help=True)
BoardFile = Annotated[Path, typer.Option("--board", metavar="FILE", help="The board, such as /dev/shm/tolaria-RUN.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as these commands always do.")]
_POLL_S = 1.0


@board_app.command()
def show(*, board: BoardFile, as_json: AsJson = True) -> None:  # noqa: ARG001 - for scripts that give it to all
    """Print the board's signals, acknowledgements and rollback as one line of JSON."""
    with _attach(board) as attached:
        typer.echo(json.dumps(_contents(attached)))


@board_app.command()
def watch(*, board: BoardFile, as_json: AsJson = True) -> None:  # noqa: ARG001 - likewise
    """Print the contents of the board, as `show` does, after each change until the board is removed."""
    with _attach(board) as attached:
        printed: dict[str, object] = {}
        while attached.current:
            seen = attached.bell  # read before the contents: a change in between ends the wait at once
            if (contents := _contents(attached)) != printed:
                typer.echo(json.dumps(contents))
                printed = contents
            attached.wait(seen, _POLL_S)


@board_app.command("raise")
def raise_(
    level: Annotated[Level, typer.Argument(help="The level to raise.")],
    *,
    board: BoardFile,
    reason: Reason,
    as_json: AsJson = True,  # noqa: ARG001 - likewise
) -> None:
    """Raise an emergency level as the operator."""
    with _attach(board) as attached:
        number = EmergencyLevel.Value(f"EMERGENCY_LEVEL_{level.name}")
        signal_id = attached.claim("operator").raise_level(number, reason)
        typer.echo(json.dumps({"signal_id": signal_id}))


@board_app.command()
def clear(*, board: BoardFile, as_json: AsJson = True) -> None:  # noqa: ARG001 - likewise
    """Clear every signal on the board; training that was halted continues when it is resumed."""
    with _attach(board) as attached:
        cleared = len(list(attached.active_signals()))
        attached.claim("operator").clear_all()
        typer.echo(json.dumps({"cleared": cleared}))


def _attach(path: Path) -> SignalBoard:
    from tolaria.signals import SignalBoard

    return SignalBoard.attach(path)


def _contents(board: SignalBoard) -> dict[str, object]:
    """Returns what `show` prints; times are monotonic nanoseconds."""
    signals = [
        {
            "level": enum_word(EmergencyLevel.DESCRIPTOR, signal.level),
            "origin": signal.origin,
            "reason": one_line(signal.reason),
            "signal_id": signal.signal_id,
        }
        for signal in board.active_signals()
    ]
    acknowledged = {
        state.name: state.record.acknowledged_id
        for state in board.read_all()
        if state.record is not None and state.record.acknowledged_id
    }
    rollback: dict[str, object] | None = None
    if (record := board.read_rollback()) is not None:  # None while it is being written, or if it is damaged
        rollback = {
            "state": record.state.name.lower(),
            "rollback_id": one_line(record.rollback_id),
            "target_step": record.target_step,
            "tier": enum_word(RollbackTier.DESCRIPTOR, record.tier),
            "deadline_ns": record.deadline_ns,
            "changed_ns": record.changed_ns,
        }
    return {"run_id": board.run_id, "standing": signals, "acknowledged": acknowledged, "rollback": rollback}
