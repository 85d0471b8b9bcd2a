"""Text output: a status as rows, as a live view or as plain lines; tables; the answers to requests; JSON."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import IO

import typer
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.json_format import MessageToDict, MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leyline.v1 import admin_service_pb2 as messages
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, EmergencyLevel, HealthStatus, RollbackTier, SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState

Show = Callable[[GetStatusResponse], None]

RESTORE_POINT_COLUMNS = ("tier", "step", "epoch", "age", "size", "digest", "id", "attempt", "state")
INCIDENT_COLUMNS = ("time (UTC)", "kind", "step", "reason")

_NOT_YET = "not yet"
_NONE = "none"
_UNKNOWN = "?"
_LABEL_WIDTH = 14
_DIGEST_LENGTH_SHOWN = 12
_PATH_LENGTH_MAX = 4096
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
_FRACTION = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?", re.ASCII)
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_STYLES = {
    RunState.RUN_STATE_RUNNING: "green",
    RunState.RUN_STATE_FINISHED: "bold green",
    RunState.RUN_STATE_PAUSED: "yellow",
    RunState.RUN_STATE_DRAINING: "yellow",
    RunState.RUN_STATE_HALTED: "bold red",
    RunState.RUN_STATE_FAILED: "bold red",
}


def one_line(text: str, *, length_max: int = 200) -> str:
    """Returns text from a peer or a file as one bounded line of printable characters, safe for a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text[: 4 * length_max])
    joined = " ".join(printable.split())
    return joined if len(joined) <= length_max else joined[: length_max - 1] + "…"


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """Returns an enum value's name in lower case without the enum's prefix; `unknown (N)` for an unknown number."""
    if number not in enum.values_by_number:
        return f"unknown ({number})"
    prefix = enum.values_by_number[0].name.rpartition("_")[0]  # value 0 is PREFIX_UNSPECIFIED or PREFIX_UNKNOWN
    return enum.values_by_number[number].name.removeprefix(f"{prefix}_").lower().replace("_", " ")


def size(size_bytes: int) -> str:
    """Formats a number of bytes in binary units: `512 B`, `1.5 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    power = min((size_bytes.bit_length() - 1) // 10, len(_BINARY_UNITS))
    return f"{size_bytes / 1024**power:.1f} {_BINARY_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """Formats a duration in its largest whole unit: `42 s`, `3 min`, `5 h`, `2 d`."""
    unit, length_s = next(((unit, length_s) for unit, length_s in _TIME_UNITS if seconds >= length_s), ("s", 1))
    return f"{int(seconds // length_s)} {unit}"


def json_text(message: Message, *, indent: int | None = 2) -> str:
    """Returns proto3's JSON mapping of a message, with every field present."""
    return MessageToJson(message, indent=indent, always_print_fields_with_no_presence=True)


def status_rows(status: GetStatusResponse) -> list[tuple[str, str]]:
    """Returns every row of a status that applies."""
    run_id, job = one_line(status.run_id) or _UNKNOWN, one_line(status.job) or _UNKNOWN
    rows = [
        ("run", f"{run_id}, job {job}, {_state(status)}"),
        ("progress", _progress(status)),
        ("learned", training_figures(status)),
        ("learning rate", _pairs({group: f"{rate:.3g}" for group, rate in status.learning_rates.items()}) or _NOT_YET),
        ("tamiyo", one_line(status.tamiyo_answer) or _NOT_YET),
        ("kasmina", one_line(status.kasmina_answer) or _NOT_YET),
        ("phase", _phase(status)),
        ("boundary", _boundary(status)),
        ("seeds", seed_list(status.seeds)),
        ("gradients", gradient_list(status.seeds)),
        ("commands", command_counts(status)),
        ("history", _history(status)),
        ("health", _health(status)),
        *(row for row in safety_rows(status) if row[1] != _NONE),
        ("fast paths", _pairs(status.fast_paths)),
        ("metrics", f"http://{one_line(status.metrics_address)}/metrics" if status.metrics_address else ""),
        ("version", one_line(f"{status.version}, up {status.uptime_s:.0f} s") if status.version else ""),
    ]
    return [row for row in rows if row[1]]


def safety_rows(status: GetStatusResponse) -> list[tuple[str, str]]:
    """Returns the emergency level, the reasons for conservative mode, and the circuit breakers."""
    emergency = enum_word(EmergencyLevel.DESCRIPTOR, status.emergency_level) if status.emergency_level else _NONE
    breakers = {name: enum_word(CircuitBreakerState.DESCRIPTOR, state) for name, state in status.breakers.items()}
    return [
        ("emergency", emergency),
        ("conservative", one_line(", ".join(status.conservative_reasons)) or _NONE),
        ("breakers", "all closed" if set(breakers.values()) == {"closed"} else _pairs(breakers) or _NONE),
    ]


def epoch_line(status: GetStatusResponse, epoch: int) -> str:
    """Returns one line for a finished epoch."""
    parts = [
        f"epoch {epoch}/{status.epochs}",
        f"step {status.global_step}",
        training_figures(status),
        f"boundary {status.last_boundary_ms:.1f} of {status.boundary_budget_ms:g} ms",
        f"tamiyo: {one_line(status.tamiyo_answer) or _NOT_YET}",
        f"kasmina: {one_line(status.kasmina_answer) or _NOT_YET}",
        f"seeds: {seed_list(status.seeds)}",
        _rollback_count(status),
    ]
    return "  ".join(part for part in parts if part)


def training_figures(status: GetStatusResponse) -> str:
    """Returns training loss, validation loss and accuracy; before the first validation both of its figures are 0."""
    if status.global_step == 0:
        return _NOT_YET
    validation = f"validation {_NOT_YET}"
    if status.validation_loss or status.validation_accuracy:
        validation = f"validation loss {status.validation_loss:.4f}, accuracy {status.validation_accuracy:.2%}"
    return f"loss {status.training_loss:.4f}, {validation}"


def seed_list(seeds: Iterable[SeedState]) -> str:
    """Returns each seed with its stage and its blueprint."""
    texts = []
    for seed in seeds:
        blueprint = f" ({one_line(seed.blueprint_id)})" if seed.blueprint_id else ""
        texts.append(f"{one_line(seed.seed_id)} {enum_word(SeedLifecycleStage.DESCRIPTOR, seed.stage)}{blueprint}")
    return ", ".join(texts) or _NONE


def gradient_list(seeds: Iterable[SeedState]) -> str:
    """Returns weight, share and conflicts of the seeds whose gradients are merged with the host's; empty if none."""
    texts = [
        f"{one_line(seed.seed_id)} weight {seed.metrics['weight']:.2f}, {seed.metrics['share']:.0%} of the norms, "
        f"conflicts {seed.metrics['conflict_ratio']:.0%}"
        for seed in seeds
        if "weight" in seed.metrics and seed.metrics["weight"] > 0
    ]
    return "; ".join(["host weight 1", *texts]) if texts else ""


def command_counts(status: GetStatusResponse) -> str:
    """Returns how many of the controller's commands were accepted and rejected, and the number of rollbacks if any."""
    counts = f"{status.commands_accepted} accepted, {status.commands_rejected} rejected"
    return f"{counts}, {_rollback_count(status)}" if status.rollbacks else counts


def _rollback_count(status: GetStatusResponse) -> str:
    return f"{status.rollbacks} rollback{'' if status.rollbacks == 1 else 's'}" if status.rollbacks else ""


def _phase(status: GetStatusResponse) -> str:
    """Returns what the lane does other than steps, and for how long."""
    return f"{one_line(status.phase)} for {status.phase_s:.1f} s" if status.phase else ""


def _history(status: GetStatusResponse) -> str:
    """Returns what became of earlier steps: rollbacks by origin, skipped steps, the newest proven restore point."""
    origins = ", ".join(f"{count} by {one_line(name)}" for name, count in sorted(status.rollbacks_by_origin.items()))
    parts = (
        f"rollbacks: {origins}" if origins else "",
        f"attempt {status.attempt}" if status.attempt else "",
        f"highest step {status.best_step}" if status.best_step > status.global_step else "",
        f"{status.skipped_steps} steps skipped" if status.skipped_steps else "",
        f"newest proven restore point at step {status.newest_proven_step}"
        if status.HasField("newest_proven_step")
        else "",
    )
    return "; ".join(part for part in parts if part)


def _state(status: GetStatusResponse) -> str:
    reason = f": {one_line(status.state_reason)}" if status.state_reason else ""
    return f"{enum_word(RunState.DESCRIPTOR, status.state)}{reason}"


def _progress(status: GetStatusResponse) -> str:
    return (
        f"epoch {status.epoch}/{status.epochs}, step {status.epoch_step}/{status.steps_per_epoch} of it, "
        f"{status.global_step} steps in all, {status.samples_per_s:.0f} samples/s"
    )


def _boundary(status: GetStatusResponse) -> str:
    if status.last_boundary_ms == 0:
        return _NOT_YET
    return (
        f"{status.last_boundary_ms:.1f} of {status.boundary_budget_ms:g} ms, p50 {status.boundary_ms_p50:.1f}, "
        f"p99 {status.boundary_ms_p99:.1f}, {status.boundaries_over_budget} over budget"
    )


def _health(status: GetStatusResponse) -> str:
    if not status.HasField("health"):
        return ""
    word = enum_word(HealthStatus.DESCRIPTOR, status.health.status)
    return f"{word}: {one_line(status.health.summary, length_max=400)}" if status.health.summary else word


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{one_line(name)} {one_line(value)}" for name, value in sorted(values.items()))


def print_status(status: GetStatusResponse, console: Console | None = None) -> None:
    """Prints one status, by default to standard output."""
    print_table(status_rows(status), console=console)


def print_table(rows: Sequence[Sequence[str]], names: Sequence[str] = (), *, console: Console | None = None) -> None:
    """Prints rows under column names, if any: as a table on a terminal, elsewhere as one line each, of any length."""
    console = console or Console(file=sys.stdout)
    if console.is_terminal:
        console.print(_table(rows, names))
        return
    lines = [names, *rows] if names else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip(), file=console.file
        )


def _table(rows: Sequence[Sequence[str]], names: Sequence[str] = ()) -> Table:
    """Returns a table with bold column names, or without names and with a bold first column."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(names))
    table.add_column(*names[:1], overflow="fold", style="" if names else "bold")
    for name in names[1:] or [""]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text does not interpret markup: an answer of a peer may contain brackets
    return table


@contextmanager
def live_view(console: Console, above: Callable[[], Sequence[str]] = list) -> Iterator[Show]:
    """Yields a function that shows each new status: in place on a terminal, elsewhere one line for each epoch.

    On a terminal the lines of `above` are shown over the status, whose last rows do not fit on a small one.
    """
    if not console.is_interactive:
        yield PlainLines(console.file).show
        return
    # Drawn only when a status arrives: no refresh thread is needed.
    with Live(console=console, auto_refresh=False) as live:
        yield lambda status: live.update(Group(*map(Text, above()), status_panel(status)), refresh=True)


def status_panel(status: GetStatusResponse) -> RenderableType:
    """Returns the live view of one status: progress bars of the run and the epoch above the table."""
    of_epoch = min(status.epoch_step / max(status.steps_per_epoch, 1), 1.0)
    of_run = min(max(status.epoch - 1, 0) + of_epoch, status.epochs)
    if status.state == RunState.RUN_STATE_FINISHED:
        of_run = status.epochs
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(width=_LABEL_WIDTH)
    bars.add_column(ratio=1)
    bars.add_column(justify="right")
    run_bar = ProgressBar(total=max(status.epochs, 1), completed=of_run)
    bars.add_row("run", run_bar, f"epoch {status.epoch}/{status.epochs}")
    bars.add_row("epoch", ProgressBar(total=1.0, completed=of_epoch), f"{status.epoch_step}/{status.steps_per_epoch}")
    style = _STYLES.get(status.state, "")
    title = Text(f"tolaria: {enum_word(RunState.DESCRIPTOR, status.state)}", style=style)
    return Panel(Group(bars, _table(status_rows(status))), title=title, border_style=style)


class PlainLines:
    """Prints a line for each finished epoch and each change of state; a repeated status prints nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._epochs_printed = 0
        self._state: int | None = None

    def show(self, status: GetStatusResponse) -> None:
        """Prints what is new in `status`; epochs that finished since the last status share a line."""
        # `epoch` counts epochs begun: the figures of an epoch are final once the next one begins or the run finishes.
        finished = status.epoch if status.state == RunState.RUN_STATE_FINISHED else max(status.epoch - 1, 0)
        if finished > self._epochs_printed:
            print(epoch_line(status, finished), file=self._file, flush=True)
        # After a rollback this is a lower number, and the repeated epochs are printed again.
        self._epochs_printed = finished
        if status.state != self._state:
            print(f"state {_state(status)}", file=self._file, flush=True)
        self._state = status.state


def restore_point_rows(points: Iterable[messages.RestorePoint], *, now_s: float) -> list[tuple[str, ...]]:
    """Returns table rows, the newest step first; ages are relative to `now_s`, in seconds since 1970."""
    return [
        (
            enum_word(RollbackTier.DESCRIPTOR, point.tier),
            str(point.global_step),
            str(point.epoch),
            duration(max(0.0, now_s - point.created_at.seconds)) if point.HasField("created_at") else _UNKNOWN,
            size(point.size_bytes),
            one_line(point.digest, length_max=_DIGEST_LENGTH_SHOWN),
            one_line(point.checkpoint_id) or "-",
            str(point.attempt),
            _point_state(point),
        )
        for point in sorted(points, key=lambda point: point.global_step, reverse=True)
    ]


def _point_state(point: messages.RestorePoint) -> str:
    state = "proven" if point.stable else "suspect" if point.suspect else "unproven"
    return f"superseded, {state}" if point.superseded else state


def incident_rows(incidents: Iterable[messages.Incident]) -> list[tuple[str, ...]]:
    """Returns table rows, the newest incident first."""
    newest_first = sorted(incidents, key=lambda i: (i.occurred_at.seconds, i.occurred_at.nanos), reverse=True)
    return [(_time(i.occurred_at), one_line(i.kind), str(i.global_step), _reason(i)) for i in newest_first]


def _time(moment: Timestamp) -> str:
    try:
        return (_UNIX_EPOCH + timedelta(seconds=moment.seconds)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return _UNKNOWN


def _reason(incident: messages.Incident) -> str:
    """Returns the reason and the details that are not empty; digests are mentioned only when they differ."""
    details = dict(incident.details)
    restored, captured = details.pop("state_digest", ""), details.pop("expected_digest", "")
    shown = [f"{one_line(name.replace('_', ' '))} {_rounded(text)}" for name, text in sorted(details.items()) if text]
    if restored and captured and restored != captured:
        shown.append("DIGESTS DIFFER")
    reason = one_line(incident.reason) or "no reason given"
    return f"{reason} ({', '.join(shown)})" if shown else reason


def _rounded(text: str) -> str:
    """Returns a number with a fraction with four digits, and other text as one line."""
    return f"{float(text):.4g}" if _FRACTION.fullmatch(text) else one_line(text)


def show_safety(answer: GetStatusResponse) -> None:
    """Prints the safety rows of a status."""
    for label, text in safety_rows(answer):
        typer.echo(f"{label}: {text}")


def show_restore_points(answer: messages.ListRestorePointsResponse) -> None:
    """Prints the restore points as a table."""
    if not answer.restore_points:
        typer.echo("there is no restore point yet")
        return
    print_table(restore_point_rows(answer.restore_points, now_s=time.time()), RESTORE_POINT_COLUMNS)


def show_incidents(answer: messages.ListIncidentsResponse) -> None:
    """Prints the incidents as a table."""
    if not answer.incidents:
        typer.echo("there is no incident")
        return
    print_table(incident_rows(answer.incidents), INCIDENT_COLUMNS)


def show_clearance(answer: messages.ClearEmergencyResponse) -> None:
    """Prints the state after a clearance, and what is left to do when training stays halted."""
    show_change("clear", answer)
    if answer.state == RunState.RUN_STATE_HALTED:
        typer.echo("training stays halted: tolaria resume --reason ... goes on with it")


def show_change(name: str, answer: Message) -> None:
    """Prints the step at which the change `name` took effect, then the other fields as `name value`."""
    values = MessageToDict(answer, preserving_proto_field_name=True)
    step = values.pop("global_step", 0)
    _took_effect(name, step, ", ".join(f"{field.replace('_', ' ')} {_plain(value)}" for field, value in values.items()))


def show_rollback(answer: messages.TriggerRollbackResponse) -> None:
    """Prints the step, the restore point, waiting and restoring apart, whether peers took part, and the digests."""
    tier = enum_word(RollbackTier.DESCRIPTOR, answer.tier)
    parts = [
        f"tier {tier}",
        one_line(answer.chosen),
        f"waited {answer.waited_ms:.1f} ms for the step boundary",
        f"restored in {answer.restored_ms:.1f} ms",
        "coordinated" if answer.coordinated else "uncoordinated: no majority went back together",
    ]
    _took_effect("rollback", answer.restored_step, ", ".join(part for part in parts if part))
    if answer.superseded:
        typer.echo(f"checkpoints superseded: {answer.superseded}; rollback --checkpoint ID goes back to one")
    if differing := differing_digests(answer):
        typer.secho(f"DIGESTS DIFFER: {differing}", fg=typer.colors.RED, bold=True)
    else:
        typer.echo(f"digests equal: {one_line(answer.state_digest)}")


def differing_digests(answer: messages.TriggerRollbackResponse) -> str:
    """Describes the digests of the restored and the captured state if they differ or are missing; empty if not."""
    if answer.state_digest and answer.state_digest == answer.expected_digest:
        return ""
    restored, captured = (one_line(digest) or _NONE for digest in (answer.state_digest, answer.expected_digest))
    return f"restored {restored}, captured {captured}"


def show_checkpoint(answer: messages.CreateCheckpointResponse) -> None:
    """Prints the id, size and digest of the checkpoint on disk."""
    detail = f"id {one_line(answer.checkpoint_id)}, {size(answer.size_bytes)}, digest {one_line(answer.digest)}"
    _took_effect("checkpoint", answer.global_step, detail)


def show_profile(answer: messages.CaptureProfileResponse) -> None:
    """Prints the path of the trace and the viewers for it."""
    detail = f"{one_line(answer.path, length_max=_PATH_LENGTH_MAX)}, {size(answer.size_bytes)}"
    _took_effect("profile", answer.global_step, detail)
    typer.echo("the file is on the service's machine; open it in https://ui.perfetto.dev or chrome://tracing")


def _took_effect(name: str, step: int, detail: str) -> None:
    typer.echo(f"{name}: took effect at step {step}{': ' if detail else ''}{detail}")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return one_line(str(value)).removeprefix("RUN_STATE_")
