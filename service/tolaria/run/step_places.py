"""Where in the data the steps of a run are: those that it has taken, and those that it is going to take."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Final

from tolaria.errors import InvalidFieldError
from tolaria.lane.messages import StepDone
from tolaria.values.training import BatchRange, EpochProgress

_STRETCHES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive steps of an epoch that follow one another in its data, each with `size` batches from `place` on."""

    first: int
    last: int
    epoch: int
    place: int
    size: int

    def of(self, step: int) -> BatchRange:
        """Returns the batches of a step."""
        begin = self.place + (step - self.first) * self.size
        return BatchRange(self.epoch, begin, begin + self.size - 1)

    def goes_on_with(self, step: StepDone) -> bool:
        """Whether a step is the next one of this stretch, with as many batches."""
        begin = self.place + (self.last + 1 - self.first) * self.size
        follows = (self.last + 1, self.epoch, begin) == (step.global_step, step.epoch, step.batches.start)
        return follows and len(step.batches) == self.size

    def up_to(self, step: int) -> _Stretch:
        """Returns the steps up to this one."""
        # Called for every step: `dataclasses.replace` takes four times as long.
        return _Stretch(self.first, step, self.epoch, self.place, self.size)

    def after(self, step: int) -> _Stretch:
        """Returns the steps after this one."""
        return replace(self, first=step + 1, place=self.of(step + 1).first)


class StepPlaces:
    """The batches of each step. `size` is the number of batches in a step of which none is left out.

    Of steps that a rollback has undone the batches stay known until other steps have their numbers.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: list[_Stretch] = []
        self._undone: list[_Stretch] = []
        self._step = 0
        self._epoch_steps = 0
        self.begun = False
        """Whether the position at which this process starts is known."""
        self.reached = (0, 0)
        """Epoch and place of the batch that is read next."""

    @property
    def epoch_batches(self) -> int:
        """Batches of an epoch, at most; 0 if that is not known."""
        return self._epoch_steps * self._size

    def begin(self, progress: EpochProgress, global_step: int, epoch_steps: int) -> None:
        """Takes the position at which a process starts; knows the steps before it if nothing was left out of them.

        `epoch_steps` is the number of steps in an epoch.
        """
        self.begun = True
        self._epoch_steps, number, steps = epoch_steps, progress.number, progress.steps
        self._go_to(progress, global_step)
        self._taken = []
        if progress.skipped_steps or -(-progress.batches // self._size) != steps:
            return
        before = global_step - steps
        if epoch_steps and before == (number - 1) * epoch_steps:
            for epoch in range(max(1, number - _STRETCHES_MAX // 2), number):
                last = epoch * epoch_steps
                self._taken.append(_Stretch(last - epoch_steps + 1, last, epoch, 0, self._size))
        if steps:
            self._taken.append(_Stretch(before + 1, global_step, number, 0, self._size))

    def step(self, step: StepDone) -> None:
        """Adds a step that was taken, or skipped: then its batches belong to none."""
        self.reached = (step.epoch, step.batches.stop)
        if step.skipped:
            return
        self._step = step.global_step
        if self._taken and self._taken[-1].goes_on_with(step):
            self._taken[-1] = self._taken[-1].up_to(step.global_step)
            return
        number, place = step.global_step, step.batches.start
        self._taken.append(_Stretch(number, number, step.epoch, place, max(1, len(step.batches))))
        del self._taken[:-_STRETCHES_MAX]

    def rewound(self, progress: EpochProgress, global_step: int) -> None:
        """Follows a rollback; what it has undone stays known."""
        undone = [each.after(global_step) if each.first <= global_step else each for each in self._taken]
        undone = [each for each in undone if each.first <= each.last]
        last = undone[-1].last if undone else global_step
        self._undone = [*undone, *(each for each in self._undone if each.first > last)]
        kept = [each for each in self._taken if each.first <= global_step]
        self._taken = [each.up_to(min(each.last, global_step)) for each in kept]
        self._go_to(progress, global_step)

    def of(self, step: int) -> BatchRange:
        """Returns the batches of a step that was taken, or undone; else those that it has if no step is skipped.

        Raises InvalidFieldError for a step of an earlier process if its batches are not known.
        """
        known = self._taken if step <= self._step else self._undone
        place = bisect_right(known, step, key=lambda stretch: stretch.first) - 1
        if place >= 0 and step <= known[place].last:
            return known[place].of(step)
        if step > self._step:
            return self._expected(step - self._step - 1)
        raise InvalidFieldError(
            "from_step",
            f"step {step} was taken by an earlier process, and steps were skipped, so that its batches are not known: "
            "name them by --epoch (the event step_skipped in the log has places)",
        )

    def _expected(self, ahead: int) -> BatchRange:
        """Returns the batches of the step that `ahead` others precede."""
        epoch, place = self.reached
        left = max(0, self._epoch_steps - -(-place // self._size))
        if ahead < left or not self._epoch_steps:
            begin = place + ahead * self._size
        else:
            later, number = divmod(ahead - left, self._epoch_steps)
            epoch, begin = epoch + 1 + later, number * self._size
        return BatchRange(max(1, epoch), begin, begin + self._size - 1)

    def _go_to(self, progress: EpochProgress, global_step: int) -> None:
        self._step = global_step
        self.reached = (progress.number + 1, 0) if progress.over else (progress.number, progress.batches)
