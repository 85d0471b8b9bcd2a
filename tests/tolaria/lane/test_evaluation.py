"""Evaluations of validation sets: one, several with names, none; what each rank reads of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from support.jobs import TinyJob
from support.lane_driver import built, new_module, running
from tolaria.errors import BrokenJobError, EmptyDatasetError
from tolaria.jobs import Batch, Evaluation, JobContext, LoaderCursor, Ratio
from tolaria.lane.evaluation import batches_of, evaluate
from tolaria.lane.messages import EpochDone, RunEpoch
from tolaria.ranks.share import Share

HERE = "tests.tolaria.lane.test_evaluation"


class Sets(TinyJob):
    """Evaluates what `given` says, which tests change; draws random numbers in each evaluation."""

    given: Any = None

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.evaluated: list[int] = []

    def validation_batches(self) -> Any:
        whole = Batch((self.x, self.y), len(self.x))
        self.kept: Any = getattr(self, "kept", {"near": iter([whole])})
        data = torch.utils.data.TensorDataset(self.x, self.y)
        kinds: dict[str, Any] = {
            "two": {"near": [whole, whole], "far": [Batch((self.x + 1, self.y), len(self.x))]},
            "loader": DataLoader(data, batch_size=24, shuffle=True),
            "none": None,
            "empty": {},
            "hollow": {"near": [whole], "far": []},
            "iterator": self.kept,
        }
        sets: Any = self.context.options.get("sets", "two")
        return kinds[sets] if isinstance(sets, str) else {name: [whole] for name in sets}

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        self.evaluated.append(batch.samples)
        torch.rand(())
        found = super().evaluate(model, batch)
        half = Ratio(found.loss_sum, 2 * found.samples)
        return Evaluation(found.loss_sum, found.correct, found.samples, {"half": half})


def figures(sets: Any) -> dict[str, float]:
    """Returns the figures of an evaluation."""
    found = evaluate(new_module(f"{HERE}:Sets", options={"sets": sets}))
    assert found is not None
    return found.figures()


def test_sets_have_their_figures_and_the_first_one_is_the_main_one() -> None:
    """By SET/NAME; those of the first one without it too; batches of one set are added up."""
    found = figures("two")
    assert set(found) == {
        "loss", "accuracy", "half", "near/loss", "near/accuracy", "near/half", "far/loss", "far/accuracy", "far/half",
    }  # fmt: skip
    assert found["loss"] == found["near/loss"] != found["far/loss"]
    assert found["far/half"] == pytest.approx(found["far/loss"] / 2)


def test_a_loader_is_evaluated_without_batch_objects() -> None:
    """Its figures are those of the same samples in one batch."""
    found, whole = figures("loader"), figures(["only"])
    assert found["loss"] == pytest.approx(whole["only/loss"])
    assert set(found) == {"loss", "accuracy", "half"}


@pytest.mark.parametrize(
    ("sets", "error", "words"),
    [
        ("empty", BrokenJobError, "return None for a run without evaluation"),
        ("hollow", EmptyDatasetError, "'far' holds no batch"),
        ("iterator", BrokenJobError, "the same iterator each time"),
        (["a/b"], BrokenJobError, "'a/b' needs a name"),
        (["training"], BrokenJobError, "cannot be named 'training'"),
        ([f"s{number}" for number in range(17)], BrokenJobError, "17 validation sets; at most 16"),
    ],
)
def test_sets_that_cannot_be_shown_are_refused_at_the_start(sets: Any, error: type[Exception], words: str) -> None:
    """The message says which and why."""
    with pytest.raises(error, match=words):
        built(f"{HERE}:Sets", options={"sets": sets})


def test_a_job_may_give_no_set() -> None:
    """None is no evaluation, as without the two methods; with one of them the job is refused."""
    lane = built(f"{HERE}:Sets", options={"sets": "none"})
    assert not lane.ready.evaluates
    with running(lane) as run:
        run.send(RunEpoch(1))
        assert run.wait_for(EpochDone).evaluation == Evaluation(0.0)
    with pytest.raises(BrokenJobError, match="validation_batches and evaluate need each other"):
        built(f"{HERE}:half_evaluated")


def half_evaluated(context: JobContext) -> Any:
    """A job with one of the two methods."""
    job: Any = TinyJob(context)

    class Half:
        build_model, build_optimizer = job.build_model, job.build_optimizer
        training_data, losses, evaluate = job.training_data, job.losses, job.evaluate

    return Half()


def test_an_abandoned_evaluation_leaves_the_random_numbers_as_they_were() -> None:
    """Else a run that was paused in it would go on with others."""
    module = new_module(f"{HERE}:Sets")
    before = torch.get_rng_state()
    assert evaluate(module, goes_on=lambda place: place < 2) is None
    assert module.job.evaluated[-2:] == [64, 64]  # type: ignore[attr-defined] # of the job above
    assert torch.equal(torch.get_rng_state(), before)


class Counted(Dataset[Any]):
    """Thirty samples; notes which are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.tensor([float(index)])


class Listed(IterableDataset[Any]):
    """A stream of such samples."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(30):
            self.read.append(index)
            yield torch.tensor([float(index)])


def taken(given: Any, rank: int) -> list[float]:
    """Returns the samples that a rank of three evaluates."""
    batches, share = batches_of(given, Share(rank, 3))
    found: list[float] = []
    for batch in batches:
        assert isinstance(batch, Batch)
        part = share.of(batch)
        found += part.payload.flatten().tolist() if share.counted(batch) else []
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_rank_reads_only_its_samples_of_a_loader_with_indices(wrapped: bool) -> None:
    """The ranks together evaluate each sample once, also of a smaller last batch; an evaluation repeats the order."""
    data = Counted()
    loader: Any = DataLoader(data, batch_size=8, shuffle=True)
    given = LoaderCursor(loader, seed=1) if wrapped else loader
    parts = [taken(given, 0)]
    assert len(data.read) == len(parts[0]) == 8
    assert taken(given, 0) == parts[0]
    others = [taken(LoaderCursor(loader, seed=1) if wrapped else loader, rank) for rank in (1, 2)]
    assert sorted(sample for part in (*parts, *others) for sample in part) == list(range(30))


def test_all_ranks_read_a_stream_and_evaluate_their_samples_of_it() -> None:
    """So it is with a collation of the job's own, which may depend on whole batches."""
    data = Listed()
    parts = [taken(DataLoader(data, batch_size=8), rank) for rank in range(3)]
    assert len(data.read) == 90
    assert sorted(sample for part in parts for sample in part) == list(range(30))
    own = Counted()
    taken(DataLoader(own, batch_size=8, collate_fn=torch.stack), 0)
    assert len(own.read) == 30


def test_a_cursor_over_a_stream_is_refused() -> None:
    """Its next evaluation would go on where this one ended."""
    with pytest.raises(BrokenJobError, match="return the loader itself"):
        batches_of(LoaderCursor(DataLoader(Listed()), seed=0), Share())
