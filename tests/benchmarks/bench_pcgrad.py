"""How long merging n gradients takes, as ratios within one run: `python tests/benchmarks/bench_pcgrad.py [--full]`.

Compared with a plain pairwise loop, with torchjd's PCGrad where it can be imported, and, for a whole step, with n
separate forward and backward passes. Without --full the sizes are small enough for half a minute.
"""
# a table on the terminal is what this is for

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from tolaria.gradients import combine_flat_grads, source_rows, step_generator
from tolaria.gradients.pcgrad import projection_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

try:
    from torchjd.aggregation import PCGrad  # type: ignore[import-not-found, unused-ignore] # not a dependency
except ImportError as error:
    PCGrad = None
    print(f"without torchjd: {error}")


class Merge(NamedTuple):
    """One line of the first table; times in milliseconds."""

    rows: int
    numel: int
    ours_ms: float
    loop_ms: float
    torchjd_ms: float | None
    error: float


def pairwise_loop(rows: Sequence[Tensor], order: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad as in its paper."""
    merged = torch.zeros_like(rows[0])
    for row, others in zip(rows, order, strict=True):
        projected = row.clone()
        for other in others:
            dot = torch.dot(projected, rows[other])
            if dot < 0:
                projected -= dot / torch.dot(rows[other], rows[other]) * rows[other]
        merged += projected
    return merged


def main() -> None:
    """Prints both tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--full", action="store_true", help="rows of 1M and 10M elements, more repeats")
    full = arguments.parse_args().full
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, best of several; a ratio below 1 is in favour of Tolaria")
    print("\nrows  elements    ours ms   vs loop  vs torchjd  relative error to float64")
    for numel in (1_000_000, 10_000_000) if full else (1_000_000,):
        for count in (2, 4, 8, 16):
            _print_merge(
                measure_merge(count, numel, repeats=max(3, 40_000_000 // (count * numel)) * (3 if full else 1))
            )
    print("\nsources  model        step ms   vs n separate forward + backward passes")
    for count in (2, 4, 8):
        for name, width in (("mlp 128", 128), ("mlp 512", 512)):
            ours, separate = measure_step(count, width, repeats=30 if full else 10)
            print(f"{count:7}  {name:9} {ours:10.2f}   {ours / separate:.2f}")


def measure_merge(count: int, numel: int, *, repeats: int) -> Merge:
    """Time all of them in turns on one random matrix, about half of whose pairs conflict."""
    matrix = torch.randn(count, numel)
    rows = list(matrix.unbind())
    order = projection_order(count, step_generator("benchmark", 0))
    contenders: list[Callable[[], object]] = [
        lambda: combine_flat_grads(matrix, generator=step_generator("benchmark", 0)),
        lambda: pairwise_loop(rows, order),
    ]
    if PCGrad is not None:
        theirs = PCGrad()
        contenders.append(lambda: theirs(matrix))
    times = best_ms(contenders, repeats)
    return Merge(
        count, numel, times[0], times[1], times[2] if PCGrad is not None else None, relative_error(matrix, order)
    )


def relative_error(matrix: Tensor, order: Sequence[Sequence[int]]) -> float:
    """Of our result against the loop in float64 with the same order, in the Euclidean norm."""
    ours = combine_flat_grads(matrix, generator=step_generator("benchmark", 0)).vector.double()
    reference = pairwise_loop(list(matrix.double().unbind()), order)
    return float((ours - reference).norm() / reference.norm())


def measure_step(count: int, width: int, *, repeats: int) -> tuple[float, float]:
    """Milliseconds of all rows and own gradients from one graph, and of separate passes that give the same."""
    trunk = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    heads = [nn.Linear(width, 10) for _ in range(count)]
    inputs, labels = torch.randn(256, 64), torch.randint(10, (256,))
    shared = list(trunk.parameters())
    own = {str(place): list(head.parameters()) for place, head in enumerate(heads)}
    out = torch.empty(count, sum(parameter.numel() for parameter in shared))

    def together() -> None:
        features = trunk(inputs)
        losses = {str(i): functional.cross_entropy(head(features), labels) for i, head in enumerate(heads)}
        source_rows(losses, shared, own=own, out=out)

    def apart() -> None:
        for place, head in enumerate(heads):
            loss = functional.cross_entropy(head(trunk(inputs)), labels)
            found = torch.autograd.grad(loss, [*shared, *own[str(place)]])
            torch.cat([grad.reshape(-1) for grad in found[: len(shared)]], out=out[place])

    ours, separate = best_ms([together, apart], repeats)
    return ours, separate


def best_ms(contenders: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The best time of each, taken in turns so that a busy moment hits all of them."""
    best = [float("inf")] * len(contenders)
    for _ in range(repeats + 1):
        for place, contender in enumerate(contenders):
            begin = time.perf_counter()
            contender()
            best[place] = min(best[place], (time.perf_counter() - begin) * 1e3)
    return best


def _print_merge(line: Merge) -> None:
    theirs = "-" if line.torchjd_ms is None else f"{line.ours_ms / line.torchjd_ms:.2f}"
    against_loop = f"{line.ours_ms / line.loop_ms:.3f} ({line.loop_ms / line.ours_ms:.1f}x)"
    print(f"{line.rows:4} {line.numel:9} {line.ours_ms:10.2f}  {against_loop:>14} {theirs:>8}   {line.error:.1e}")


if __name__ == "__main__":
    main()
