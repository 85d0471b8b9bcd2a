"""Costs of collectives and of failures as functions of the number of ranks. Times in s, sizes in GB (1e9 bytes).

Sources:
    Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH": latency and
        bandwidth of ring and tree all_reduce, and of the binomial broadcast.
    Sanders, Speck and Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan": the double
        tree that NCCL uses.
    Young 1974, "A first order approximation to the optimum checkpoint interval".
    Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

PIECE_BYTES: Final = 2**25
"""Tensors are sent in pieces of this size (`_BUCKET_BYTES` of ranks/group.py)."""

_GB: Final = 1e9


# -- collectives -----------------------------------------------------------------------------------------------------


def depth(ranks: int) -> int:
    """Returns the depth of a binomial tree of that many ranks: the logarithm to base 2, rounded up."""
    return (ranks - 1).bit_length()


def machines(ranks: int, devices: float) -> int:
    """Returns how many machines with `devices` ranks each it takes."""
    return math.ceil(ranks / devices)


def ring_s(ranks: int, *, call_s: float, hop_s: float, network_s: float, devices: float) -> float:
    """Returns the time of an all_reduce of a few numbers in a ring, as gloo does: two rounds of n - 1 messages.

    Each round passes from one machine to the next as often as there are machines, which adds `network_s`.
    """
    count = machines(ranks, devices)
    return call_s + 2 * (ranks - 1) * hop_s + (2 * count * network_s if count > 1 else 0.0)


def tree_s(ranks: int, *, call_s: float, hop_s: float, network_s: float, devices: float) -> float:
    """Returns the time of the same sum up and down a binomial tree: 2 log2 n messages in a row."""
    return call_s + 2 * depth(ranks) * hop_s + 2 * depth(machines(ranks, devices)) * network_s


def ring_transfer_s(ranks: int, size_gb: float, gb_s: float) -> float:
    """Returns the time that the content of an all_reduce takes in a ring, beside its messages' latency."""
    return 2 * (ranks - 1) / ranks * size_gb / gb_s


def pieces(size_gb: float) -> int:
    """Returns the number of pieces in which that much is sent."""
    return math.ceil(size_gb * _GB / PIECE_BYTES)


def nccl_s(ranks: int, size_gb: float, gb_s: float, latency_s: float) -> float:
    """Returns the time of an all_reduce over NCCL, piece by piece: the faster of ring and double tree each time."""
    count = pieces(size_gb)
    content_s = ring_transfer_s(ranks, size_gb, gb_s)
    ring = count * 2 * (ranks - 1) * latency_s + content_s
    tree = count * 2 * depth(ranks) * latency_s + 2 * size_gb / gb_s
    return min(ring, tree)


def broadcast_s(ranks: int, size_gb: float, gb_s: float, *, messages: float, hop_s: float) -> float:
    """Returns the time of `messages` binomial broadcasts of `size_gb` in all: the root sends it log2 n times."""
    return depth(ranks) * (size_gb / gb_s + messages * hop_s)


def store_gets(ranks: int) -> int:
    """Returns the requests with which all ranks read each other's addresses from the store, as gloo does."""
    return ranks * ranks


def store_gb(ranks: int) -> float:
    """Returns what the store sends then: an address has 8 bytes for each rank that may connect."""
    return 8 * ranks**3 / _GB


# -- failures --------------------------------------------------------------------------------------------------------


def mtbf_s(ranks: int, device_mtbf_h: float) -> float:
    """Returns the mean time between failures of a group whose ranks fail independently, and which each of them ends."""
    return device_mtbf_h * 3600 / ranks


def young_s(stall_s: float, mean_s: float) -> float:
    """Returns Young's interval of work between two saved states (1974): sqrt(2 stall MTBF)."""
    return math.sqrt(2 * stall_s * mean_s)


def daly_s(stall_s: float, mean_s: float) -> float:
    """Returns Daly's interval of work between two saved states (2006, higher order); the MTBF if stalls are long."""
    if stall_s >= 2 * mean_s:
        return mean_s
    part = stall_s / (2 * mean_s)
    return young_s(stall_s, mean_s) * (1 + math.sqrt(part) / 3 + part / 9) - stall_s


def goodput(
    interval_s: float, stall_s: float, mean_s: float, restarts: Sequence[tuple[float, float]], lag_s: float = 0.0
) -> float:
    """Returns the share of time that is work which lasts, exactly, for failures of a Poisson process.

    A state is saved after every `interval_s` of work, which stalls training for `stall_s`; it can be restored `lag_s`
    later. Failures strike restarts too, which then begin again. With a constant restart R and no lag this is Daly's
    complete model (2006): interval / (M exp(R/M) (exp((interval + stall)/M) - 1)). In general exp(-R/M)
    becomes its mean, and the lag a factor exp(-lag/M): of a stretch of training, E[work] = interval times the sum over
    k of P(k (interval + stall) + lag < time to failure), and E[time] = M / E[exp(-R/M)].

    Args:
        interval_s: work between two saved states.
        stall_s: time for which training stops to save one.
        mean_s: M, the mean time between failures of the group.
        restarts: probability and duration of each kind of restart.
        lag_s: time after which a saved state can be restored.
    """
    restarted = sum(share * math.exp(-restart_s / mean_s) for share, restart_s in restarts)
    return interval_s / mean_s * restarted * math.exp(-lag_s / mean_s) / math.expm1((interval_s + stall_s) / mean_s)
