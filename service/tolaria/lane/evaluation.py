"""The evaluation after each epoch: of one validation set or of several with names, shared among ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, Final, cast

import torch
from pydantic import JsonValue
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from tolaria.errors import BrokenJobError, StateUnsupportedError
from tolaria.jobs import Batch, EvaluatingJob, LoaderCursor, TrainingJob
from tolaria.jobs.indexed import samples_of
from tolaria.lane.device import on_device
from tolaria.lane.job_output import checked_batch, checked_evaluation
from tolaria.lane.rank_failures import report_branches
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import Group
from tolaria.ranks.share import Share, SharingJob
from tolaria.state.encoding import capture_rngs, restore_rngs
from tolaria.values.evaluation import Evaluation, Ratio, set_names_problem

METHOD: Final = "validation_batches()"

EVALUATED: Final = "validation batches"
"""What ranks have to have in common when they evaluate."""

_ORDER_SEED: Final = 0
"""Seed of the order in which a loader shuffles a validation set: all evaluations have the same one."""


def sets_of(job: TrainingJob) -> dict[str, Iterable[object]]:
    """Returns the validation sets of a job by name: one without a name, several with names, or none.

    Raises BrokenJobError for names that cannot be those of sets.
    """
    if not isinstance(job, EvaluatingJob):
        return {}
    given: object = job.validation_batches()
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {"": cast("Iterable[object]", given)}
    if problem := set_names_problem(list(given)):
        raise BrokenJobError(f"{METHOD}: {problem}")
    return dict(given)


def batches_of(given: Iterable[object] | LoaderCursor, share: Share) -> tuple[Generator[object, None, None], Share]:
    """Returns the batches of a validation set, and the share of this rank.

    Of a `DataLoader` over a data set with indices, with torch's own collation, each rank reads only its samples; also
    of a `LoaderCursor` over a loader with indices. All ranks read anything else whole, and take their samples of it.

    Raises BrokenJobError for a `LoaderCursor` that cannot be read from its beginning again.
    """
    divisible = isinstance(given, DataLoader) and _is_divisible(given)
    cursor = LoaderCursor(cast("DataLoader[Any]", given), seed=_ORDER_SEED) if divisible else given
    if not isinstance(cursor, LoaderCursor):
        return _given_batches(cast("Iterable[object]", given), loaded=isinstance(given, DataLoader)), share
    if not cursor.is_indexed:
        raise BrokenJobError(
            f"{METHOD} returned a LoaderCursor over a stream, which goes on where it was: return the loader itself"
        )
    whole = share.world == 1 or isinstance(share.job, SharingJob)
    divided = not whole and cursor.read_part(share.bounds, share.rank)
    return _from_beginning(cursor, close=divisible), replace(share, divided=divided)


def evaluate(
    module: TrainModule, *, beat: Callable[[], object] = lambda: None, goes_on: Callable[[int], bool] = lambda _: True
) -> Evaluation | None:
    """Evaluates the model on all validation sets; in a group, returns the sums over all ranks.

    `beat` is called before each batch, and `goes_on` with its number among those of all sets. If that returns False,
    the evaluation is abandoned: returns None, and the random generators are as before.

    Raises:
        BrokenJobError: names what the job has returned.
        RanksDifferError: a rank has evaluated another number of batches.
        ReportedError: a seed of a sharded model has failed on this rank.
        RankFailedError: the evaluation has failed on another one.
    """
    rngs, place, found = random_state(), 0, dict[str, Evaluation]()
    module.model.eval()
    with torch.no_grad(), module.seeds.groups_as_built():
        for name, given in sets_of(module.job).items():
            batches, share = batches_of(given, module.share)
            found[name] = Evaluation(0.0)
            with closing(batches):
                for each in batches:
                    beat()
                    if not goes_on(place):
                        if rngs is not None:
                            restore_rngs(*rngs)
                        return None
                    found[name] += evaluated(module, each, share)
                    report_branches(module)
                    place += 1
    if module.group is not None and found:
        module.group.all(value=True, must_match={EVALUATED: -1})
        found = {name: _over_ranks(total, module.group) for name, total in found.items()}
    return Evaluation.of_sets(found)


def random_state() -> tuple[dict[str, Tensor], dict[str, JsonValue]] | None:
    """Returns the state of the random generators; None for one that cannot be saved, as snapshots then say."""
    with suppress(StateUnsupportedError):
        return capture_rngs()
    return None


def evaluated(module: TrainModule, given: object, share: Share) -> Evaluation:
    """Returns the evaluation of this rank's samples of a batch, without gradients. Raises BrokenJobError."""
    whole, job = checked_batch(given, METHOD), module.job
    if not whole.samples or not isinstance(job, EvaluatingJob):
        return Evaluation(0.0)
    batch = on_device(share.of(whole), module.device, pinned=module.fast_paths.pins_memory)
    if module.model.training:  # the job has set it for the batch before
        module.model.eval()
    found = checked_evaluation(job.evaluate(module.model, batch))
    return found if share.counted(whole) else Evaluation(0.0)


def _is_divisible(loader: DataLoader[Any]) -> bool:
    is_stream = isinstance(loader.dataset, IterableDataset)
    return loader.collate_fn is default_collate and loader.batch_sampler is not None and not is_stream


def _given_batches(given: Iterable[object], *, loaded: bool) -> Generator[object, None, None]:
    """Yields the batches of any iterable; what a loader yields is the payload of one unless it is one already."""
    for each in given:
        yield Batch(each, samples_of(each)) if loaded and not isinstance(each, Batch) else each


def _from_beginning(cursor: LoaderCursor, *, close: bool) -> Generator[object, None, None]:
    try:
        cursor.begin_epoch(1)
        while (batch := cursor.next_batch()) is not None:
            yield batch
    finally:
        if close:
            cursor.close()


def _over_ranks(evaluation: Evaluation, group: Group) -> Evaluation:
    """Returns the sums over all ranks."""
    # A rank that has evaluated no sample has no metric, and does not know which the job has.
    ratios = evaluation.ratios()
    kinds = {name: ratio.exponential for name, ratio in ratios.items()}
    said = [json.loads(text) for text in group.all_gather_text(json.dumps([evaluation.correct is not None, kinds]))]
    known: dict[str, bool] = {}
    for _, theirs in said:
        known |= theirs
    mine = [ratios.get(name, Ratio(0.0, 0.0)) for name in known]
    sums = [evaluation.loss_sum, evaluation.correct or 0, evaluation.samples]
    summed = group.all_reduce([*sums, *(value for ratio in mine for value in (ratio.total, ratio.weight))])
    pairs = zip(known.items(), summed[3::2], summed[4::2], strict=True)
    metrics = {name: Ratio(total, weight, exponential) for (name, exponential), total, weight in pairs}
    correct = int(summed[1]) if any(counted for counted, _ in said) else None
    return Evaluation(summed[0], correct, int(summed[2]), metrics)
