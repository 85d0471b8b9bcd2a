"""A status on a screen: a table, a live view, or plain lines where there is no terminal.

Owns layout and colour. Must not know where a status comes from; its words are those of `words`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from tolaria.cli import words

Show = Callable[[GetStatusResponse], None]

_PLAIN_LABEL_WIDTH = 14
_STYLES = {
    RunState.RUN_STATE_RUNNING: "green",
    RunState.RUN_STATE_FINISHED: "bold green",
    RunState.RUN_STATE_PAUSED: "yellow",
    RunState.RUN_STATE_DRAINING: "yellow",
    RunState.RUN_STATE_HALTED: "bold red",
    RunState.RUN_STATE_FAILED: "bold red",
}


def print_status(console: Console, status: GetStatusResponse) -> None:
    """One status, once: a table on a terminal, `label words` lines elsewhere."""
    if console.is_terminal:
        console.print(_table(status))
        return
    for label, text in words.rows(status):
        print(f"{label:<{_PLAIN_LABEL_WIDTH}} {text}", file=console.file)


def print_table(console: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their columns' names: a table on a terminal, elsewhere a line each, however long."""
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in names:
            table.add_column(name, overflow="fold")
        for row in rows:
            # Text, not markup: words from elsewhere may hold brackets.
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print(line.rstrip(), file=console.file)


@contextmanager
def live_view(console: Console) -> Iterator[Show]:
    """What is yielded shows one status after another: in place on a terminal, elsewhere a line for each epoch."""
    if not console.is_interactive:
        yield PlainLines(console.file).show
        return
    # Drawn when a status arrives: no refresh thread, and nothing moves that is not new.
    with Live(console=console, auto_refresh=False) as live:
        yield lambda status: live.update(panel(status), refresh=True)


def panel(status: GetStatusResponse) -> RenderableType:
    """The live view of one status."""
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(width=_PLAIN_LABEL_WIDTH)
    bars.add_column(ratio=1)
    bars.add_column(justify="right")
    of_epoch = min(status.epoch_step / max(status.steps_per_epoch, 1), 1.0)
    of_run = status.epochs if _is_over(status) else min(max(status.epoch - 1, 0) + of_epoch, status.epochs)
    bars.add_row(
        "run", ProgressBar(total=max(status.epochs, 1), completed=of_run), f"epoch {status.epoch}/{status.epochs}"
    )
    bars.add_row("epoch", ProgressBar(total=1.0, completed=of_epoch), f"{status.epoch_step}/{status.steps_per_epoch}")
    title = Text(f"tolaria: {words.state_word(status.state)}", style=_STYLES.get(status.state, ""))
    return Panel(Group(bars, _table(status)), title=title, border_style=_STYLES.get(status.state, ""))


class PlainLines:
    """A line for each finished epoch and for each change of state; repeats say nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._epochs_told = 0
        self._state: int | None = None

    def show(self, status: GetStatusResponse) -> None:
        """Print what is new in `status`; epochs that no status told apart share a line."""
        # `epoch` counts epochs begun: an epoch's own figures are complete once the next has begun or the run is over.
        done = status.epoch if _is_over(status) else max(status.epoch - 1, 0)
        if done > self._epochs_told:
            self._print(words.epoch_line(status, done))
        # After a rollback the same epochs are told again.
        self._epochs_told = done
        if status.state != self._state:
            reason = f": {words.one_line(status.state_reason)}" if status.state_reason else ""
            self._print(f"state {words.state_word(status.state)}{reason}")
        self._state = status.state

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)


def _is_over(status: GetStatusResponse) -> bool:
    return status.state == RunState.RUN_STATE_FINISHED


def _table(status: GetStatusResponse) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", width=_PLAIN_LABEL_WIDTH)
    table.add_column(overflow="fold")
    for label, text in words.rows(status):
        # Text, not markup: a peer's words may hold brackets.
        table.add_row(Text(label), Text(text))
    return table
