"""The process edge: what Tolaria raises on purpose is one message on stderr and an exit code, no traceback.

Must not know which commands there are.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import typer
from typer.core import TyperGroup

from tolaria.cli.failures import ReaderGoneError, exit_code
from tolaria.cli.starting import interrupted, interrupted_code
from tolaria.errors import TolariaError


class Told(TyperGroup):
    """A group of commands whose failures are told."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override] # typer hands its own kind of context on
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            # Here, where a full disk can still be told; at the interpreter's own last flush it cannot.
            if sys.stdout is not None:
                sys.stdout.flush()
        except (TolariaError, BaseExceptionGroup) as error:
            if not interrupted():
                raise typer.Exit(told(_failures_alone(error))) from None
        except KeyboardInterrupt:
            pass
        else:
            return result
        raise typer.Exit(interrupted_code())


def told(failures: list[TolariaError]) -> int:
    """Tell of each on standard error; returns the exit code, which is that of the first."""
    for failure in failures:
        # Where standard error cannot be written to either, the exit code is all that is left.
        with suppress(OSError):
            if not isinstance(failure, ReaderGoneError):
                typer.echo(f"tolaria: {failure}", err=True)
    return exit_code(failures[0])


def _failures_alone(raised: BaseException) -> list[TolariaError]:
    """A task group wraps what its tasks raise. What is no failure of Tolaria's is a defect, and raised as it is."""
    if isinstance(raised, TolariaError):
        return [raised]
    if not isinstance(raised, BaseExceptionGroup) or raised.split(TolariaError)[1] is not None:
        raise raised
    return [failure for error in raised.exceptions for failure in _failures_alone(error)]
