"""`tolaria config`: checks and shows the settings, as a service that is started here would find them."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.errors import ConfigurationError

config_app = typer.Typer(help="Check or show the settings.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@config_app.command()
def check(*, config_file: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the settings, and the files of certificates, keys, tokens and passwords that they name.

    Reports every problem with which a service would not start, with exit code 2; what would only be warned of, such as
    a certificate that has expired or a key that all users can read; and settings that are retired.
    """
    problems, warnings, exposed = _findings(config_file, overrides)
    if as_json:
        typer.echo(json.dumps({"valid": not problems, "problems": problems, "warnings": warnings}, indent=2))
    else:
        for warning in warnings:
            typer.echo(warning, err=True)
    if problems:
        raise exposed if exposed and len(problems) == 1 else ConfigurationError(problems)
    if not as_json:
        typer.echo("the configuration is valid")


@config_app.command("show")
def show_config(*, config_file: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the settings as TOML with the meaning of each; secrets are masked.

    `(live)`: `tolaria reload` changes it in a running service; the others wait for a restart.
    """
    from tolaria.config import as_toml, is_live, load_settings

    settings = load_settings(config_file, overrides or [])
    if not as_json:
        typer.echo(as_toml(settings), nl=False)
        return
    values: dict[str, Any] = settings.model_dump(mode="json")
    document = {
        name: {
            field: {
                "value": values[name][field],
                "live": is_live(type(section), field),
                "description": type(section).model_fields[field].description,
            }
            for field in values[name]
        }
        for name, section in settings
    }
    typer.echo(json.dumps(document, indent=2))


def _findings(
    config_file: Path | None, overrides: list[str] | None
) -> tuple[list[str], list[str], ConfigurationError | None]:
    """Returns what a start would refuse, what it would warn of, and the error of an exposed address among the first."""
    from tolaria.config import exposure_warnings, load_settings, require_extras, require_protection
    from tolaria.security.certificates import now_utc
    from tolaria.service.credentials import credential_findings
    from tolaria.trackers.tracker import check_trackers

    try:
        settings = load_settings(config_file, overrides or [])
    except ConfigurationError as error:
        return error.problems, [], None
    problems, warnings, exposed = list[str](), list(settings.notices), None
    try:
        require_protection(settings)
        warnings += exposure_warnings(settings)
    except ConfigurationError as error:
        problems, exposed = error.problems, error
    for check_packages in (partial(require_extras, settings), partial(check_trackers, settings.tracking)):
        try:
            check_packages()
        except ConfigurationError as error:
            problems = [*problems, *error.problems]
    for finding in credential_findings(settings, now_utc()):
        advice = f" ({finding.advice})" if finding.advice else ""
        (problems if finding.fatal else warnings).append(f"{finding.setting}: {finding.detail}{advice}")
    return problems, warnings, exposed
