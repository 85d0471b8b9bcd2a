"""The cost of peers that never answer: how late their calls time out, and how much slower training is meanwhile.

    python tests/benchmarks/bench_deadlines.py [--rounds N] [--timeouts N]

The peers are separate processes. Overshoot is the time of a call beyond its deadline of 20 ms, on an idle event loop
and beside a lane; a bare timer of asyncio, in turn with the calls, shows how late the event loop itself is.

The step rate is that of one run, in short windows in turn, boundaries included: its peers answer; they hang, and the
run reacts with its breakers and conservative mode; they hang and are also called by others all the time, through
breakers that never open, with a timeout of 50 ms for each call. Ratios are taken within a turn. The event loop's share
of a core bounds what the lane can lose to it, and varies less than a rate on a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from support.hanging import CALLS, PeerProcess, calling, connected, peer_process, steps_per_s, training
from tolaria.errors import PeerTimeoutError

OVERSHOOT_TARGET_MS, RATE_TARGET = 5.0, 0.95
TIMEOUT_S, OTHERS_TIMEOUT_S = 0.02, 0.05
BEHAVIOURS = ("undisturbed", "hang", "called")


@dataclass(frozen=True)
class Case:
    """A job, and the duration of a measurement of its rate."""

    job: str
    options: dict[str, int]
    seconds: float


CASES = {
    "tiny net, step under 1 ms": Case("support.jobs:TinyJob", {"samples": 4000}, 0.25),
    "wide MLP, step of about 10 ms": Case("bench_hosting:HostedJob", {"width": 1024, "depth": 4, "steps": 50}, 0.5),
}


async def overshoots_ms(target: str, timeouts: int, case: Case | None) -> tuple[list[float], list[float]]:
    """Measures bare timers and timeouts of all methods in turn, beside a run of the case if there is one."""
    timer_ms, late_ms = [], []
    async with AsyncExitStack() as stack:
        peers = await stack.enter_async_context(connected(target, timeout_s=TIMEOUT_S))
        if case is not None:
            run, _ = await stack.enter_async_context(
                training(target, timeout_s=TIMEOUT_S, job=case.job, options=case.options)
            )
            await run.until(lambda: run.status.global_step >= 20)
        for ask in itertools.islice(itertools.cycle(CALLS.values()), timeouts):
            started_s = time.perf_counter()
            await anyio.sleep(TIMEOUT_S)
            timer_ms.append((time.perf_counter() - started_s - TIMEOUT_S) * 1000)
            started_s = time.perf_counter()
            try:
                await ask(peers)
            except PeerTimeoutError:
                late_ms.append((time.perf_counter() - started_s - TIMEOUT_S) * 1000)
    if len(late_ms) != timeouts:
        raise SystemExit(f"{timeouts - len(late_ms)} calls did not time out")
    return timer_ms, late_ms


async def bench_overshoot(hanging: PeerProcess, timeouts: int) -> None:
    """Prints one row for each case."""
    print(f"| {timeouts} timeouts beside | bare timer p50 | p99 | call p50 | p99 | target |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in {"nothing": None, **CASES}.items():
        measured = await overshoots_ms(hanging.target, timeouts, case)
        cells = [f"{figure:.2f} ms" for late in measured for figure in (statistics.median(late), p99(late))]
        print(f"| {name} | {' | '.join(cells)} | {OVERSHOOT_TARGET_MS:.0f} ms |")


def p99(values: list[float]) -> float:
    """Returns the 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


@dataclass(frozen=True)
class Window:
    """One measurement of a run: steps per second, the event loop's share of a core, others' timeouts per second."""

    rate: float
    loop_share: float
    timeouts_per_s: float


async def windows(case: Case, answering: PeerProcess, hanging: PeerProcess, rounds: int) -> dict[str, list[Window]]:
    """Measures a window of each behaviour in each turn."""
    seen: dict[str, list[Window]] = {behaviour: [] for behaviour in BEHAVIOURS}
    async with AsyncExitStack() as stack:
        run, peers = await stack.enter_async_context(
            training(answering.target, timeout_s=2.0, job=case.job, options=case.options)
        )
        hangs = await stack.enter_async_context(connected(hanging.target, timeout_s=TIMEOUT_S, run=run))
        others = await stack.enter_async_context(connected(hanging.target, timeout_s=OTHERS_TIMEOUT_S))
        answers = peers.clients
        for turn, place in itertools.product(range(rounds), range(len(BEHAVIOURS))):
            behaviour = BEHAVIOURS[(turn + place) % len(BEHAVIOURS)]  # each is first, and last, as often as the others
            peers.clients = answers if behaviour == "undisturbed" else hangs
            async with calling(others) if behaviour == "called" else nullcontext(Counter[str]()) as ended:
                since_s, cpu_s = time.perf_counter(), time.thread_time()
                rate = await steps_per_s(run, after_steps=40, seconds=case.seconds)
                took_s = time.perf_counter() - since_s
                share = (time.thread_time() - cpu_s) / took_s
            seen[behaviour].append(Window(rate, share, ended.total() / took_s))
    return seen


async def bench_rate(answering: PeerProcess, hanging: PeerProcess, rounds: int) -> None:
    """Prints one row for each case: medians over the turns, and of their ratios."""
    print(f"| {rounds} turns | undisturbed | hang | called | target | loop's thread of a core | timeouts/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        seen = await windows(case, answering, hanging, rounds)
        timeouts_per_s = statistics.median(w.timeouts_per_s for w in seen["called"])
        free = [window.rate for window in seen["undisturbed"]]
        hang, called = (
            statistics.median(w.rate / f for w, f in zip(seen[behaviour], free, strict=True))
            for behaviour in BEHAVIOURS[1:]
        )
        shares = [f"{100 * statistics.median(w.loop_share for w in seen[behaviour]):.1f} %" for behaviour in BEHAVIOURS]
        cells = f"{statistics.median(free):.0f} steps/s | {hang:.3f} | {called:.3f} | {RATE_TARGET}"
        print(f"| {name} | {cells} | {', '.join(shares)} | {timeouts_per_s:.0f} |")


async def bench(rounds: int, timeouts: int) -> None:
    """Prints both tables."""
    async with peer_process("answer") as answering, peer_process("hang") as hanging:
        await bench_overshoot(hanging, timeouts)
        print()
        await bench_rate(answering, hanging, rounds)


def main() -> None:
    """Reads the options and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--timeouts", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Log lines are formatted, as in a service, and dropped.
    as_json = structlog.processors.JSONRenderer()
    structlog.configure(processors=[as_json], logger_factory=structlog.ReturnLoggerFactory())
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    anyio.run(bench, arguments.rounds, arguments.timeouts)


if __name__ == "__main__":
    main()
