"""What peers that never answer cost: how late their timeouts are told, and how much slower training goes beside them.

    python tests/benchmarks/bench_deadlines.py [--rounds N] [--timeouts N]

Peers live in processes of their own. Overshoot is the time of a call beyond its deadline of 20 ms, on an idle loop and
beside a lane; a bare timer of asyncio's takes turns with the calls and tells how late the loop itself is.

The step rate is that of one run, in short windows by turns, boundaries included: its peers answer; they hang, and the
run meets that as a service does, with its breakers and its conservative mode; they hang and others call them all the
time, through breakers that never open, each call a timeout of 50 ms. Ratios are taken within a turn. What the event
loop's thread takes of a core bounds what the lane can lose to it, and is steadier than a rate where others compute too.
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
MANNERS = ("undisturbed", "hang", "called")


@dataclass(frozen=True)
class Case:
    """A job to train, and over how long its rate is measured."""

    job: str
    options: dict[str, int]
    seconds: float


CASES = {
    "tiny net, step under 1 ms": Case("support.jobs:TinyJob", {"samples": 4000}, 0.25),
    "wide MLP, step of about 10 ms": Case("bench_hosting:HostedJob", {"width": 1024, "depth": 4, "steps": 50}, 0.5),
}


async def overshoots_ms(target: str, timeouts: int, case: Case | None) -> tuple[list[float], list[float]]:
    """Of bare timers and of timeouts of all methods in turn, beside a run of the case where there is one."""
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
    """Print one row for each neighbour."""
    print(f"| {timeouts} timeouts beside | bare timer p50 | p99 | call p50 | p99 | target |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, case in {"nothing": None, **CASES}.items():
        measured = await overshoots_ms(hanging.target, timeouts, case)
        cells = [f"{figure:.2f} ms" for late in measured for figure in (statistics.median(late), p99(late))]
        print(f"| {name} | {' | '.join(cells)} | {OVERSHOOT_TARGET_MS:.0f} ms |")


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


@dataclass(frozen=True)
class Window:
    """One look at a run: steps a second, what the event loop's thread took of a core, others' timeouts a second."""

    rate: float
    loop_share: float
    timeouts_per_s: float


async def windows(case: Case, answering: PeerProcess, hanging: PeerProcess, rounds: int) -> dict[str, list[Window]]:
    """By manner, one for each turn."""
    seen: dict[str, list[Window]] = {manner: [] for manner in MANNERS}
    async with AsyncExitStack() as stack:
        run, peers = await stack.enter_async_context(
            training(answering.target, timeout_s=2.0, job=case.job, options=case.options)
        )
        hangs = await stack.enter_async_context(connected(hanging.target, timeout_s=TIMEOUT_S, run=run))
        others = await stack.enter_async_context(connected(hanging.target, timeout_s=OTHERS_TIMEOUT_S))
        answers = peers.clients
        for turn, place in itertools.product(range(rounds), range(len(MANNERS))):
            manner = MANNERS[(turn + place) % len(MANNERS)]  # each is first, and last, as often as the others
            peers.clients = answers if manner == "undisturbed" else hangs
            async with calling(others) if manner == "called" else nullcontext(Counter[str]()) as ended:
                since_s, cpu_s = time.perf_counter(), time.thread_time()
                rate = await steps_per_s(run, after_steps=40, seconds=case.seconds)
                took_s = time.perf_counter() - since_s
                share = (time.thread_time() - cpu_s) / took_s
            seen[manner].append(Window(rate, share, ended.total() / took_s))
    return seen


async def bench_rate(answering: PeerProcess, hanging: PeerProcess, rounds: int) -> None:
    """Print one row a case: medians over the turns, and of their ratios."""
    print(f"| {rounds} turns | undisturbed | hang | called | target | loop's thread of a core | timeouts/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, case in CASES.items():
        seen = await windows(case, answering, hanging, rounds)
        timeouts_per_s = statistics.median(w.timeouts_per_s for w in seen["called"])
        free = [window.rate for window in seen["undisturbed"]]
        hang, called = (
            statistics.median(w.rate / f for w, f in zip(seen[manner], free, strict=True)) for manner in MANNERS[1:]
        )
        shares = [f"{100 * statistics.median(w.loop_share for w in seen[manner]):.1f} %" for manner in MANNERS]
        cells = f"{statistics.median(free):.0f} steps/s | {hang:.3f} | {called:.3f} | {RATE_TARGET}"
        print(f"| {name} | {cells} | {', '.join(shares)} | {timeouts_per_s:.0f} |")


async def bench(rounds: int, timeouts: int) -> None:
    """Both tables."""
    async with peer_process("answer") as answering, peer_process("hang") as hanging:
        await bench_overshoot(hanging, timeouts)
        print()
        await bench_rate(answering, hanging, rounds)


def main() -> None:
    """Read the options and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--timeouts", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Lines are made, as in a service, and go nowhere.
    as_json = structlog.processors.JSONRenderer()
    structlog.configure(processors=[as_json], logger_factory=structlog.ReturnLoggerFactory())
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    anyio.run(bench, arguments.rounds, arguments.timeouts)


if __name__ == "__main__":
    main()
