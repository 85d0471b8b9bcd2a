"""Gives a new run's model the values of an export, or of a checkpoint of another run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tolaria.checkpoint.directory import JOURNAL
from tolaria.errors import ExportMismatchError, ExportRefusedError
from tolaria.export.card import CARD, ExportedSeed, read_card, verify_files
from tolaria.export.loading import fill, read_tensors
from tolaria.export.source import NEWEST, read_source
from tolaria.export.writing import ExportOrder, contents
from tolaria.state.encoding import tensor_view


def warm_start(model: nn.Module, place: Path) -> str:
    """Copies the values into the model, which has to have the same tensors; returns a sentence about them.

    Args:
        model: the model that the job has built, without seeds.
        place: the directory of an export, of a checkpoint in its state directory, or a state directory, whose newest
            checkpoint is taken.

    Raises:
        ExportRefusedError: there is none of these, or its model has seeds, which a new run cannot take over.
        ExportDamagedError, CheckpointDamagedError: it differs from what was written.
        ExportMismatchError: the model has other tensors, which are named.
        NoCheckpointError, CheckpointUnreadableError, JournalError: see `read_source`.
    """
    if (place / CARD).is_file():
        card = read_card(place)
        verify_files(place, card)
        if card.left_out:
            detail = f"it lacks {len(card.left_out)} tensors of the job's model ({card.left_out[0]}, ...)"
            raise ExportMismatchError(str(place), detail)
        _refuse_seeds(card.grown, place)
        fill(model, read_tensors(place, card), card.tied, str(place))
        return f"the model starts with the values of the export {place}, of step {card.global_step}"
    if (place / JOURNAL).is_file():
        source = read_source(place, NEWEST)
    elif (place.parent.parent / JOURNAL).is_file():
        source = read_source(place.parent.parent, place.name)
    else:
        raise ExportRefusedError(f"{place} is neither an export, nor a checkpoint, nor a state directory")
    card, weights = contents(source, ExportOrder(place, NEWEST, "safetensors", place))
    _refuse_seeds(card.grown, place)
    tensors = {name: tensor_view(spec, weights.buffers[name]) for name, spec in weights.specs.items()}
    fill(model, tensors, card.tied, str(place))
    return f"the model starts with the values of checkpoint {card.checkpoint_id}, of step {card.global_step}"


def _refuse_seeds(grown: tuple[ExportedSeed, ...], place: Path) -> None:
    if grown:
        names = ", ".join(seed.seed_id for seed in grown)
        raise ExportRefusedError(
            f"the model of {place} has seeds ({names}), which a new run cannot take over; export it with --fold, if "
            "they can be folded, or load it in the job's build_model with tolaria.export.load"
        )
