"""What chaos has cost a run: the final state beside that of an undisturbed run, checkpoints, processes, and time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from tolaria.checkpoint.directory import JOURNAL
from tolaria.checkpoint.inspection import Condition, Finding, inspect_storage
from tolaria.cli import render
from tolaria.cli.chaos import Chaos, Death
from tolaria.errors import JournalError
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import CheckpointRow

_ENDS_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class FinalState:
    """Step and digest of the last checkpoint of a run."""

    step: int
    digest: str

    @classmethod
    def of(cls, state_dir: Path) -> FinalState | None:
        """Reads a state directory; returns None if it holds no checkpoint."""
        try:
            rows = read_journal(state_dir / JOURNAL, CheckpointRow)
        except JournalError:
            return None
        last = [row for row in rows if row.state == "committed"][-1:]
        return cls(last[0].global_step, last[0].digest) if last else None

    def __str__(self) -> str:
        return f"step {self.step}, digest {self.digest}"


@dataclass(frozen=True, slots=True)
class Harm:
    """What is left of a run after chaos.

    `failure` says why the undisturbed run has no final state, if it has none. `rollbacks` counts those of the run,
    which may be the reason for another final state.
    """

    chaos: Chaos
    seed: int
    state: FinalState | None
    undisturbed: FinalState | None
    failure: str = ""
    whole: int = 0
    bad: tuple[str, ...] = ()
    left: tuple[int, ...] = ()
    rollbacks: int = 0

    @property
    def problems(self) -> list[str]:
        """What was lost, and what could not be found out, as sentences."""
        found = []
        if not self.chaos.deaths:
            found.append("the run was over before any process was killed; more epochs take longer")
        if self.undisturbed is None:
            found.append(f"the undisturbed run has no final state: {self.failure or 'it wrote no checkpoint'}")
        elif self.state != self.undisturbed:
            hint = "; it was rolled back, to a point that depends on time" if self.rollbacks else ""
            found.append(f"the final state is not that of the undisturbed run{hint}")
        if self.bad:
            found.append(f"{len(self.bad)} checkpoints or journals are damaged: {'; '.join(self.bad)}")
        if self.left:
            found.append(f"processes are left: {', '.join(map(str, self.left))}")
        return found

    def lines(self) -> list[str]:
        """Returns the report as text: a line for each death, how long recoveries took, and what was lost."""
        deaths, planned = self.chaos.deaths, len(self.chaos.injuries)
        unmet = f"; the run was over before {planned - len(deaths)} more" if len(deaths) < planned else ""
        uninvited = [render.one_line(cause) for cause in self.chaos.uninvited]
        return [
            f"chaos, seed {self.seed}: {_counted(len(deaths), 'death')}{unmet}",
            *(f"  {death_line(death)}" for death in deaths),
            *(f"  and one that was not part of it: {cause}" for cause in uninvited),
            *self._time_lines(),
            f"final state: {self.state or 'none'}; undisturbed: {self.undisturbed or 'none'}: {self._verdict}",
            f"checkpoints: {self.whole} verified, {len(self.bad)} damaged",
            f"processes: {len(self.chaos.tree)} seen, {len(self.left) or 'none'} left",
            *(f"LOST: {problem}" for problem in self.problems),
            *([] if self.problems else ["nothing was lost"]),
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the report as values of JSON."""
        times = self._times
        return {
            "seed": self.seed,
            "deaths": [_death_json(death) for death in self.chaos.deaths],
            "planned": len(self.chaos.injuries),
            "uninvited": list(self.chaos.uninvited),
            "recovery_s_median": round(statistics.median(times), 3) if times else None,
            "recovery_s_max": round(max(times), 3) if times else None,
            "steps_repeated": sum(death.repeated for death in self.chaos.deaths),
            "digests": [state.digest if state else None for state in (self.state, self.undisturbed)],
            "checkpoints_verified": self.whole,
            "checkpoints_damaged": len(self.bad),
            "processes_left": len(self.left),
            "lost": self.problems,
        }

    @property
    def _times(self) -> list[float]:
        return [death.recovery_s for death in self.chaos.deaths if death.recovery_s is not None]

    @property
    def _verdict(self) -> str:
        return "equal" if self.state is not None and self.state == self.undisturbed else "NOT EQUAL"

    def _time_lines(self) -> Iterator[str]:
        if times := self._times:
            repeated = sum(death.repeated for death in self.chaos.deaths)
            yield (
                f"from death to the first good step: median {statistics.median(times):.1f} s, longest "
                f"{max(times):.1f} s; {_counted(repeated, 'step')} taken again"
            )


async def harm_of(
    chaos: Chaos, *, seed: int, state_dir: Path, undisturbed_dir: Path, failure: str = "", rollbacks: int = 0
) -> Harm:
    """Examines what two services have left that have ended."""
    left = await chaos.tree.left(_ENDS_WITHIN_S)
    findings = await anyio.to_thread.run_sync(_findings, state_dir)
    return Harm(
        chaos,
        seed,
        state=await anyio.to_thread.run_sync(FinalState.of, state_dir),
        undisturbed=None if failure else await anyio.to_thread.run_sync(FinalState.of, undisturbed_dir),
        failure=failure,
        whole=sum(finding.condition == Condition.WHOLE for finding in findings if finding.name != "journal"),
        bad=tuple(f"{finding.name}: {finding.detail}" for finding in findings if finding.bad),
        left=left,
        rollbacks=rollbacks,
    )


def death_line(death: Death) -> str:
    """Returns what happened on one line."""
    injury = death.injury
    what = f"step {death.step}: {injury.victim} got {injury.signal.name}"
    if not death.cause:
        return f"{what}: training went on, and the service did not notice"
    lost = f"{what}: {render.one_line(death.cause)}"
    if death.restored_step is None or death.recovery_s is None:
        return f"{lost}; there was no step after it"
    again = f" at the {death.processes}. attempt" if death.processes > 1 else ""
    return f"{lost}; back at step {death.restored_step}{again}, first good step after {death.recovery_s:.1f} s"


def _death_json(death: Death) -> dict[str, Any]:
    return {
        "victim": death.injury.victim,
        "signal": death.injury.signal.name,
        "step": death.step,
        "cause": death.cause,
        "restored_step": death.restored_step,
        "recovery_s": None if death.recovery_s is None else round(death.recovery_s, 3),
    }


def _findings(state_dir: Path) -> list[Finding]:
    try:
        return list(inspect_storage(state_dir))
    except (JournalError, OSError) as error:
        return [Finding("journal", Condition.UNREADABLE, str(error))]


def _counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
