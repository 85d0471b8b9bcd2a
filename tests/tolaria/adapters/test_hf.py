from typing import Any

import pytest
import torch
from torch import nn

from support.lane_driver import DrivenLane, built, running
from tolaria.errors import BrokenJobError
from tolaria.jobs import JobContext
from tolaria.lane.messages import EpochDone, RunEpoch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
adapter_jobs = pytest.importorskip("support.adapter_jobs")
hf = pytest.importorskip("tolaria.adapters.hf")
CAUSAL = "support.adapter_jobs:causal_job"
CONTEXT = JobContext(0, torch.device("cpu"))


def test_a_model_trains_as_a_plain_loop_does() -> None:
    """Bit-equal parameters after two epochs, dropout included."""
    torch.set_num_threads(1)
    lane, plain = DrivenLane(built(CAUSAL)), DrivenLane(built(CAUSAL))
    random_numbers = torch.get_rng_state()
    lane.train_to(10)
    torch.set_rng_state(random_numbers)
    model, optimizer = plain.module.model, plain.module.optimizer
    model.train()
    for epoch in (1, 2):
        plain.module.cursor.begin_epoch(epoch)
        while (batch := plain.module.cursor.next_batch()) is not None:
            optimizer.zero_grad()
            model(**batch.payload).loss.backward()
            optimizer.step()
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in lane.module.model.state_dict().items())


def test_a_rollback_is_exact() -> None:
    """The data are read again from the place."""
    lane = DrivenLane(built(CAUSAL))
    lane.train_to(3)
    lane.snapshot()
    lane.train_to(8)
    digest = lane.digest
    lane.restore(3)
    lane.train_to(8)
    assert lane.digest == digest


@pytest.mark.parametrize(
    ("job", "names"), [("causal_job", {"loss", "perplexity"}), ("classifier_job", {"loss", "accuracy", "margin"})]
)
def test_evaluations_fit_the_labels(job: str, names: set[str]) -> None:
    """Perplexity of tokens, accuracy of classes, and the metrics that the job asks for."""
    with running(built(f"support.adapter_jobs:{job}")) as run:
        run.send(RunEpoch(1))
        figures = run.wait_for(EpochDone).evaluation.figures()
    assert figures.keys() == names
    if "perplexity" in names:
        assert figures["perplexity"] == pytest.approx(torch.tensor(figures["loss"]).exp().item(), rel=1e-4)


def test_biases_and_norms_do_not_decay() -> None:
    """As with the Trainer of transformers; frozen parameters are not trained."""
    job = adapter_jobs.causal_job(CONTEXT)
    model = job.build_model()
    model.transformer.wpe.weight.requires_grad_(False)
    decayed, plain = job.build_optimizer(model).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters())) - 1


def job_of(data: Any, **options: Any) -> Any:
    """A job of the tiny model."""
    return hf.HuggingFaceJob(CONTEXT, model=adapter_jobs.causal_model, data=data, **options)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"test": []}, "splits with 'train'.*has test"),
        ([1, 2], "splits with 'train'.*it list"),
        ({"train": []}, "has no rows"),
    ],
)
def test_data_without_a_training_split_are_refused(data: Any, named: str) -> None:
    """With what was given."""
    with pytest.raises(BrokenJobError, match=named):
        job_of(data)


def test_batches_without_labels_are_refused() -> None:
    """The model returns no loss then; the message says what adds labels."""
    job = job_of({"train": adapter_jobs.text_rows()})
    model = job.build_model()
    cursor = job.training_data()
    cursor.begin_epoch(1)
    with pytest.raises(BrokenJobError, match=r"no loss.*need labels.*DataCollatorForLanguageModeling"):
        job.losses(model, cursor.next_batch())
    assert list(job.validation_batches()) == []


def test_a_model_may_take_columns_by_name_only() -> None:
    """Other columns are left out; if none is left, the message names those that are taken."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * x - labels).square().mean()}

    rows = [{"x": float(n), "labels": 2.0 * n, "text": "unused"} for n in range(4)]
    job = hf.HuggingFaceJob(CONTEXT, model=Small, data={"train": rows}, batch_size=2)
    model = job.build_model()
    cursor = job.training_data()
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch.payload.keys() == {"x", "labels"}
    assert job.losses(model, batch)["host"].requires_grad
    other = hf.HuggingFaceJob(CONTEXT, model=Small, data={"train": [{"text": "unused"}]}, batch_size=1)
    other.build_model()
    cursor = other.training_data()
    cursor.begin_epoch(1)
    with pytest.raises(BrokenJobError, match="no column of the data is one that the model takes: label"):
        cursor.next_batch()
