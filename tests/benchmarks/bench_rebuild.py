"""How long rebuilding an optimizer takes, against copying its state once: `python tests/benchmarks/bench_rebuild.py`.

50 million parameters under Adam (400 MB of state); every rebuild drops a small seed's group and adds another. The copy
goes into tensors that exist already, which is the fastest a copy can be. Needs 2 GB and about ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from tolaria.optimization import GroupPlan, OptimizerManager

LAYERS = 50
LAYER_NUMEL = 1_000_000
REPEATS = 5
RATIO_MAX = 2.0


def main() -> None:
    """Print medians, the ratio, and whether it is within bounds."""
    torch.manual_seed(0)
    manager = grown_manager()
    tensors = [value for state in manager.optimizer.state.values() for value in state.values() if value.dim()]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6
    seeds = [GroupPlan(f"seed:{place}", {f"seed.{place}": nn.Parameter(torch.zeros(64, 64))}) for place in range(2)]
    host, _ = manager.plan()

    def rebuild(place: int) -> object:
        return manager.rebuild([host, seeds[place % 2]], at_step=place)

    copy_ms, rebuild_ms = medians_ms([lambda _: torch._foreach_copy_(copies, tensors), rebuild])
    ratio = rebuild_ms / copy_ms
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {REPEATS} repeats, {megabytes:.0f} MB of state"
    )
    print(f"copy of the state {copy_ms:8.1f} ms (median)")
    print(f"rebuild           {rebuild_ms:8.1f} ms (median)")
    print(f"ratio             {ratio:8.2f}    ({'within' if ratio <= RATIO_MAX else 'ABOVE'} the bound of {RATIO_MAX})")


def grown_manager() -> OptimizerManager:
    """A manager whose optimizer has made one step, so that it has all its state; the gradients are let go again."""
    parameters = {f"layer.{place}": nn.Parameter(torch.randn(1000, LAYER_NUMEL // 1000)) for place in range(LAYERS)}
    seed = nn.Parameter(torch.zeros(64, 64))
    groups = [{"params": list(parameters.values()), "name": "host"}, {"params": [seed], "name": "seed:old"}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    gradient = torch.randn(1000, LAYER_NUMEL // 1000)
    for parameter in parameters.values():
        parameter.grad = gradient
    seed.grad = torch.ones_like(seed)
    optimizer.step()
    optimizer.zero_grad()
    return OptimizerManager(optimizer, [*parameters.items(), ("seed.old", seed)], min_interval_steps=0)


def medians_ms(contenders: list[Callable[[int], object]]) -> list[float]:
    """The median time of each, taken in turns so that a busy moment hits all of them; the first round warms up."""
    times: list[list[float]] = [[] for _ in contenders]
    for place in range(REPEATS + 1):
        for contender, taken in zip(contenders, times, strict=True):
            begin = time.perf_counter()
            contender(place)
            taken.append((time.perf_counter() - begin) * 1e3)
    return [median(taken[1:]) for taken in times]


if __name__ == "__main__":
    main()
