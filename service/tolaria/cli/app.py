"""The console script. Owns the order of the first steps; must not know the commands.

Imports late, since a signal may come while the rest is being imported.
"""

# ruff: noqa: PLC0415 - the reason stands above
from __future__ import annotations

import sys

from tolaria.cli.starting import QuietWhenInterrupted, open_standard_streams, take_early_signals


def main() -> None:
    """Run the command that the arguments ask for. Ends the process with the exit code of what happened."""
    open_standard_streams()
    # The other commands start nothing that needs more than the default.
    if sys.argv[1:2] == ["serve"]:
        take_early_signals()
    with QuietWhenInterrupted():
        _run()


def _run() -> None:
    from tolaria.cli.output import tell_of_output_errors
    from tolaria.config import quieten_grpc

    quieten_grpc()
    tell_of_output_errors()
    from tolaria.cli.edge import told
    from tolaria.cli.failures import OutputError
    from tolaria.cli.grammar import app

    try:
        app(prog_name="tolaria")
    except OutputError as error:  # of a help text, which is printed before any command runs
        sys.exit(told([error]))
