"""Positions and epoch progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pydantic import JsonValue  # not needed to load an exported model

HOST: Final = "host"
"""The source name of the host model's loss, and the owner of every parameter outside the seeds."""


def eager_name(name: str) -> str:
    """Returns a module's or parameter's name without the parts that `torch.compile` adds around what it wraps.

    So runs share checkpoints, whether compiled or not.
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True, slots=True)
class Position:
    """A point in training: completed optimizer steps, and the epoch (from 1; 0 before the first)."""

    global_step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A process that computes: its rank, host, process id, device, and the number of its machine in the group."""

    rank: int
    host: str
    pid: int
    device: str
    node: int = 0


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank has spent in the steps of an epoch, and its memory.

    Attributes:
        input_wait_s: waits for its data.
        rank_wait_s: waits for slower ranks: the least is that of the slowest one.
        memory_bytes: the most that its process has had in memory so far.
    """

    input_wait_s: float
    rank_wait_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, order=True)
class BatchRange:
    """Batches of an epoch, by their places from 0; `first` and `last` are included."""

    epoch: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1


def merged(ranges: Iterable[BatchRange]) -> tuple[BatchRange, ...]:
    """Returns the same batches in order, with as few ranges as possible."""
    found: list[BatchRange] = []
    for each in sorted(ranges):
        before = found[-1] if found else None
        if before is not None and before.epoch == each.epoch and each.first <= before.last + 1:
            found[-1] = BatchRange(each.epoch, before.first, max(before.last, each.last))
        else:
            found.append(each)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """Progress of the current or last epoch.

    Attributes:
        number: the epoch, from 1; 0 before the first.
        over: whether the epoch has ended.
        batches: batches that the cursor has returned.
        steps: steps that changed the parameters.
        skipped_steps: steps that were skipped because a loss or gradient was not finite.
        samples: samples of all steps.
        loss_sum: sum of the losses of `steps`.
        stop: why the run ends with this epoch, before its last one; empty if it does not.
    """

    number: int = 0
    over: bool = True
    batches: int = 0
    steps: int = 0
    skipped_steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    stop: str = ""

    @property
    def loss(self) -> float:
        """The mean loss per step; NaN before the first."""
        return self.loss_sum / self.steps if self.steps else float("nan")

    def begun(self, number: int) -> EpochProgress:
        """Returns the progress at the start of epoch `number`."""
        return EpochProgress(number, over=False)

    # These two are called for every step; dataclasses.replace would take twice as long.

    def after_batch(self) -> EpochProgress:
        """Returns the progress after one more batch was read."""
        batches = self.batches + 1
        return EpochProgress(
            self.number, self.over, batches, self.steps, self.skipped_steps, self.samples, self.loss_sum
        )

    def after_step(self, loss: float, samples: int, *, skipped: bool) -> EpochProgress:
        """Returns the progress after one more step; the loss of a skipped step is ignored."""
        steps, skipped_steps, loss_sum = self.steps, self.skipped_steps, self.loss_sum
        if skipped:
            skipped_steps += 1
        else:
            steps, loss_sum = steps + 1, loss_sum + loss
        return EpochProgress(
            self.number, self.over, self.batches, steps, skipped_steps, self.samples + samples, loss_sum
        )

    def ended(self, stop: str = "") -> EpochProgress:
        """Returns the progress with the epoch over, and the run too if there is a reason to `stop`."""
        return replace(self, over=True, stop=stop)

    def to_json(self) -> dict[str, JsonValue]:
        """Returns the progress under the key names of the saved training state."""
        values = {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}
        if not self.stop:  # as states of earlier versions are, whose digests cover it
            del values["stop"]
        return values

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> EpochProgress:
        """Returns the progress that `to_json` wrote; raises KeyError if a key is missing."""
        names = {field.name: _JSON_KEYS.get(field.name, field.name) for field in fields(cls)}
        del names["stop"]
        return cls(**{name: state[key] for name, key in names.items()}, stop=str(state.get("stop", "")))


_JSON_KEYS: Final = {"skipped_steps": "void_steps"}
"""Saved states have a name of an earlier version."""
