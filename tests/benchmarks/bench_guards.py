"""The trial of guards: each on sound runs, which it must leave alone, and on ill ones, which it should heal.

    python tests/benchmarks/bench_guards.py [--quick] [--guards NAME ...] [--only TEXT] [--seed N] [--processes N]

Every guard has the same jobs and seeds. Compared are Tolaria with its default settings, clipping of gradients, skipping
of steps by OLMo-core's rule, and restarts from the last checkpoint, each of the latter in a textbook loop. Prints each
run that a guard harmed or did not heal, and the table.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import structlog
import torch
from structlog.typing import EventDict

from benchmarks.side_by_side import machine
from support.guard_jobs import ILL, SOUND, TRIALS, Trial
from support.guard_loops import Outcome, run_bare
from support.guard_runs import run_hosted
from support.guard_tasks import TASKS

WITHIN = 0.02
"""Share of a metric, or of the progress that training made in it, that an unharmed run may lose."""

WORDS = {
    "nothing": "nothing",
    "clipping": "clipping at 1",
    "skipping": "skipping (6 deviations of 128 steps)",
    "restarting": "restart from the last checkpoint",
    "tolaria": "Tolaria",
}
QUICK_SOUND = ("SGD, batch 512", "RMSprop, batch 16", "SGD, warm restarts", "curriculum, not announced")
QUICK_ILL = ("one NaN sample", "rate x 500", "bit flip")


@dataclass(frozen=True, slots=True)
class Run:
    """A trial under a guard."""

    trial: str
    guard: str
    seed: int

    def outcome(self) -> Outcome:
        """Runs it."""
        trial = TRIALS[self.trial]
        return run_hosted(trial, self.seed) if self.guard == "tolaria" else run_bare(trial, self.guard, self.seed)


def _drop(_logger: object, _method: str, _event: EventDict) -> EventDict:
    raise structlog.DropEvent


def perform(run: Run) -> Outcome:
    """Runs it in a worker process."""
    torch.set_num_threads(1)
    structlog.configure(processors=[_drop])
    outcome = run.outcome()
    outcome.losses.clear()
    return outcome


def loss_of(found: Outcome, clean: Outcome, trial: Trial) -> float:
    """Returns the share of the clean run's metric that was lost; of losses, the share of the progress that was made."""
    if TASKS[trial.task].has_accuracy:
        return (clean.metric - found.metric) / clean.metric
    return (found.metric - clean.metric) / (clean.first_metric - clean.metric)


def healed(found: Outcome, clean: Outcome, trial: Trial) -> bool:
    """Whether the run's metric is within 2 % of the clean run's."""
    if TASKS[trial.task].has_accuracy:
        return found.metric >= clean.metric * (1 - WITHIN)
    return found.metric <= clean.metric + abs(clean.metric) * WITHIN


def clean_of(trial: Trial) -> str:
    """Returns the name of the run without the fault."""
    return trial.name.partition(":")[0]


def table(guards: Sequence[str], trials: Sequence[Trial], found: dict[Run, Outcome], seed: int) -> str:
    """Returns the table, in Markdown."""
    sound, ill = [t for t in trials if t.fault is None], [t for t in trials if t.fault is not None]
    of_sound_ones = f"sound runs ({len(sound)}): retreats | halted | steps skipped | metric lost"
    of_ill_ones = f"ill runs ({len(ill)}): healed | halted | lost"
    lines = [f"| guard | {of_sound_ones} | {of_ill_ones} |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for guard in guards:
        of_sound = [(found[Run(t.name, guard, seed)], found[Run(t.name, "nothing", seed)], t) for t in sound]
        of_ill = [(found[Run(t.name, guard, seed)], found[Run(clean_of(t), "nothing", seed)], t) for t in ill]
        harmed = sum(not o.halted and not loss_of(o, clean, t) <= WITHIN for o, clean, t in of_sound)
        good = sum(not o.halted and healed(o, clean, t) for o, clean, t in of_ill)
        halted = sum(bool(o.halted) for o, _, _ in of_ill)
        retreats = [o.retreats for o, _, _ in of_sound]
        lines.append(
            f"| {WORDS[guard]} | {sum(retreats)} in {sum(number > 0 for number in retreats)}"
            f" | {sum(bool(o.halted) for o, _, _ in of_sound)} | {sum(o.skipped for o, _, _ in of_sound)} | {harmed}"
            f" | {good} | {halted} | {len(ill) - good - halted} |"
        )
    return "\n".join(lines)


def notable(run: Run, found: Outcome, reference: Outcome) -> str:
    """Returns a line about a run that a guard harmed or did not heal; empty for others."""
    trial = TRIALS[run.trial]
    lost = math.nan if found.halted else loss_of(found, reference, trial)
    touched = f"{found.retreats} retreats, {found.skipped} skipped"
    if found.halted:
        return f"{run.guard}: {run.trial}: halted ({touched}): {found.halted}"
    bad = not healed(found, reference, trial) if trial.fault else found.retreats > 0 or not lost <= WITHIN
    return f"{run.guard}: {run.trial}: {found.metric:.4g} of {reference.metric:.4g} ({touched})" if bad else ""


def chosen_trials(quick: bool, only: str) -> list[Trial]:
    """Returns the trials to run."""
    trials = [*SOUND, *ILL]
    if quick:
        ill = [f"MLP, SGD: {fault}" for fault in QUICK_ILL]
        trials = [trial for trial in trials if trial.name in (*QUICK_SOUND, *ill)]
    return [trial for trial in trials if only in trial.name]


def main() -> None:
    """Runs everything and prints what is notable, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of the trials")
    parser.add_argument("--guards", nargs="+", default=list(WORDS), choices=list(WORDS))
    parser.add_argument("--only", default="", help="trials whose names contain this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    started_s = time.monotonic()
    trials = chosen_trials(options.quick, options.only)
    names = [clean_of(trial) for trial in trials]  # the references are first
    runs = [Run(name, "nothing", options.seed) for name in dict.fromkeys(names)]
    runs += [Run(trial.name, guard, options.seed) for guard in options.guards for trial in trials]
    runs = list(dict.fromkeys(runs))
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        found: dict[Run, Outcome] = {}
        for run, outcome in zip(runs, pool.map(perform, runs), strict=True):
            found[run] = outcome
            reference = found[Run(clean_of(TRIALS[run.trial]), "nothing", options.seed)]
            if run.guard != "nothing" and (line := notable(run, outcome, reference)):
                print(line, flush=True)
    print(f"\n{machine()}; {time.monotonic() - started_s:.0f} s\n")
    print(table(options.guards, trials, found, options.seed))


if __name__ == "__main__":
    main()
