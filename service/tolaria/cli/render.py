"""Text output: a status as rows, as a live view or as plain lines; tables; JSON."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leyline.v1.admin_service_pb2 import GetStatusResponse, LearningRateAdjustment, RankStatus, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, EmergencyLevel, HealthStatus, SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState

Show = Callable[[GetStatusResponse], None]

_NOT_YET = "not yet"
_NONE = "none"
_UNKNOWN = "?"
_LABEL_WIDTH = 14
_ADJUSTMENTS_SHOWN = 4
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = (("d", 86400), ("h", 3600), ("min", 60))
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
        ("name", _name(status)),
        ("branch of", _branch(status)),
        ("progress", _progress(status)),
        ("learned", training_figures(status)),
        ("logged", ", ".join(f"{one_line(name)} {value:.5g}" for name, value in sorted(status.logged.items()))),
        ("learning rate", _learning_rates(status)),
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
        ("nodes", _nodes(status)),
        ("ranks", _ranks(status)),
        ("fast paths", _pairs(status.fast_paths)),
        ("metrics", f"http://{one_line(status.metrics_address)}/metrics" if status.metrics_address else ""),
        ("version", one_line(f"{status.version}, up {status.uptime_s:.0f} s") if status.version else ""),
    ]
    return [row for row in rows if row[1]]


def _name(status: GetStatusResponse) -> str:
    """Returns the run's name and its tags; empty without both."""
    tags = ", ".join(f"{one_line(key)}={one_line(status.tags[key])}" for key in sorted(status.tags))
    return "; ".join(filter(None, (one_line(status.run_name), tags)))


def _branch(status: GetStatusResponse) -> str:
    """Returns where the run has branched off; empty if it has not."""
    if not status.HasField("branched_from"):
        return ""
    origin = status.branched_from
    place = f"{one_line(origin.checkpoint_id)} in {one_line(origin.directory)}"
    return f"run {one_line(origin.run_id)} at step {origin.global_step} (checkpoint {place})"


def _ranks(status: GetStatusResponse) -> str:
    """Returns where several ranks compute; empty for one."""
    return ", ".join(map(_rank, status.ranks)) if len(status.ranks) > 1 else ""


def _rank(rank: RankStatus) -> str:
    waits = f"; waited {rank.input_wait_s:.1f} s for data and {rank.rank_wait_s:.1f} s for ranks" * bool(
        rank.memory_bytes
    )
    return f"{rank.rank} on {one_line(rank.host)} {one_line(rank.device)} (pid {rank.pid}{waits})"


def _nodes(status: GetStatusResponse) -> str:
    """Returns which ranks are on which machine; empty for one machine."""
    ranks = defaultdict[tuple[int, str], list[str]](list)
    for rank in status.ranks:
        ranks[rank.node, one_line(rank.host)].append(str(rank.rank))
    named = [
        f"{host} (rank{'s' * (len(numbers) > 1)} {', '.join(numbers)})" for (_, host), numbers in sorted(ranks.items())
    ]
    return f"{len(named)}: {', '.join(named)}" if len(named) > 1 else ""


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
        f"epoch {epoch}/{status.epochs}" if status.epochs else f"epoch {epoch}",
        _step(status),
        training_figures(status),
        *_control_figures(status),
        _rollback_count(status),
    ]
    return "  ".join(part for part in parts if part)


def training_figures(status: GetStatusResponse) -> str:
    """Returns training loss, validation loss and accuracy; before the first validation both of its figures are 0."""
    if status.global_step == 0:
        return _NOT_YET
    if status.unevaluated:
        return f"loss {status.training_loss:.4f}"
    validation = f"validation {_NOT_YET}"
    if status.validation_loss or status.validation_accuracy:
        validation = f"validation loss {status.validation_loss:.4f}"
        figures = dict(status.validation_metrics)
        if not figures or "accuracy" in figures:  # a service of an earlier version sends no figures
            validation += f", accuracy {status.validation_accuracy:.2%}"
        own = sorted(name for name in figures if name not in {"loss", "accuracy"})
        validation += "".join(f", {one_line(name)} {figures[name]:.5g}" for name in own)
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


def _learning_rates(status: GetStatusResponse) -> str:
    """Returns the rates by group, and the newest adjustments in force."""
    rates = _pairs({group: f"{rate:.3g}" for group, rate in status.learning_rates.items()}) or _NOT_YET
    older = len(status.adjustments) - _ADJUSTMENTS_SHOWN
    more = [f"{older} older adjustments"] if older > 0 else []
    rates += f" by {one_line(status.learning_rate_schedule)}" if status.learning_rate_schedule else ""
    return "; ".join([rates, *map(_adjustment, status.adjustments[-_ADJUSTMENTS_SHOWN:]), *more])


def _adjustment(adjustment: LearningRateAdjustment) -> str:
    what = f"factor {adjustment.factor:g}" if adjustment.HasField("factor") else f"value {adjustment.value:g}"
    group = f" for {one_line(adjustment.group)}" if adjustment.group else ""
    until = f" until step {adjustment.expires_at_step}" if adjustment.expires_at_step else ""
    return f"{what}{group} by {one_line(adjustment.origin)}{until}"


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
        f"data left out on request: {status.data_skips} (tolaria skip --list)" if status.data_skips else "",
        f"newest proven restore point at step {status.newest_proven_step}"
        if status.HasField("newest_proven_step")
        else "",
    )
    return "; ".join(part for part in parts if part)


def _state(status: GetStatusResponse) -> str:
    reason = f": {one_line(status.state_reason)}" if status.state_reason else ""
    return f"{enum_word(RunState.DESCRIPTOR, status.state)}{reason}"


def _progress(status: GetStatusResponse) -> str:
    left = f", about {duration(status.remaining_s)} left" if status.HasField("remaining_s") else ""
    of_epoch = f"step {status.epoch_step}/{status.steps_per_epoch} of it"
    rate = f"{_rate(status.samples_per_s)} samples/s{left}"
    if status.steps:
        return f"{_step(status)} in all, epoch {status.epoch}, {of_epoch}, {rate}"
    return f"epoch {status.epoch}/{status.epochs}, {of_epoch}, {status.global_step} steps in all, {rate}"


def _step(status: GetStatusResponse) -> str:
    """Returns the step, and where the run is counted in steps, how many there are to be."""
    return f"step {status.global_step}/{status.steps}" if status.steps else f"step {status.global_step}"


def _rate(per_s: float) -> str:
    """Returns a rate without a fraction, or a small one with two significant digits."""
    return f"{per_s:.0f}" if per_s >= 10 or not per_s else f"{per_s:.2g}"


def _control_figures(status: GetStatusResponse) -> list[str]:
    """Returns the parts of an epoch's line about controller and seeds; none without a controller."""
    if not status.boundary_budget_ms:
        return []
    return [
        f"boundary {status.last_boundary_ms:.1f} of {status.boundary_budget_ms:g} ms",
        f"tamiyo: {one_line(status.tamiyo_answer) or _NOT_YET}",
        f"kasmina: {one_line(status.kasmina_answer) or _NOT_YET}",
        f"seeds: {seed_list(status.seeds)}",
    ]


def _boundary(status: GetStatusResponse) -> str:
    if status.last_boundary_ms == 0:
        return _NOT_YET
    if not status.boundary_budget_ms:  # there is no controller to wait for
        return ""
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
    if status.steps:
        whole, of_run, text = status.steps, float(min(status.global_step, status.steps)), _step(status)
    else:
        whole, text = max(status.epochs, 1), f"epoch {status.epoch}/{status.epochs}"
        of_run = min(max(status.epoch - 1, 0) + of_epoch, status.epochs)
        if status.state == RunState.RUN_STATE_FINISHED:
            of_run = status.epochs
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(width=_LABEL_WIDTH)
    bars.add_column(ratio=1)
    bars.add_column(justify="right")
    bars.add_row("run", ProgressBar(total=whole, completed=of_run), text)
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
