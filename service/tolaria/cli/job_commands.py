"""`tolaria new-job` writes a job to start from; `tolaria check-job` builds a job and shows what Tolaria finds."""

from __future__ import annotations

import importlib
import json
import keyword
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import StrEnum
from importlib.machinery import PathFinder
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tolaria.cli.admin_commands import ConfigFile, Overrides
from tolaria.cli.errors import CommandFailedError
from tolaria.errors import ConfigurationError

if TYPE_CHECKING:
    from tolaria.config import Settings

job_app = typer.Typer()

_NEXT = """{path} trains {what}. Next:

  tolaria check-job {module}:Job                     # builds it and shows what Tolaria finds
  tolaria serve --set training.job={module}:Job --set preset=plain --set service.exit_when_done=true
  tolaria export --to model                          # takes the trained model out"""


class JobKind(StrEnum):
    """The jobs that can be written."""

    IMAGE = "image"
    LM = "lm"
    TABLE = "table"
    HF = "hf"


_WHAT = {
    JobKind.IMAGE: "a convolutional network on handwritten digits",
    JobKind.LM: "a small transformer on the characters of a file",
    JobKind.TABLE: "a small network on the rows of a table",
    JobKind.HF: "a small GPT-2 of transformers on the characters of a file",
}


@job_app.command("new-job")
def new_job(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="File to create; an existing one is kept.")],
    *,
    kind: Annotated[JobKind, typer.Option(help="What it trains.")] = JobKind.IMAGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file and the name of the job as JSON.")] = False,
) -> None:
    """Write a small commented job that runs as it is, and change it from there."""
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise typer.BadParameter(f"{path.name} cannot be imported: name it with letters, digits and _, ending in .py")
    if _is_installed(path.stem):
        raise typer.BadParameter(f"{path.name} would hide the installed module {path.stem}: give it another name")
    text = files("tolaria.cli").joinpath("templates", f"{kind}.py.txt").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandFailedError(f"{path} exists already; it is kept as it is") from None
    except OSError as error:
        raise CommandFailedError(f"{path} cannot be written: {error.strerror or error}") from None
    if as_json:
        typer.echo(json.dumps({"path": str(path), "kind": kind.value, "job": f"{path.stem}:Job"}))
        return
    typer.echo(_NEXT.format(path=path, what=_WHAT[kind], module=path.stem))


def _is_installed(module: str) -> bool:
    """Whether Python has a module of that name outside the working directory."""
    if module in sys.stdlib_module_names:
        return True
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != Path.cwd()]
    return PathFinder.find_spec(module, elsewhere) is not None


@job_app.command("check-job")
def check_job(
    job: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The job, as training.job names it.")],
    *,
    timed_steps: Annotated[int, typer.Option("--steps", min=1, max=10_000, help="Steps that are timed.")] = 10,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build a job, take the first look that a service takes, train a few steps, and show what was found.

    Nothing is written, and no service is needed. A mistake in the job is reported as tolaria serve would, with code 2.
    """
    from tolaria.config import load_settings  # noqa: PLC0415 - not needed for --help
    from tolaria.trackers.tracker import check_trackers  # noqa: PLC0415 - as above

    settings = load_settings(config_file, [*(overrides or []), f"training.job={job}"])
    if settings.lane.processes > 1:
        raise ConfigurationError(["lane.processes: check-job builds the job in one process; give lane.processes=1"])
    check_trackers(settings.tracking)
    sys.path.insert(0, str(Path.cwd()))  # as in the lane's process
    with _printing_to_stderr() if as_json else nullcontext():
        rows, notes = _report(settings, timed_steps)
    if as_json:
        typer.echo(json.dumps(dict(rows) | {"notes": notes}, indent=2))
        return
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        typer.echo(f"{label:{width}}{text}")
    for note in notes:
        typer.echo(f"{'note':{width}}{note}")


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Has what the job prints, and the programs that it starts, go to standard error: standard output is the report."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _report(settings: Settings, steps: int) -> tuple[list[tuple[str, str]], list[str]]:
    # Imported by name, as the service does, so that torch is absent from the import graph of the command line.
    module: Any = importlib.import_module("tolaria.lane.job_report")
    rows, notes = module.report(settings, steps)
    return cast("list[tuple[str, str]]", rows), list(notes)
