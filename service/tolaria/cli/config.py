"""`tolaria config`: the settings in force, checked or shown. Must not know what a setting means."""

from __future__ import annotations

from pathlib import Path

import typer

from tolaria.config import as_toml, load_settings


def check(config_file: Path | None, overrides: list[str]) -> None:
    """Print one line when the settings can be used.

    Raises:
        ConfigurationError: with every problem found.
    """
    load_settings(config_file, overrides)
    typer.echo("the configuration is valid")


def show(config_file: Path | None, overrides: list[str]) -> None:
    """Print the settings as TOML, secrets masked.

    Raises:
        ConfigurationError: with every problem found.
    """
    typer.echo(as_toml(load_settings(config_file, overrides)), nl=False)
