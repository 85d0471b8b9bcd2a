"""What the ranks of a group do about an exception that the job, or a seed, has raised in a pass on some of them.

The rank that has seen it takes part in the others' next agreement by saying so (`Group.report_failure`), whereupon all
of them give up the step or the evaluation, and agree on the seeds that have to go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tolaria.errors import LaneError, PeerLostError, RankFailedError
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import lost_peer


class ReportedError(Exception):
    """A pass has failed on this rank, by the exception that this one was raised from, and all ranks know.

    `seeds` are those whose branches have failed, with reasons; empty if it was another part, or is not known.
    """

    def __init__(self, seeds: Mapping[str, str]) -> None:
        super().__init__(next(iter(seeds.values()), ""))
        self.seeds = seeds


def reportable(module: TrainModule, error: Exception) -> bool:
    """Whether an error of a pass can be reported to the other ranks: it is of the job's code or a seed's.

    Not where other ranks may wait for this one in the middle of a pass, as they do if the model is sharded: it ends
    this rank then.
    """
    if module.group is None or module.sharded or isinstance(error, (LaneError, ReportedError)):
        return False
    return lost_peer(error) is None


def report(module: TrainModule, error: Exception) -> None:
    """Has all ranks know at their next agreement that `error` was raised on this one, and raises ReportedError from it.

    Returns if it is not `reportable`. Raises PeerLostError.
    """
    if module.group is not None and reportable(module, error):
        module.group.report_failure()
        raise ReportedError({}) from error


def agree_on_branches(module: TrainModule) -> None:
    """Raises, on all ranks, if a seed of a sharded model has failed in the forward pass on any of them.

    Raises:
        ReportedError: on this one.
        RankFailedError: on another one.
    """
    if module.group is None or not module.sharded or not module.seeds.topology.has_seeds:
        return
    if failures := module.seeds.topology.contained_failures():
        module.group.report_failure()
        raise ReportedError(failures)
    module.group.all(value=True)


def report_branches(module: TrainModule) -> None:
    """As `agree_on_branches`, but other ranks learn it at their next agreement."""
    if module.group is not None and module.sharded and (failures := module.seeds.topology.contained_failures()):
        module.group.report_failure()
        raise ReportedError(failures)


def failed_seeds(module: TrainModule, error: Exception) -> dict[str, str]:
    """Returns the seeds that made a pass raise `error`, with reasons, the same on all ranks; there is at least one.

    If it was none of them, raises the exception of the pass on the ranks that have seen it, elsewhere PeerLostError.
    """
    group = module.group
    if group is None:
        if not (reasons := module.seeds.topology.failures(error)):
            raise error
        return reasons
    if not isinstance(error, (ReportedError, RankFailedError)):
        raise error
    cause, own = error.__cause__, dict[str, str]()
    if isinstance(error, ReportedError):
        own = dict(error.seeds) if cause is None else module.seeds.topology.failures(cause)
    raised = f"{type(cause).__name__}: {cause}" if cause is not None else ""
    said = [json.loads(text) for text in group.all_gather_text(json.dumps([own, raised]))]
    found: dict[str, str] = {}
    for rank, (reasons, _) in enumerate(said):
        elsewhere = "" if len([1 for each, _ in said if each]) == group.world else f" (on rank {rank})"
        found = {**{seed_id: reason + elsewhere for seed_id, reason in reasons.items()}, **found}
    if not found:
        if cause is not None:
            raise cause
        raise PeerLostError(next((f"rank {rank} has raised {text}" for rank, (_, text) in enumerate(said) if text), ""))
    return found
