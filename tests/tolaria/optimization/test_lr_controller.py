from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from tolaria.errors import (
    AdjustmentRefusedError,
    ControllerStateError,
    GroupConflictError,
    ScheduleError,
    UnknownGroupError,
    UnsuitableOptimizerError,
)
from tolaria.optimization import (
    AfterPeriod,
    Constant,
    Cosine,
    LearningRateSettings,
    Retraction,
    Schedule,
    StepDecay,
    UnifiedLRController,
    Warmup,
)
from tolaria.values.optimization import Adjustment, GroupRole, LearningRateViolation

FLAT = LearningRateSettings(Schedule(Constant()), seed_warmup=Warmup(4, floor=0.2), floor=1e-4, ceiling=2.0)


@dataclass
class Holder:
    """Somebody with an optimizer."""

    optimizer: Optimizer


def param() -> nn.Parameter:
    """A parameter of two elements."""
    return nn.Parameter(torch.ones(2))


def holder(lr: Any = 0.1, *, groups: int = 1) -> Holder:
    """An SGD over that many groups without names."""
    entries: list[dict[str, Any]] = [{"params": [param()]} for _ in range(groups)]
    return Holder(SGD(entries, lr=lr))


def change(group: str | None = None, *, request_id: str = "r", **what: Any) -> Adjustment:
    """An adjustment by an operator."""
    return Adjustment(group=group, origin="operator", request_id=request_id, reason="trial", **what)


def rates_in(held: Holder) -> dict[str, float]:
    """What the optimizer itself holds."""
    return {group["name"]: float(group["lr"]) for group in held.optimizer.param_groups}


def with_seed(held: Holder, controller: UnifiedLRController, at_step: int = 10) -> None:
    """Put a seed's group into the optimizer and under control."""
    held.optimizer.add_param_group({"params": [param()], "name": "seed:a", "lr": 99.0})
    controller.register_group("seed:a", GroupRole.SEED, at_step=at_step)


def test_host_seed_and_frozen_groups_get_their_rates() -> None:
    """The host follows the schedule, a seed a tenth of it with a warm-up of its own, the frozen group stays at 0."""
    held = holder()
    controller = UnifiedLRController(
        held, LearningRateSettings(Schedule(StepDecay(12, decay=0.5)), seed_warmup=Warmup(4, floor=0.2))
    )
    with_seed(held, controller)
    held.optimizer.add_param_group({"params": [param()], "name": "old"})
    controller.register_group("old", GroupRole.FROZEN, at_step=0)
    seen = []
    for step in (10, 11, 12, 14):
        controller.apply(step)
        seen.append(rates_in(held))
    assert [rates["host"] for rates in seen] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert [rates["seed:a"] for rates in seen] == pytest.approx([0.01 * 0.2, 0.01 * 0.4, 0.005 * 0.6, 0.005])
    assert [rates["old"] for rates in seen] == [0.0] * 4
    assert controller.learning_rates() == seen[-1]


def test_groups_without_names_keep_their_own_base_rates() -> None:
    """A job's several groups become host/0 and host/1, and `host` means both."""
    held = holder(groups=2)
    held.optimizer.param_groups[1]["lr"] = 0.5
    controller = UnifiedLRController(held, FLAT)
    controller.adjust(change("host", factor=0.5), at_step=0)
    controller.apply(0)
    assert rates_in(held) == {"host/0": 0.05, "host/1": 0.25}


def test_a_foreign_write_is_found_and_put_back() -> None:
    """The violation names the group and both values; after it the optimizer holds what the controller wrote."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    controller.apply(0)
    assert controller.verify() == []
    held.optimizer.param_groups[0]["lr"] = 0.7
    assert controller.before_step(1) == [LearningRateViolation("host", 0.1, 0.7)]
    assert rates_in(held) == {"host": 0.1}
    assert controller.before_step(2) == []


def test_differences_below_a_millionth_are_no_violation() -> None:
    """Rounding is not reported, but it does not stay either; just above the tolerance it is reported."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    controller.apply(0)
    held.optimizer.param_groups[0]["lr"] = 0.1 * (1 + 0.9e-6)
    assert controller.verify() == []
    assert rates_in(held) == {"host": 0.1}
    held.optimizer.param_groups[0]["lr"] = 0.1 * (1 + 1.1e-6)
    assert len(controller.verify()) == 1


@pytest.mark.parametrize("foreign", [math.nan, "fast", None, torch.tensor([0.1, 0.2])])
def test_a_foreign_write_of_no_number_is_found(foreign: object) -> None:
    """NaN, words, nothing and vectors are violations too, shown as NaN."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    controller.apply(0)
    held.optimizer.param_groups[0]["lr"] = foreign
    (violation,) = controller.verify()
    assert math.isnan(violation.found)
    assert rates_in(held) == {"host": 0.1}


def test_a_frozen_group_is_guarded_at_zero() -> None:
    """However small a foreign rate is, it is not 0."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    controller.set_role("host", GroupRole.FROZEN)
    controller.apply(0)
    held.optimizer.param_groups[0]["lr"] = 1e-12
    assert controller.verify() == [LearningRateViolation("host", 0.0, 1e-12)]


def test_rates_that_are_tensors_are_filled_in_place() -> None:
    """Groups that share the default's tensor get one each, which stays the same object from then on."""
    held = holder(torch.tensor(0.1, dtype=torch.float64), groups=2)
    controller = UnifiedLRController(held, LearningRateSettings(Schedule(StepDecay(1, decay=0.5))))
    controller.adjust(change("host/1", factor=0.5), at_step=0)
    controller.apply(0)
    tensors = [group["lr"] for group in held.optimizer.param_groups]
    assert all(isinstance(tensor, Tensor) for tensor in tensors)
    controller.apply(1)
    assert all(group["lr"] is tensor for group, tensor in zip(held.optimizer.param_groups, tensors, strict=True))
    assert rates_in(held) == pytest.approx({"host/0": 0.05, "host/1": 0.025})


@pytest.mark.parametrize(
    "write", [lambda lr: lr.fill_(0.7), lambda lr: lr.data.fill_(0.7), lambda lr: torch.tensor(0.7)]
)
def test_foreign_writes_to_tensor_rates_are_found(write: Callable[[Tensor], Tensor]) -> None:
    """Whether the tensor was written in place or exchanged; the controller's tensor is back afterwards."""
    held = holder(torch.tensor(0.1))
    controller = UnifiedLRController(held, FLAT)
    controller.apply(0)
    (group,) = held.optimizer.param_groups
    own = group["lr"]
    group["lr"] = write(own)
    (violation,) = controller.verify()
    assert (violation.expected, violation.found) == pytest.approx((0.1, 0.7))
    assert group["lr"] is own
    assert own.item() == pytest.approx(0.1)


def test_unchanged_rates_are_not_written() -> None:
    """A tensor's version stays where it is while the rate does."""
    held = holder(torch.tensor(0.1))
    controller = UnifiedLRController(held, FLAT)
    controller.apply(0)
    version = held.optimizer.param_groups[0]["lr"]._version
    for step in range(1, 5):
        assert controller.before_step(step) == []
    assert held.optimizer.param_groups[0]["lr"]._version == version


def test_adjustments_expire_and_are_remembered() -> None:
    """A cut for three steps ends by itself; the history tells who, why, when, and what it did."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    cut = change(factor=0.5, expires_after_steps=3)
    record = controller.adjust(cut, at_step=5)
    seen = []
    for step in range(5, 9):
        controller.apply(step)
        seen.append(rates_in(held)["host"])
    assert seen == [0.05, 0.05, 0.05, 0.1]
    assert (record.adjustment, record.at_step, record.before, record.after) == (cut, 5, {"host": 0.1}, {"host": 0.05})
    assert controller.history == (record,)
    assert controller.living == ()


def test_an_adjustment_can_be_taken_back() -> None:
    """Its rate returns to the schedule, and the history shows by whom."""
    controller = UnifiedLRController(holder(), FLAT)
    controller.adjust(change(value=0.3, request_id="a"), at_step=0)
    retraction = Retraction(origin="operator", request_id="b", reason="enough")
    record = controller.retract("a", retraction, at_step=4)
    assert (record.before, record.after, record.retraction) == ({"host": 0.3}, {"host": 0.1}, retraction)
    assert controller.rate_at("host", 4) == 0.1
    with pytest.raises(AdjustmentRefusedError, match="no living adjustment"):
        controller.retract("a", retraction, at_step=5)


def test_the_history_is_bounded() -> None:
    """Of many adjustments only the last are remembered."""
    controller = UnifiedLRController(holder(), LearningRateSettings(Schedule(Constant()), history_max=3))
    for count in range(1, 6):
        controller.adjust(change(value=0.01 * count), at_step=count)
    assert [record.at_step for record in controller.history] == [3, 4, 5]


def test_living_adjustments_are_bounded() -> None:
    """One too many is refused; a value for good makes room."""
    controller = UnifiedLRController(holder(), LearningRateSettings(Schedule(Constant()), adjustments_max=2))
    controller.adjust(change(factor=0.5), at_step=0)
    controller.adjust(change(factor=0.5), at_step=0)
    with pytest.raises(AdjustmentRefusedError, match="2 adjustments live"):
        controller.adjust(change(factor=0.5), at_step=0)
    controller.adjust(change(value=0.2), at_step=0)
    assert len(controller.living) == 1


@pytest.mark.parametrize(
    ("what", "field"),
    [({"value": 2.1}, "value"), ({"value": 1e-5}, "value"), ({"factor": 21.0}, "factor"), ({"factor": 1e-4}, "factor")],
)
def test_an_adjustment_out_of_bounds_changes_nothing(what: dict[str, Any], field: str) -> None:
    """Neither the rates nor the history know of a refused one."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    with pytest.raises(AdjustmentRefusedError) as caught:
        controller.adjust(change(**what), at_step=0)
    controller.apply(0)
    assert (caught.value.field, rates_in(held), controller.history, controller.living) == (field, {"host": 0.1}, (), ())


def test_adjusted_rates_stay_in_bounds_when_the_schedule_moves() -> None:
    """A cut that was fine at first stops at the floor later, and where the schedule is lower still, at the schedule."""
    held = holder()
    settings = LearningRateSettings(Schedule(StepDecay(1, decay=0.1)), floor=1e-3)
    controller = UnifiedLRController(held, settings)
    controller.adjust(change(factor=0.5), at_step=0)
    assert [controller.rate_at("host", step) for step in range(4)] == pytest.approx([0.05, 5e-3, 1e-3, 1e-4])


def test_adjusting_an_unknown_or_frozen_group_is_refused() -> None:
    """The error lists the groups there are."""
    controller = UnifiedLRController(holder(), FLAT)
    controller.register_group("old", GroupRole.FROZEN, at_step=0)
    with pytest.raises(UnknownGroupError, match="no param group 'seed:z'; there are: host, old"):
        controller.adjust(change("seed:z", factor=0.5), at_step=0)
    with pytest.raises(AdjustmentRefusedError, match="'old' is frozen"):
        controller.adjust(change("old", factor=0.5), at_step=0)
    controller.adjust(change(factor=0.5), at_step=0)
    assert controller.rate_at("old", 0) == 0.0


def test_an_optimizer_without_rates_is_refused_at_the_start() -> None:
    """The error says which group lacks what."""
    held = holder()
    del held.optimizer.param_groups[0]["lr"]
    with pytest.raises(UnsuitableOptimizerError, match="SGD: param group 'host' has no lr"):
        UnifiedLRController(held, FLAT)


def test_groups_that_share_a_name_are_refused() -> None:
    """Rates go by names."""
    held = Holder(Adam([{"params": [param()], "name": "host"}, {"params": [param()], "name": "host"}], lr=0.1))
    with pytest.raises(UnsuitableOptimizerError, match="share names"):
        UnifiedLRController(held, FLAT)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, 2.5])
def test_a_base_rate_that_is_none_is_refused(lr: float) -> None:
    """Negative, NaN, infinite, or above the ceiling."""
    held = holder()
    held.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ScheduleError, match=r"lr: of group 'host' must be between 0 and 2\.0"):
        UnifiedLRController(held, FLAT)


@pytest.mark.parametrize("what", [{"seed_factor": 0.0}, {"seed_factor": 1.5}, {"floor": 1.0, "ceiling": 0.5}])
def test_settings_without_sense_are_refused(what: dict[str, float]) -> None:
    """A seed needs a share, the floor lies below the ceiling."""
    with pytest.raises(ScheduleError):
        LearningRateSettings(Schedule(Constant()), **what)  # type: ignore[arg-type]


def test_groups_come_and_go() -> None:
    """A name is registered once, is unknown when it has gone, and a group that nobody registered stops the step."""
    held = holder()
    controller = UnifiedLRController(held, FLAT)
    with_seed(held, controller)
    with pytest.raises(GroupConflictError, match="'seed:a' is registered already"):
        controller.register_group("seed:a", GroupRole.SEED, at_step=0)
    controller.apply(10)
    controller.unregister_group("seed:a")
    assert controller.learning_rates() == {"host": 0.1}
    with pytest.raises(UnknownGroupError):
        controller.unregister_group("seed:a")
    with pytest.raises(UnknownGroupError, match="seed:a"):
        controller.apply(11)
    del held.optimizer.param_groups[1]["name"]
    with pytest.raises(UnsuitableOptimizerError, match="without a name"):
        controller.apply(12)


def test_a_seed_needs_a_host_to_follow() -> None:
    """Without a host group its base rate must be given."""
    controller = UnifiedLRController(holder(), FLAT)
    controller.set_role("host", GroupRole.FROZEN)
    with pytest.raises(GroupConflictError, match="no host"):
        controller.register_group("seed:a", GroupRole.SEED, at_step=0)
    controller.register_group("seed:a", GroupRole.SEED, at_step=0, base_lr=0.02)
    assert controller.rate_at("seed:a", 4) == 0.02


def _rates_from(controller: UnifiedLRController, held: Holder, steps: range) -> list[dict[str, float]]:
    rates = []
    for step in steps:
        assert controller.before_step(step) == []
        rates.append(rates_in(held))
    return rates


@given(
    resume_at=st.integers(0, 60),
    adjusted_at=st.integers(0, 59),
    expires=st.none() | st.integers(1, 30),
    warmup_steps=st.integers(0, 30),
    after=st.sampled_from(AfterPeriod),
)
def test_a_resumed_controller_goes_on_as_the_uninterrupted_one(
    resume_at: int, adjusted_at: int, expires: int | None, warmup_steps: int, after: AfterPeriod
) -> None:
    """Saved through JSON at any step, with a seed and adjustments alive, every later rate is bit by bit the same."""
    settings = LearningRateSettings(Schedule(Cosine(20, 0.05, after), Warmup(warmup_steps, 0.1)))
    held = holder()
    controller = UnifiedLRController(held, settings)
    with_seed(held, controller, at_step=7)
    _rates_from(controller, held, range(adjusted_at))
    controller.adjust(change("host", factor=0.5, expires_after_steps=expires), at_step=adjusted_at)
    controller.adjust(change("seed:a", value=0.02, expires_after_steps=expires), at_step=adjusted_at)
    resume_at = max(resume_at, adjusted_at)
    _rates_from(controller, held, range(adjusted_at, resume_at))
    saved = json.loads(json.dumps(controller.state_dict()))
    rest = _rates_from(controller, held, range(resume_at, 80))

    other = holder(lr=0.9)
    resumed = UnifiedLRController(other, settings)
    other.optimizer.add_param_group({"params": [param()], "name": "seed:a"})
    resumed.load_state_dict(saved)
    resumed.apply(resume_at)
    assert _rates_from(resumed, other, range(resume_at, 80)) == rest


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"groups": None},
        {"groups": {"host": {"role": "guest", "base_lr": 0.1, "registered_at": 0}}},
        {"groups": {"host": {"role": "host", "base_lr": math.nan, "registered_at": 0}}},
        {"groups": {"host": {"role": "host", "base_lr": 0.1}}},
        {"adjustments": [{"at_step": 3}]},
        {"adjustments": [{"at_step": 3, "adjustment": {"group": None}}]},
    ],
)
def test_a_damaged_state_changes_nothing(damage: dict[str, Any]) -> None:
    """It is refused with a clear error, and the controller goes on as it was."""
    controller = UnifiedLRController(holder(), FLAT)
    before = controller.state_dict()
    with pytest.raises(ControllerStateError):
        controller.load_state_dict(before | damage)
    assert controller.state_dict() == before
