"""Jobs as users write them, beside a loop of their own: optimizers, memory layouts, frozen layers, compiled models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING, SEED_STAGE_PROBATIONARY, SEED_STAGE_TRAINING, SeedLifecycleStage
from leyline.v1.seeds_pb2 import AlphaSchedule, SeedState
from support.lane_driver import DrivenLane, running
from support.user_jobs import FrozenNorm, Line, ScaledAdam, Unfreezing
from tolaria.config import FastPathSettings, Settings, TrainingSettings
from tolaria.jobs import HOST, Batch, Evaluation, JobContext
from tolaria.jobs.digits import DigitsOptions
from tolaria.lane.build import build
from tolaria.lane.fast_paths import FastPaths, spanning_compilation
from tolaria.lane.messages import EpochDone, ReconcileSeeds, RunEpoch, SeedsChanged, SnapshotsChanged, StepDone
from tolaria.lane.step import train_step
from tolaria.seeds import Blueprints

HERE = __name__

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
# torch's compiler causes such warnings, and hides them where they are no errors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compiled code of one test is not that of the next."""
    torch.set_num_threads(1)
    torch._dynamo.utils.counters.clear()  # noqa: SLF001 - torch has no public counters
    yield
    torch.compiler.reset()


def user_lane(job: str, *, sections: dict[str, Any] | None = None, **training: Any) -> DrivenLane:
    """A driven lane of a job of `support.user_jobs`, or of one named with its module."""
    name = job if ":" in job else f"support.user_jobs:{job}"
    settings = TrainingSettings(job=name, device="cpu", threads=1, **training)
    return DrivenLane(build(Settings(training=settings, **(sections or {}))))


def seed_state(
    slot: str, stage: SeedLifecycleStage.ValueType, *, blueprint: str = "residual_mlp", begin: int = 0, steps: int = 8
) -> ReconcileSeeds:
    """The wish for one seed, whose alpha goes from 0 to 1."""
    alpha = AlphaSchedule(start=0.0, end=1.0, begin_step=begin, duration_steps=steps)
    return ReconcileSeeds((SeedState(seed_id="a", stage=stage, blueprint_id=blueprint, slot=slot, alpha=alpha),))


def bare_loop(job: Any, steps: int, clip_norm: float) -> list[Tensor]:
    """The parameters after `steps` steps of the loop that the user would write."""
    torch.manual_seed(0)
    model = job.build_model()
    optimizer, cursor = job.build_optimizer(model), job.training_data()
    losses_seen, epoch = 0, 0
    job.calls = 1  # the service has called it once before the run
    while losses_seen < steps:
        epoch += 1
        cursor.begin_epoch(epoch)
        while losses_seen < steps and (batch := cursor.next_batch()) is not None:
            model.train()
            optimizer.zero_grad()
            losses = job.losses(model, batch)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            if clip_norm:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip_norm)
            optimizer.step()
            losses_seen += 1
    return [p.detach() for p in model.parameters()]


def parameters_of(lane: DrivenLane) -> list[Tensor]:
    """The parameters now."""
    return [p.detach().clone() for p in lane.module.model.parameters()]


def assert_close(ones: list[Tensor], others: list[Tensor], tolerance: float = 1e-5) -> None:
    """Compares tensor by tensor."""
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- memory layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["seed", "sum"])
def test_a_transposed_weight_trains_alike_with_and_without_the_fused_kernel(mode: str) -> None:
    """The fused kernel walks raw memory: merged gradients have the layout of their parameters."""
    lanes = [
        user_lane("Transposed", sections={"fastpaths": {"fused": fused}, "gradients": {"mode": mode}})
        for fused in ("auto", "off")
    ]
    for lane in lanes:
        lane.train_to(40)
    fused, plain = lanes
    assert fused.module.fast_paths.running["fused"] == "fused"
    weight = fused.module.parameters[0]
    assert weight.stride() == (1, 8)
    assert weight.grad is not None
    assert weight.grad.stride() == (1, 8)
    assert_close(parameters_of(fused), parameters_of(plain))


def test_a_transposed_weight_resumes_exactly() -> None:
    """The moments that a new process restores have the layout of their parameter."""
    lane = user_lane("Transposed")
    lane.train_to(10)
    with lane.capture() as image:
        later = user_lane("Transposed")
        later.restore(10, image)
    moments = later.module.optimizer.state[later.module.parameters[0]]
    assert moments["exp_avg"].stride() == (1, 8)
    lane.train_to(30)
    later.train_to(30)
    assert later.digest == lane.digest


@pytest.mark.parametrize("blueprint", ["residual_mlp", "depthwise_conv_adapter"])
def test_seeds_in_a_channels_last_host_train(blueprint: str) -> None:
    """On a CPU, the backward pass of GroupNorm over such activations without a gradient ends the process."""
    lane = user_lane("channels_last")
    lane.train_to(2, {0: seed_state("early", SEED_STAGE_TRAINING, blueprint=blueprint)})
    lane.snapshot()
    lane.train_to(5, {2: seed_state("early", SEED_STAGE_BLENDING, blueprint=blueprint, begin=2)})
    before = {step: lane.losses[step] for step in (3, 4, 5)}
    lane.restore(2)
    lane.train_to(5, {2: seed_state("early", SEED_STAGE_BLENDING, blueprint=blueprint, begin=2)})
    assert {step: lane.losses[step] for step in (3, 4, 5)} == before
    convolution = next(p for p in lane.module.parameters if p.dim() == 4)
    assert convolution.is_contiguous(memory_format=torch.channels_last)


# -- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_layer_that_is_unfrozen_later_trains_as_in_a_bare_loop(clip_norm: float) -> None:
    """From its first gradient on it is cleared, clipped and counted with the others."""
    lane = user_lane("Unfreezing", clip_norm=clip_norm, seed=0, sections={"fastpaths": {"fused": "off"}})
    lane.train_to(40)
    expected = bare_loop(Unfreezing(JobContext(0, torch.device("cpu"))), 40, clip_norm)  # type: ignore[no-untyped-call]
    assert len(lane.module.parameters) == 4
    assert_close(parameters_of(lane), expected)


def test_a_layer_that_is_unfrozen_later_is_in_every_snapshot() -> None:
    """Frozen, it is stored once, and five snapshots fit where two would; unfrozen, each snapshot has its own copy."""
    lane = user_lane("Unfreezing", options={"width": 40_000, "lr": 1e-5}, sections={"rollback": {"memory_mb": 2}})
    digests, kept = dict[int, str](), dict[int, list[int]]()
    for step in range(1, 25):
        lane.train_to(step)
        lane.snapshot()
        digests[step] = lane.digest
        (changed,) = [event for event in lane.snapshots.take_events() if isinstance(event, SnapshotsChanged)]
        kept[step] = [info.position.global_step for info in changed.points]
        assert changed.statistics.size_bytes <= 2 * 2**20
        if step == 14:
            for earlier in reversed(kept[step]):
                assert lane.restore(earlier).state_digest == digests[earlier]
            lane.train_to(step)
    assert (len(kept[14]), kept[14][-1], len(kept[24]), kept[24][-1]) == (5, 14, 2, 24)
    assert lane.module.model[0].weight.requires_grad  # type: ignore[index]
    for earlier in reversed(kept[24]):
        assert lane.restore(earlier).state_digest == digests[earlier]


def test_an_optimizer_of_the_users_own_keeps_its_attributes() -> None:
    """Through fusing, a rebuild for a seed, a rollback across it, and a resume."""
    lane = user_lane("OwnOptimizer")
    optimizer = lane.module.optimizer
    lane.train_to(4)
    lane.snapshot()
    lane.train_to(8, {4: seed_state("s", SEED_STAGE_TRAINING)})
    lane.restore(4)
    lane.train_to(40)
    assert lane.module.optimizer is optimizer
    assert isinstance(optimizer, ScaledAdam)
    assert optimizer.scale == 0.01
    plain = user_lane("OwnOptimizer", sections={"fastpaths": {"fused": "off"}})
    plain.train_to(40)
    assert_close(parameters_of(lane), parameters_of(plain))
    with lane.capture() as image:
        later = user_lane("OwnOptimizer")
        later.restore(40, image)
    lane.train_to(44)
    later.train_to(44)
    assert later.digest == lane.digest


def test_a_scheduler_of_the_users_own_is_adopted() -> None:
    """The rate follows it: no other rate is found, the seed has its share, and a skipped step does not step it."""
    lane = user_lane("OwnScheduler", options={"nan_calls": [6]})
    lane.execute(seed_state("s", SEED_STAGE_TRAINING))
    module = lane.module
    steps = []
    for _ in range(17):
        module.begin_epoch()
        if (step := train_step(module, lambda: True)) is None:
            module.progress = module.progress.ended()
            continue
        steps.append(step)
    assert [step.violations for step in steps if step.violations] == []
    assert [place for place, step in enumerate(steps, 1) if step.skipped] == [5]
    own = module.job.scheduler  # type: ignore[attr-defined]
    assert own.last_epoch == len(steps) - 1
    assert module.optimizer.param_groups[0]["lr"] == 0.005


class Scheduled(Line):
    """Warms up by a scheduler of torch's, which sets the rate to 0 when it is made, and steps it in a method."""

    where: ClassVar[str] = "losses"

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
        return optimizer

    def _step(self, method: str) -> None:
        if method == self.where:
            self.scheduler.step()

    def train_mode(self, model: nn.Module) -> None:
        model.train()
        self._step("train_mode")

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        self._step("losses")
        losses: Mapping[str, Tensor] = super().losses(model, batch)  # type: ignore[no-untyped-call]
        return losses

    def validation_batches(self) -> list[Batch]:
        self._step("validation_batches")
        batches: list[Batch] = super().validation_batches()  # type: ignore[no-untyped-call]
        return batches

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        self._step("evaluate")
        found: Evaluation = super().evaluate(model, batch)  # type: ignore[no-untyped-call]
        model.train()  # as at the end of a loop that the user has written before
        return found


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("where", ["losses", "train_mode", "validation_batches", "evaluate"])
def test_a_scheduler_is_adopted_wherever_it_is_stepped(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start says so; the rates are those of its warm-up, which begins at 0."""
    monkeypatch.setattr(Scheduled, "where", where)
    job = f"{HERE}:Scheduled"
    built = build(Settings(training=TrainingSettings(job=job, device="cpu", threads=1, epochs=3)))
    assert [note for note in built.ready.notes if "LambdaLR of the job, stepped by its code" in note] != []
    with running(built) as run:
        for epoch in (1, 2, 3):
            run.send(RunEpoch(epoch))
            run.wait_for(EpochDone, number=epoch)
        assert [violation for step in run.all_of(StepDone) for violation in step.violations] == []
        steps = 24 if where == "losses" else 3
        rates = run.all_of(EpochDone)[-1].learning_rates
        assert 0.0 < rates["host"] <= 0.05 * steps / 100


class Dropping(Scheduled):
    """Evaluates in two batches, and leaves the model in training mode after each."""

    where: ClassVar[str] = ""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def validation_batches(self) -> list[Batch]:
        halves = zip(torch.split(self.x, 32), torch.split(self.y, 32), strict=True)
        return [Batch(half, 32) for half in halves]


def test_every_batch_of_an_evaluation_finds_the_model_in_evaluation_mode() -> None:
    """Also after the job has set training mode at the end of the batch before; training goes on in its own mode."""
    built = build(Settings(training=TrainingSettings(job=f"{HERE}:Dropping", device="cpu", threads=1)))
    with running(built) as run:
        run.send(RunEpoch(1))
        found = run.wait_for(EpochDone).evaluation
    job, model = Dropping(JobContext(0, torch.device("cpu"))), built.module.model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        expected = functional.mse_loss(model(job.x), job.y, reduction="sum").item()
    assert found.loss_sum == pytest.approx(expected, rel=1e-4)
    assert found.samples == 64


# -- dtypes and seeds that fail --------------------------------------------------------------------------------------


class HalfEmbedding(Line):
    """A bfloat16 embedding, whose sum is cast to float32 before the slot; two losses, so that gradients are merged."""

    def build_model(self) -> nn.Module:
        inner: nn.Module = super().build_model()  # type: ignore[no-untyped-call]

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.inner = nn.Embedding(4, 4, dtype=torch.bfloat16), inner

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.inner(x + self.embedding.weight.sum(0).float())
                return out

        return Model()

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, y = batch.payload
        return {HOST: functional.mse_loss(model(x), y), "aux": functional.l1_loss(model(x), y)}


def test_a_seed_has_the_dtype_of_its_slots_input() -> None:
    """Not that of the model's first parameter; gradients of both dtypes are merged."""
    lane = user_lane(f"{HERE}:HalfEmbedding")
    lane.train_to(3, {1: seed_state("s", SEED_STAGE_TRAINING)})
    lane.train_to(6, {3: seed_state("s", SEED_STAGE_BLENDING, begin=3)})
    branch = [p for _, p in lane.module.seeds.topology.training_parameters("a")]
    assert {p.dtype for p in branch} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in lane.module.parameters)
    assert {p.dtype for p in lane.module.parameters} == {torch.float32, torch.bfloat16}


class Breaking(nn.Module):
    """A branch that raises in its forward or its backward pass once it has been called often enough."""

    def __init__(self, features: int, where: str) -> None:
        super().__init__()
        self.scale, self.where, self.calls = nn.Parameter(torch.ones(features)), where, 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 3 and self.where == "forward":
            raise ValueError("no such shape")
        out: Tensor = h * self.scale
        if self.calls > 3 and self.where == "backward" and out.requires_grad:
            out.register_hook(_raise)  # type: ignore[no-untyped-call]
        return out


def _raise(_gradient: Tensor) -> Tensor:
    raise ValueError("no such gradient")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_seed_that_raises_is_culled_and_the_host_goes_on(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event names the reason, and the same blueprint is refused in that slot from then on."""
    monkeypatch.setattr(Blueprints, "build", lambda _s, _n, slot, init_seed: Breaking(slot.features, where))
    monkeypatch.setattr(Blueprints, "check", lambda *_: None)
    settings = Settings(training=TrainingSettings(job="support.user_jobs:Line", device="cpu", threads=1, epochs=3))
    with running(build(settings)) as run:
        wish = seed_state("s", SEED_STAGE_TRAINING)
        run.done(run.send(wish))
        run.send(RunEpoch(1))
        run.wait_for(EpochDone)
        changed = [event for event in run.all_of(SeedsChanged) if event.refusals]
        assert [(seed_id, "culled: ValueError: no such" in why) for seed_id, why in changed[0].refusals] == [
            ("a", True)
        ]
        assert changed[0].states == ()
        refused = run.done(run.send(wish)).result
        assert isinstance(refused, SeedsChanged)
        assert [seed_id for seed_id, _ in refused.refusals] == ["a"]
        assert "it failed" in refused.refusals[0][1]
        run.send(RunEpoch(2))
        run.wait_for(EpochDone, number=2)


def test_a_seed_that_cannot_train_on_its_slots_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its branch is tried forward and backward on activations like those that the slot has received."""

    class Failing(Breaking):
        def forward(self, h: Tensor) -> Tensor:
            raise RuntimeError(f"not for {h.dtype} of shape {tuple(h.shape)}")

    monkeypatch.setattr(Blueprints, "build", lambda _s, _n, slot, init_seed: Failing(slot.features, ""))
    monkeypatch.setattr(Blueprints, "check", lambda *_: None)
    lane = user_lane("Line")
    result = lane.execute(seed_state("s", SEED_STAGE_TRAINING)).result
    assert isinstance(result, SeedsChanged)
    assert result.states == ()
    assert "not for torch.float32 of shape (8, 8)" in result.refusals[0][1]
    lane.train_to(2)


# -- train_mode ------------------------------------------------------------------------------------------------------


def with_train_mode(context: JobContext) -> FrozenNorm:
    """A job whose first convolution stays in evaluation mode."""

    class Job(FrozenNorm):
        def train_mode(self, model: nn.Module) -> None:
            model.train()
            next(m for m in model.modules() if isinstance(m, nn.Conv2d)).eval()

    return Job(context, DigitsOptions())


def test_the_job_can_keep_layers_in_evaluation_mode() -> None:
    """`train_mode` of the job is called instead of `model.train()`, at the start and in each epoch."""
    lane = user_lane(f"{HERE}:with_train_mode")
    modes = [m.training for m in lane.module.model.modules() if isinstance(m, nn.Conv2d)]
    assert modes == [False, True]
    lane.module.model.eval()
    lane.module.begin_epoch()
    assert [m.training for m in lane.module.model.modules() if isinstance(m, nn.Conv2d)] == modes


# -- compiled models -------------------------------------------------------------------------------------------------


def test_a_job_may_compile_its_own_model() -> None:
    """Names are those of the model itself: a rollback across a graft, and a resume, are exact."""
    lane = user_lane("compiled", sections={"fastpaths": {"compile": "on"}})
    assert lane.module.fast_paths.fallbacks["compile"] == "the job compiles its model itself"
    lane.train_to(2)
    lane.snapshot()
    lane.train_to(4, {2: seed_state("early", SEED_STAGE_TRAINING)})
    losses = dict(lane.losses)
    lane.restore(2)
    assert not lane.module.seeds.topology.training_seeds
    lane.train_to(4, {2: seed_state("early", SEED_STAGE_TRAINING)})
    assert lane.losses == losses
    with lane.capture() as image:
        lane.train_to(6)
        digest = lane.digest
        later = user_lane("compiled")
        restored = later.restore(4, image)
    assert restored.state_digest == restored.expected_digest
    later.train_to(6)
    assert later.digest == digest


def test_blending_compiles_one_graph() -> None:
    """Alpha is an input of the graph: a ramp of a dozen steps compiles it once, as does full strength."""
    lane = user_lane("Line", options={"samples": 512})
    lane.module.model.compile(backend="eager")
    counted = torch._dynamo.utils.counters["stats"]  # noqa: SLF001 - torch has no public count
    lane.train_to(2, {0: seed_state("s", SEED_STAGE_TRAINING)})
    lane.train_to(4, {2: seed_state("s", SEED_STAGE_BLENDING, begin=2, steps=14)})
    graphs = counted["unique_graphs"]
    lane.train_to(18)
    lane.train_to(20, {18: seed_state("s", SEED_STAGE_PROBATIONARY)})
    assert counted["unique_graphs"] == graphs


def test_compiling_is_reported_and_ends_with_the_limit() -> None:
    """Whatever torch compiles, in the job's code too, is spanned; beyond torch's limit `compile` is reported as off."""
    spans: list[str] = []

    @contextmanager
    def span() -> Iterator[None]:
        spans.append("begin")
        yield
        spans.append("end")

    paths = FastPaths(FastPathSettings(compile="on"), torch.device("cpu"), deterministic=False)
    kinds = ["a"]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(kinds[0])

    model = Model()
    model.compile(backend="eager")
    paths.running["compile"] = "on"
    with spanning_compilation(span):
        for length in range(1, 9):
            kinds[0] = "a" * length
            model(torch.ones(2))
            assert not paths.new_compile_fallback()
        assert spans == ["begin", "end"] * (len(spans) // 2)
        assert spans
        kinds[0] = "a" * 9
        model(torch.ones(2))
        assert "as often as torch allows" in paths.new_compile_fallback()
    assert not paths.new_compile_fallback()
    assert paths.descriptions["compile"].startswith("off: parts of the model run uncompiled")
    compiled = len(spans)
    torch.compiler.reset()
    model(torch.ones(2))
    assert len(spans) == compiled, "nothing is spanned afterwards"
