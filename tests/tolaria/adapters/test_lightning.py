from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.lane_driver import DrivenLane, built, running
from tolaria.adapters.lightning import LightningJob
from tolaria.errors import BrokenJobError
from tolaria.jobs import JobContext
from tolaria.lane.messages import EpochDone, RunEpoch, StepDone

pl = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
adapter_jobs = pytest.importorskip("support.adapter_jobs")
JOB = "support.adapter_jobs:lit_job"
CONTEXT = JobContext(0, torch.device("cpu"))


def test_a_module_trains_as_a_plain_loop_does() -> None:
    """Bit-equal parameters after two epochs, with the same order of data and the same random numbers."""
    torch.set_num_threads(1)
    lane, plain = DrivenLane(built(JOB)), DrivenLane(built(JOB))
    random_numbers = torch.get_rng_state()
    lane.train_to(6)
    torch.set_rng_state(random_numbers)
    module, optimizer = plain.module.model, plain.module.optimizer
    module.train()
    for epoch in (1, 2):
        plain.module.cursor.begin_epoch(epoch)
        while (batch := plain.module.cursor.next_batch()) is not None:
            optimizer.zero_grad()
            module.training_step(*batch.payload).backward()  # type: ignore[operator]
            optimizer.step()
    ours, theirs = lane.module.model.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_places_epochs_and_metrics_are_those_of_training() -> None:
    """`batch_idx` and `current_epoch` as Lightning counts them; what is logged is a metric, also after a rollback."""
    lane = DrivenLane(built(JOB))
    lane.train_to(2)
    lane.snapshot()
    lane.train_to(5)
    seen = list(lane.module.model.seen)  # type: ignore[arg-type]
    assert seen[-5:] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    first = lane.digest
    lane.restore(2)
    lane.train_to(5)
    assert lane.digest == first
    assert list(lane.module.model.seen)[-3:] == seen[-3:]  # type: ignore[arg-type]


def test_what_is_logged_is_shown() -> None:
    """Of a step and of an evaluation, whose loss is the one that is logged as val_loss."""
    with running(built(JOB)) as run:
        run.send(RunEpoch(1))
        epoch = run.wait_for(EpochDone)
        logged = [step.logged for step in run.all_of(StepDone)]
    assert all(each.keys() == {"train_loss", "error"} for each in logged)
    assert [each["train_loss"] for each in logged] == pytest.approx([step.loss for step in run.all_of(StepDone)])
    figures = epoch.evaluation.figures()
    assert figures.keys() == {"loss", "val_loss", "val_accuracy"}
    assert figures["loss"] == pytest.approx(figures["val_loss"])
    assert epoch.evaluation.samples == 10


def changed(**members: Any) -> type:
    """The module's class with other members."""
    return type("Changed", (adapter_jobs.LitLine,), {"__module__": __name__, **members})


def build(kind: Callable[[], Any], **given: Any) -> nn.Module:
    """Builds the model of a job, with its optimizer and data."""
    job = LightningJob(CONTEXT, module=kind, **given)
    model = job.build_model()
    job.build_optimizer(model)
    job.training_data()
    return model


def two_optimizers(self: nn.Module) -> list[torch.optim.Optimizer]:
    """As a GAN has them."""
    return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


def with_scheduler(self: nn.Module) -> dict[str, Any]:
    """As the documentation of Lightning shows it."""
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}}


def hook(self: object, *_: object) -> None:
    """Does nothing that would be called."""


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"automatic_optimization": False}, "manual optimization.*return the loss"),
        ({"configure_optimizers": two_optimizers}, "returns 2 optimizers.*several param groups"),
        ({"configure_optimizers": with_scheduler}, "lr_scheduler.*set optimizer.policy"),
        ({"configure_optimizers": lambda self: None}, "configure_optimizers returned None"),
        ({"optimizer_step": hook}, "optimizer_step is not honoured: Tolaria updates by itself"),
        ({"on_train_epoch_end": hook}, "on_train_epoch_end is not honoured.*move what it does"),
        ({"on_after_backward": hook, "on_fit_start": hook}, "on_after_backward is not.*on_fit_start is not"),
        ({"on_save_checkpoint": hook}, "on_save_checkpoint is not honoured: keep state in buffers"),
        ({"configure_gradient_clipping": hook}, "set training.clip_norm"),
        ({"on_before_batch_transfer": hook}, "transform batches in training_step"),
        ({"configure_callbacks": hook}, "callbacks are not called"),
        ({"train_dataloader": lambda self: [[], []]}, "train_dataloader returns several loaders"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(members: dict[str, Any], named: str) -> None:
    """With what to do instead; nothing is left out silently."""
    with pytest.raises(BrokenJobError, match=named):
        build(changed(**members))


def test_what_has_no_part_in_training_is_allowed() -> None:
    """Steps and hooks of tests and predictions."""
    build(changed(test_step=hook, predict_step=hook, on_test_epoch_end=hook, teardown=hook))


@pytest.mark.parametrize("kind", [nn.Linear, pl.LightningDataModule])
def test_something_else_than_a_module_is_refused(kind: Any) -> None:
    """A plain module of torch has no training_step to call."""
    with pytest.raises(BrokenJobError, match="must return a LightningModule"):
        build(lambda: kind(1, 1) if kind is nn.Linear else kind())


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda self, batch, batch_idx: None, "training_step returned None: return a loss"),
        (lambda self, batch: self.log("f1", object()), "self.log.'f1'. of a object.*log the value of the batch"),
        (lambda self, batch: self.global_step, "self.global_step is not honoured"),
    ],
)
def test_steps_that_cannot_be_honoured_fail_with_a_reason(step: Any, named: str) -> None:
    """At the first look, before training begins."""
    job = LightningJob(CONTEXT, module=changed(training_step=step))
    model = job.build_model()
    cursor = job.training_data()
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch is not None
    with pytest.raises(BrokenJobError, match=named):
        job.losses(model, batch)


def test_a_validation_without_a_loss_is_refused() -> None:
    """And one without a loader, or without a step, is none."""
    silent = LightningJob(CONTEXT, module=changed(validation_step=lambda self, batch: self.log("f1", 0.5)))
    model = silent.build_model()
    with pytest.raises(BrokenJobError, match="validation_step returned None and logged f1: return the loss"):
        silent.evaluate(model, next(iter(silent.validation_batches())))
    alone = LightningJob(
        CONTEXT, module=adapter_jobs.LitLine, data={"train": adapter_jobs.LitLine().train_dataloader()}
    )
    alone.build_model()
    assert list(alone.validation_batches()) == []


def test_a_data_module_provides_the_loaders() -> None:
    """After it has been prepared and set up."""

    class Data(pl.LightningDataModule):  # type: ignore[name-defined, misc] # of an extra
        def setup(self, stage: str) -> None:
            assert stage == "fit"
            self.rows = adapter_jobs.line_data(16)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.rows, batch_size=8)

    def step(self: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self(batch[0]) - batch[1]).square().mean()}

    job = LightningJob(CONTEXT, module=changed(training_step=step), data=Data())
    model = job.build_model()
    cursor = job.training_data()
    assert cursor.batches_per_epoch == 2
    cursor.begin_epoch(1)
    batch = cursor.next_batch()
    assert batch is not None
    assert job.losses(model, batch)["host"].ndim == 0
    assert list(job.validation_batches()) == []
