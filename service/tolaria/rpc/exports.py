"""Exports that operators ask for: where they go, and the answer."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import structlog

from leyline.v1 import admin_service_pb2 as admin
from tolaria.checkpoint.directory import JOURNAL
from tolaria.errors import ExportFailedError, InvalidFieldError, TolariaError
from tolaria.export.card import ExportCard, Format
from tolaria.export.source import NEWEST, best_direction, choose
from tolaria.export.writing import SHARD_BYTES, ExportOrder, export_model
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import CheckpointRow

EXPORTS: Final = "exports"
"""The directory in the state directory below which operators' exports are written."""

_FORMATS: Final[dict[int, Format]] = {
    admin.EXPORT_FORMAT_UNSPECIFIED: "safetensors",
    admin.EXPORT_FORMAT_SAFETENSORS: "safetensors",
    admin.EXPORT_FORMAT_HF: "hf",
    admin.EXPORT_FORMAT_TORCH: "torch",
}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def export_order(request: admin.ExportModelRequest, state_dir: Path) -> ExportOrder:
    """Returns what a request asks for, with an empty target if it names none. Raises InvalidFieldError."""
    if request.format not in _FORMATS:
        raise InvalidFieldError("format", f"must be safetensors (1), hf (2) or torch (3), is {request.format}")
    if request.name and not _NAME.fullmatch(request.name):
        raise InvalidFieldError(
            "name", "must be the name of a directory: at most 128 letters, digits, dots, dashes and underscores"
        )
    return ExportOrder(
        state_dir,
        request.checkpoint or NEWEST,
        _FORMATS[request.format],
        state_dir / EXPORTS / request.name,
        fold=request.fold,
        shard_bytes=request.shard_bytes or SHARD_BYTES,
        values="ema" if request.ema else "model",
    )


class Exports:
    """Carries out exports, one at a time: each holds a whole checkpoint in memory. Used on the event loop only."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._one_thread = anyio.CapacityLimiter(1)

    async def carry_out(self, request: admin.ExportModelRequest) -> tuple[ExportCard, Path]:
        """Exports once earlier requests have been, and returns the card and the place. Cancellation stops it.

        Raises:
            InvalidFieldError: a field of the request is wrong.
            TolariaError: as `export_model` does; errors that nothing foresaw are ExportFailedError too.
        """
        order, stop = export_order(request, self._state_dir), threading.Event()
        try:
            return await anyio.to_thread.run_sync(
                _carry_out, order, stop, abandon_on_cancel=True, limiter=self._one_thread
            )
        finally:
            stop.set()


def _carry_out(order: ExportOrder, stop: threading.Event) -> tuple[ExportCard, Path]:
    try:
        if order.target == order.state_dir / EXPORTS:  # the request names none
            rows = read_journal(order.state_dir / JOURNAL, CheckpointRow)
            row = choose(rows, order.checkpoint, direction=best_direction(order.state_dir))
            name = f"{row.checkpoint_id}-{order.format}{'-folded' * order.fold}{'-ema' * (order.values == 'ema')}"
            order = replace(order, checkpoint=row.checkpoint_id, target=order.target / name)
        return export_model(order, stop=stop), order.target
    except TolariaError:
        raise
    except Exception as error:
        # Whatever it is, MemoryError included: an export is no reason to end the run.
        structlog.get_logger(__name__).exception("export_failed", target=str(order.target))
        raise ExportFailedError(f"the export failed: {type(error).__name__}: {error}") from error


def export_answer(card: ExportCard, place: Path, *, global_step: int) -> admin.ExportModelResponse:
    """Returns the answer to a request that has been carried out."""
    return admin.ExportModelResponse(
        global_step=global_step,
        path=str(place.absolute()),
        checkpoint_id=card.checkpoint_id,
        exported_step=card.global_step,
        digest=card.digest,
        card=card.to_text(),
    )
