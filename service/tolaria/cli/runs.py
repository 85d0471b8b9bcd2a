"""`tolaria runs`: the runs of state directories, without a service, also while one uses the directory."""

# ruff: noqa: PLC0415 - as in `tolaria.cli.commands`: --help imports nothing slow
from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.completion import complete_run
from tolaria.cli.errors import CommandFailedError
from tolaria.cli.render import duration, one_line, print_table
from tolaria.errors import ConfigurationError

if TYPE_CHECKING:
    from tolaria.checkpoint.runs import PastRun

runs_app = typer.Typer(help="List, show and compare the runs of a state directory.", no_args_is_help=True)

COLUMNS = ("run", "name", "job", "began (UTC)", "outcome", "epoch", "step", "metrics", "incidents")
_CHECKPOINT_COLUMNS = ("checkpoint", "epoch", "step", "metric", "state")
_INCIDENT_COLUMNS = ("time (UTC)", "kind", "step", "reason")
_ABSENT = "-"
_VOLATILE = ("training.run_name", "training.tags", "state.dir", "server.listen", "metrics.listen", "signals.path")
"""Settings that are different for every run, and say nothing about its result."""

StateDirs = Annotated[
    list[Path] | None,
    typer.Option("--state-dir", metavar="DIR", help="State directory; may be repeated (default: state.dir)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@runs_app.command("list")
def list_runs(
    *,
    state_dirs: StateDirs = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the runs, oldest first: how they ended, how far they came, and their last evaluation."""
    records = _read(state_dirs, config_file, overrides)
    if as_json:
        typer.echo(json.dumps([_summary(record) for record in records], indent=2))
    elif not records:
        typer.echo("there is no run yet")
    else:
        print_table([_row(record) for record in records], COLUMNS)


@runs_app.command("show")
def show_run(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Id, the beginning of one, a name, or newest.", autocompletion=complete_run),
    ] = "newest",
    *,
    state_dirs: StateDirs = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show one run: its checkpoints with the metric of each, incidents, and settings that are not the defaults."""
    record = _find(_read(state_dirs, config_file, overrides), run)
    if as_json:
        typer.echo(json.dumps(_whole(record), indent=2))
        return
    for label, value in _summary(record).items():
        typer.echo(f"{label.replace('_', ' '):15}{_text(value)}")
    typer.echo(f"{'commands':15}{record.commands} of the controller applied")
    if record.checkpoints:
        typer.echo("\ncheckpoints")
        print_table(
            [
                (row.checkpoint_id, str(row.epoch), str(row.global_step), _number(row.metric), _state(row))
                for row in record.checkpoints
            ],
            _CHECKPOINT_COLUMNS,
        )
    if record.incidents:
        typer.echo("\nincidents")
        print_table(
            [
                (_time(one.at_ns), one.kind, str(max(0, one.global_step)), one_line(one.reason))
                for one in record.incidents
            ],
            _INCIDENT_COLUMNS,
        )
    if changed := _changed(record):
        typer.echo("\nsettings that are not the defaults")
        for name, value in changed.items():
            typer.echo(f"  {name} = {one_line(json.dumps(value))}")
    elif not record.settings:
        typer.echo("\nthe settings of this run are not known")


@runs_app.command("compare")
def compare_runs(
    first: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Id, the beginning of one, a name, or newest.", autocompletion=complete_run),
    ],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other one.", autocompletion=complete_run)],
    *,
    state_dirs: StateDirs = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs: results side by side, and the settings that differ.

    Runs of several directories are found with --state-dir for each.
    """
    records = _read(state_dirs, config_file, overrides)
    pair = [_find(records, first), _find(records, second)]
    if pair[0] is pair[1]:
        raise CommandFailedError(f"{first} and {second} are both run {pair[0].row.run_id}: name two runs")
    settings = _differing(pair)
    unknown = [record.row.run_id for record in pair if not record.settings]
    if as_json:
        document = {
            "runs": [_whole(record, brief=True) for record in pair],
            "settings": {
                name: dict(zip(("first", "second"), values, strict=True)) for name, values in settings.items()
            },
            "settings_unknown": unknown,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    summaries = [_summary(record) for record in pair]
    rows = [(label.replace("_", " "), *(_text(one[label]) for one in summaries)) for label in summaries[0]]
    names = sorted({name for record in pair for name in record.metrics})
    rows += [(name, *(_number(record.metrics.get(name)) for record in pair)) for name in names]
    print_table([row for row in rows if row[0] != "metrics"], ("", "first", "second"))
    typer.echo("")
    if unknown:
        typer.echo(f"settings are not known of {', '.join(unknown)}")
    elif not settings:
        typer.echo("no setting differs")
    else:
        shown = [(name, *(one_line(json.dumps(value)) for value in values)) for name, values in settings.items()]
        print_table(shown, ("setting", "first", "second"))


def _read(state_dirs: list[Path] | None, config_file: Path | None, overrides: list[str] | None) -> list[PastRun]:
    """Returns the runs of all directories, oldest first. Raises ConfigurationError, JournalError."""
    from tolaria.checkpoint.directory import JOURNAL
    from tolaria.checkpoint.runs import read_runs
    from tolaria.config import load_settings

    directories, origin = state_dirs or [], "--state-dir"
    if not directories:
        directories, origin = [Path(load_settings(config_file, overrides or []).state.dir)], "state.dir"
    records: list[PastRun] = []
    for directory in directories:
        if not (directory / JOURNAL).is_file():
            hint = "" if state_dirs else "; give --state-dir"
            raise ConfigurationError(
                [f"{origin}: {directory} holds no {JOURNAL}: no service has kept its state there{hint}"]
            )
        records += read_runs(directory)
    return sorted(records, key=lambda record: record.row.at_ns)


def _find(records: Sequence[PastRun], wanted: str) -> PastRun:
    """Returns the run that is meant. Raises BadParameter."""
    if not records:
        raise typer.BadParameter("there is no run yet")
    if wanted == "newest":
        return records[-1]
    exact = [record for record in records if wanted in {record.row.run_id, record.name}]
    found = exact or [record for record in records if wanted and record.row.run_id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise typer.BadParameter(
            f"{wanted!r} is {', '.join(record.row.run_id for record in found)}: give more of the id"
        )
    known = ", ".join(record.row.run_id for record in records[-8:])
    raise typer.BadParameter(f"there is no run {wanted!r}; the newest are {known}")


def _summary(record: PastRun) -> dict[str, Any]:
    """Returns what is known of a run in a few lines; times are ISO 8601 in UTC."""
    row, newest, origin = record.row, record.newest, record.branched_from
    return {
        "run_id": row.run_id,
        "name": record.name,
        "job": row.job,
        "state_dir": str(record.directory),
        "began": _iso(row.at_ns),
        "ended": None if row.ended_at_ns is None else _iso(row.ended_at_ns),
        "outcome": record.outcome,
        "branched_from": None if origin is None else f"step {origin.global_step} of run {origin.run_id}",
        "epoch": 0 if newest is None else newest.epoch,
        "step": 0 if newest is None else newest.global_step,
        "metrics": dict(record.metrics),
        "evaluated_step": None if record.evaluated_step < 0 else record.evaluated_step,
        "incidents": len(record.incidents),
    }


def _whole(record: PastRun, *, brief: bool = False) -> dict[str, Any]:
    document = _summary(record) | {"commands": record.commands}
    if brief:
        return document
    return document | {
        "checkpoints": [
            {
                "checkpoint_id": row.checkpoint_id,
                "at": _iso(row.at_ns),
                "epoch": row.epoch,
                "step": row.global_step,
                "metric": row.metric,
                "state": row.state,
                "proven": bool(row.proven),
                "suspect": bool(row.suspect),
            }
            for row in record.checkpoints
        ],
        "incidents": [
            {"kind": one.kind, "at": _iso(one.at_ns), "step": one.global_step, "reason": one.reason}
            for one in record.incidents
        ],
        "settings": dict(record.settings),
    }


def _row(record: PastRun) -> tuple[str, ...]:
    summary = _summary(record)
    metrics = ", ".join(f"{one_line(name)} {_number(value)}" for name, value in sorted(record.metrics.items()))
    return (
        record.row.run_id,
        one_line(record.name) or _ABSENT,
        one_line(record.row.job),
        _time(record.row.at_ns),
        record.outcome
        + (f" after {duration((record.row.ended_at_ns - record.row.at_ns) / 1e9)}" if record.row.ended_at_ns else ""),
        str(summary["epoch"]),
        str(summary["step"]),
        metrics or _ABSENT,
        str(len(record.incidents)),
    )


def _changed(record: PastRun) -> dict[str, Any]:
    """Returns the settings of a run that are not the defaults."""
    from tolaria.config import Settings

    defaults = {
        f"{section}.{name}": value
        for section, fields in Settings().model_dump(mode="json").items()
        for name, value in fields.items()
    }
    return {name: value for name, value in record.settings.items() if defaults.get(name, ...) != value}


def _differing(pair: Sequence[PastRun]) -> dict[str, tuple[Any, Any]]:
    """Returns both values of each setting that differs, without those of the machine and the name."""
    first, second = (record.settings for record in pair)
    names = [*first, *(name for name in second if name not in first)]
    return {
        name: (first.get(name), second.get(name))
        for name in names
        if first.get(name) != second.get(name) and name not in _VOLATILE
    }


def _state(row: Any) -> str:
    judged = "proven" if row.proven else "suspect" if row.suspect else "unproven"
    return f"{row.state}, {judged}" + (f": {one_line(row.detail)}" if row.detail else "")


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.6g}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{one_line(name)} {_number(item)}" for name, item in sorted(value.items())) or _ABSENT
    return _ABSENT if value is None else one_line(str(value)) or _ABSENT


def _moment(at_ns: int) -> datetime:
    return datetime.fromtimestamp(at_ns // 10**9, UTC)


def _time(at_ns: int) -> str:
    return _moment(at_ns).strftime("%Y-%m-%d %H:%M:%S")


def _iso(at_ns: int) -> str:
    return _moment(at_ns).strftime("%Y-%m-%dT%H:%M:%SZ")
