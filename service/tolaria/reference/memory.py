"""What the reference Tamiyo remembers of one run: a bounded, immutable record that can be rewound.

Owns recording and forgetting. Must not know what is decided from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_PROBATIONARY, SEED_STAGE_SHADOWING
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.reference.decisions import Decision, ScaleLearningRate

RECORDS_MAX = 256
NOTES_MAX = 64
_WITH_EFFECT = frozenset({SEED_STAGE_BLENDING, SEED_STAGE_SHADOWING, SEED_STAGE_PROBATIONARY})


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch as it was reported, and what was decided on it. Losses may be NaN or infinite."""

    epoch: int
    step: int
    training_loss: float
    validation_loss: float
    accuracy: float
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class SeedNote:
    """When a seed began to have an effect, the validation accuracy it is measured against, and its probation so far."""

    seed_id: str
    step: int
    accuracy_before: float
    probation_step: int | None = None
    probation_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class RunMemory:
    """A run so far. `first_loss` and `rate_changes` (their steps) outlive the records, which are bounded."""

    first_loss: float = math.nan
    records: tuple[EpochRecord, ...] = ()
    notes: tuple[SeedNote, ...] = ()
    retreat_asked_step: int | None = None
    rate_changes: tuple[int, ...] = ()

    def with_epoch(self, state: SystemStatePacket) -> RunMemory:
        """The memory after an epoch's state. What was recorded at its step or later has been undone."""
        kept = self.rewound(state.global_step - 1)
        record = EpochRecord(
            epoch=state.current_epoch,
            step=state.global_step,
            training_loss=state.training_loss,
            validation_loss=state.validation_loss,
            accuracy=state.validation_accuracy,
        )
        return RunMemory(
            first_loss=kept.first_loss if math.isfinite(kept.first_loss) else state.training_loss,
            records=(*kept.records, record)[-RECORDS_MAX:],
            notes=_noted(kept, state),
            rate_changes=kept.rate_changes,
        )

    def with_decision(self, decision: Decision | None) -> RunMemory:
        """The memory with what was decided on its newest record."""
        newest = replace(self.records[-1], decision=decision)
        changed = (newest.step,) if isinstance(decision, ScaleLearningRate) else ()
        return replace(self, records=(*self.records[:-1], newest), rate_changes=(*self.rate_changes, *changed))

    def rewound(self, target_step: int) -> RunMemory:
        """The memory without anything after `target_step`."""
        records = tuple(record for record in self.records if record.step <= target_step)
        if len(records) == len(self.records):
            return self
        notes = tuple(_rewound_note(note, target_step) for note in self.notes if note.step <= target_step)
        # A rollback restores the learning rates too, so that a change that it undoes was none.
        changes = tuple(step for step in self.rate_changes if step <= target_step)
        return RunMemory(self.first_loss if records else math.nan, records, notes, rate_changes=changes)


def _noted(kept: RunMemory, state: SystemStatePacket) -> tuple[SeedNote, ...]:
    """Notes on the seeds that have an effect now; the others' notes go."""
    known = {note.seed_id: note for note in kept.notes}
    # Measured against the best of what older seeds are measured against: one that does harm must not lower the bar.
    latest = kept.records[-1].accuracy if kept.records else state.validation_accuracy
    before = max(filter(math.isfinite, (latest, *(note.accuracy_before for note in kept.notes))), default=-math.inf)
    notes = []
    for seed in {seed.seed_id: seed for seed in state.seed_states if seed.stage in _WITH_EFFECT}.values():
        note = known.get(seed.seed_id) or SeedNote(seed.seed_id, state.global_step, before)
        if seed.stage != SEED_STAGE_PROBATIONARY:
            note = replace(note, probation_step=None, probation_epoch=None)
        elif note.probation_step is None:
            note = replace(note, probation_step=state.global_step, probation_epoch=state.current_epoch)
        notes.append(note)
    return tuple(notes[:NOTES_MAX])


def _rewound_note(note: SeedNote, target_step: int) -> SeedNote:
    if note.probation_step is None or note.probation_step <= target_step:
        return note
    return replace(note, probation_step=None, probation_epoch=None)
