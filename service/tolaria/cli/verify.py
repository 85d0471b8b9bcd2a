"""`tolaria verify`: whether a state directory holds what was written. Must not know how that is found out."""

from __future__ import annotations

from pathlib import Path

import typer

from tolaria.cli.failures import StorageDamagedError
from tolaria.cli.words import one_line
from tolaria.config import load_settings
from tolaria.errors import ConfigurationError


def verify(state_dir: Path | None, config_file: Path | None, overrides: list[str]) -> None:
    """Print a line for the journal and for each checkpoint as soon as it has been read.

    Raises:
        ConfigurationError: the settings cannot be used, or there is nothing that a service has kept.
        StorageDamagedError: something is not what was written.
        JournalError: the journal cannot be read.
    """
    directory, origin = _directory(state_dir, config_file, overrides)
    # Late, because this is what imports torch: a wrong directory is told in a moment, and no other command pays.
    from tolaria.checkpoint.inspection import inspect_storage  # noqa: PLC0415 - the reason stands above
    from tolaria.checkpoint.storage import JOURNAL  # noqa: PLC0415

    if not (directory / JOURNAL).is_file():
        raise ConfigurationError([f"{origin}: {directory} holds no {JOURNAL}: no service has kept its state there"])
    looked_at = bad = 0
    try:
        for finding in inspect_storage(directory):
            typer.echo(f"{one_line(finding.name)}: {finding.condition}, {one_line(finding.detail, length_max=500)}")
            looked_at, bad = looked_at + 1, bad + finding.bad
    except OSError as error:
        raise StorageDamagedError(f"{directory} cannot be read: {error.strerror or error}") from None
    if bad:
        told = (
            f"{bad} of {looked_at} are not what was written; the next start of the service sets aside what is damaged"
        )
        raise StorageDamagedError(f"{told}, and resumes from the newest checkpoint that is whole")


def _directory(state_dir: Path | None, config_file: Path | None, overrides: list[str]) -> tuple[Path, str]:
    origin = "--state-dir" if state_dir is not None else "state.dir"
    directory = state_dir if state_dir is not None else Path(load_settings(config_file, overrides).state.dir)
    if not directory.is_dir():
        hint = "" if state_dir is not None else "; give --state-dir"
        raise ConfigurationError([f"{origin}: there is no directory {directory}{hint}"])
    return directory, origin
