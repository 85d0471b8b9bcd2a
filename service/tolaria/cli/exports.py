"""`tolaria export`: takes the model out of a state directory, or has a running service do so."""

from __future__ import annotations

import uuid
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from leyline.v1.admin_service_pb2 import (
    EXPORT_FORMAT_HF,
    EXPORT_FORMAT_SAFETENSORS,
    EXPORT_FORMAT_TORCH,
    ExportModelRequest,
)
from tolaria.cli.admin_commands import ConfigFile, Overrides, RequestId, Timeout
from tolaria.cli.completion import complete_export
from tolaria.cli.errors import CommandFailedError, ServiceUnreachableError
from tolaria.errors import ConfigurationError

if TYPE_CHECKING:
    from tolaria.export.card import ExportCard
    from tolaria.export.writing import ExportOrder

export_app = typer.Typer()

_MB = 10**6
EXPORT_TIMEOUT_S = 1800.0  # large models are read, verified and written

_TargetOptions: TypeAlias = "tuple[str | None, float, Path | None, list[str] | None]"


class ExportFormat(StrEnum):
    """The forms of an export."""

    SAFETENSORS = "safetensors"
    HF = "hf"
    TORCH = "torch"


class Values(StrEnum):
    """The weights of an export."""

    MODEL = "model"
    EMA = "ema"


_NUMBERS = {
    ExportFormat.SAFETENSORS: EXPORT_FORMAT_SAFETENSORS,
    ExportFormat.HF: EXPORT_FORMAT_HF,
    ExportFormat.TORCH: EXPORT_FORMAT_TORCH,
}


@export_app.command()
def export(
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory to create; an existing one is refused.")],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="ID|best|newest",
            help="Checkpoint whose model is exported.",
            autocompletion=complete_export,
        ),
    ] = "newest",
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format", help="safetensors: any model; hf: for from_pretrained of transformers; torch: a state_dict."
        ),
    ] = ExportFormat.SAFETENSORS,
    fold: Annotated[
        bool, typer.Option("--fold", help="Multiply seeds that are linear maps (lora) into the layer beside them.")
    ] = False,
    weights: Annotated[
        Values, typer.Option("--weights", help="model: its own; ema: their moving average (ema.decay).")
    ] = Values.MODEL,
    job: Annotated[
        str, typer.Option("--job", help="Job that builds the model, for --fold (default: that of the run).")
    ] = "",
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="Largest file of weights, in MB.")] = 5000,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="State directory (default: state.dir).")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Have this running service export, on its machine: --to is a name in its state directory's exports.",
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Reason, which a service records.")] = "tolaria export",
    request_id: RequestId = None,
    timeout_s: Timeout = EXPORT_TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Take the model out of a checkpoint, with the seeds that it has grown, under the job's own names.

    Reads the state directory, also while a service uses it. tolaria.export.load(DIR, build_model) gives the model back.
    """
    if address is not None:
        if state_dir is not None or job:
            raise typer.BadParameter("--state-dir and --job cannot be combined with --address: a service reads its own")
        request = ExportModelRequest(
            request_id=request_id or str(uuid.uuid4()), reason=reason, checkpoint=checkpoint, name=str(to), fold=fold
        )
        request.format, request.shard_bytes, request.ema = _NUMBERS[form], shard_mb * _MB, weights is Values.EMA
        _export_there(request, client_target=(address, timeout_s, config_file, overrides), as_json=as_json)
        return
    from tolaria.export.writing import ExportOrder  # noqa: PLC0415 - not needed for --help

    directory = state_directory(state_dir, config_file, overrides)
    order = ExportOrder(directory, checkpoint, form.value, to, fold, job, shard_mb * _MB, weights.value)
    _export_here(order, as_json=as_json)


def _export_here(order: ExportOrder, *, as_json: bool) -> None:
    from tolaria.export.writing import export_model  # noqa: PLC0415 - not needed for --help

    try:
        card = export_model(order)
    except OSError as error:
        raise CommandFailedError(f"{order.state_dir} cannot be read: {error.strerror or error}") from None
    show_card(card, str(order.target), as_json=as_json)


def state_directory(state_dir: Path | None, config_file: Path | None, overrides: list[str] | None) -> Path:
    """Returns the state directory, which exists. Raises ConfigurationError."""
    directory, origin, hint = state_dir, "--state-dir", ""
    if directory is None:
        from tolaria.config import load_settings  # noqa: PLC0415 - not needed for --help

        directory, origin = Path(load_settings(config_file, overrides or []).state.dir), "state.dir"
        hint = "; give --state-dir"
    if not directory.is_dir():
        raise ConfigurationError([f"{origin}: there is no directory {directory}{hint}"])
    return directory


def _export_there(request: ExportModelRequest, *, client_target: _TargetOptions, as_json: bool) -> None:
    from tolaria.cli import client  # noqa: PLC0415 - imports grpc, which --help does not need
    from tolaria.export.card import ExportCard  # noqa: PLC0415 - likewise

    try:
        answer = client.call(client.target(*client_target), lambda admin: admin.ExportModel, request)
    except ServiceUnreachableError as error:
        repeat = f"--request-id {request.request_id} repeats it safely"
        raise ServiceUnreachableError(f"{error}; {repeat}") from None
    show_card(ExportCard.from_text(answer.card, answer.path), answer.path, as_json=as_json)


def show_card(card: ExportCard, place: str, *, as_json: bool) -> None:
    """Prints what an export holds."""
    if as_json:
        typer.echo(card.to_text(), nl=False)
        return
    typer.echo(f"exported step {card.global_step}, epoch {card.epoch} of checkpoint {card.checkpoint_id} to {place}")
    if card.values != "model":
        typer.echo(f"  the values are the moving average of the weights ({card.values})")
    typer.echo(f"  {card.format}: {', '.join([*card.weights, *sorted(set(card.files) - set(card.weights))])}")
    if card.metrics:
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in card.metrics.items())
        typer.echo(f"  evaluated at step {card.evaluated_step}: {metrics}")
    for seed in card.seeds:
        what = f"not in the export: {seed.left_out}" if seed.left_out else f"alpha {seed.alpha:g}"
        typer.echo(f"  seed {seed.seed_id} ({seed.blueprint}, {seed.stage.lower()}) in slot {seed.slot}: {what}")
    if card.fold:
        _show_fold(card)
    if card.left_out:
        typer.echo(f"  left out, since they are outside the transformers model: {', '.join(card.left_out)}")


def _show_fold(card: ExportCard) -> None:
    for seed_id, reason in card.fold["kept"].items():
        typer.echo(f"  seed {seed_id} is not folded: {reason}")
    if "largest_difference" in card.fold:
        typer.echo(
            f"  folding changes the output by at most {card.fold['largest_difference']:.3g}, on a validation batch "
            f"with outputs up to {card.fold['largest_output']:.3g}"
        )
    elif card.fold["folded"]:
        typer.echo("  the difference could not be measured: the model's output is no tensor")
