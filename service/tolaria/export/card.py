"""The form of an export: the names of its files, and the card, which says what the files hold. No torch.

An export is a directory: weights in the safetensors format or in PyTorch's own, `tolaria.json`, which is the
card, and for `transformers` a `config.json`. The card is written last but one rename, so that an export with a card is
complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from tolaria.errors import ExportDamagedError

Format: TypeAlias = Literal["safetensors", "hf", "torch"]

CARD: Final = "tolaria.json"
CARD_VERSION: Final = 1
TORCH_FILE: Final = "model.pt"
TRANSIENT_FILE: Final = "transient.safetensors"
"""Buffers that the model's `state_dict` leaves out."""

_PIECE_BYTES: Final = 2**22


@dataclass(frozen=True, slots=True)
class ExportedSeed:
    """A seed that the run has grown, in the order of its slot. `left_out` says why the export lacks it; usually empty.

    `alpha` is the factor of its output at the step of the export.
    """

    seed_id: str
    blueprint: str
    slot: str
    stage: str
    alpha: float
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class ExportCard:
    """What an export holds, and where it is from.

    Attributes:
        run_id, checkpoint_id, global_step, epoch: the state that was exported.
        digest: of the whole training state, as `tolaria restore-points` and `tolaria verify` show it.
        metrics: of the newest evaluation, which was made at `evaluated_step`; -1: there was none.
        seeds: those that the run has grown.
        slots: path, features and layout of each slot by name.
        tied: further names of tensors in the model's `state_dict`, with the names under which the files have them.
        weights: the files with weights, in the order in which they are read.
        files: the SHA-256 of each file but the card.
        left_out: tensors of the model that a `transformers` export does not have, because they are outside that model.
        job, job_options, random_seed: how the run's model is built, as far as the run's settings are known.
        values: `model`, or `ema` for the average of the weights.
        run_name, tags: as people have named the run.
        fold: what was folded, and the difference that this makes; empty if nothing was asked for.
    """

    format: Format
    run_id: str
    checkpoint_id: str
    global_step: int
    epoch: int
    created_at: str
    digest: str
    metrics: Mapping[str, float]
    evaluated_step: int
    seeds: tuple[ExportedSeed, ...]
    slots: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]
    weights: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    job: str = ""
    job_options: Mapping[str, Any] = field(default_factory=dict)
    random_seed: int | None = None
    run_name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    tolaria: str = ""
    values: str = "model"
    fold: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grown(self) -> tuple[ExportedSeed, ...]:
        """The seeds that the export has."""
        return tuple(seed for seed in self.seeds if not seed.left_out)

    def to_text(self) -> str:
        """Returns the card as JSON."""
        return json.dumps({"version": CARD_VERSION} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> ExportCard:
        """Returns the card that `to_text` wrote. Raises ExportDamagedError for another text or version."""
        try:
            document = json.loads(text)
            version = document.pop("version")
            if version != CARD_VERSION:
                raise ExportDamagedError(where, f"{CARD} has version {version}; known is {CARD_VERSION}")
            seeds = tuple(ExportedSeed(**seed) for seed in document.pop("seeds"))
            known = {each.name for each in fields(cls)}
            rest = {name: value for name, value in document.items() if name in known}
            tuples = {name: tuple(rest[name]) for name in ("weights", "left_out")}
            return cls(**rest | {"seeds": seeds} | tuples)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportDamagedError(where, f"{CARD}: {type(error).__name__}: {error}") from error


def read_card(place: Path) -> ExportCard:
    """Returns the card of the export in this directory. Raises ExportDamagedError if there is none."""
    try:
        text = (place / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportDamagedError(str(place), f"{CARD} cannot be read: {error}") from error
    return ExportCard.from_text(text, str(place))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file. Raises OSError."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()


def verify_files(place: Path, card: ExportCard) -> None:
    """Compares the files of an export with the card. Raises ExportDamagedError that names one that differs."""
    for name, digest in card.files.items():
        try:
            found = file_digest(place / name)
        except OSError as error:
            raise ExportDamagedError(str(place), f"{name} cannot be read: {error.strerror or error}") from error
        if found != digest:
            raise ExportDamagedError(str(place), f"{name} is not what was written (SHA-256 {found}, not {digest})")
