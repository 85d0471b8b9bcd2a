from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from tolaria.config import ControlSettings, OptimizerSettings
from tolaria.errors import (
    AdjustmentRefusedError,
    ControllerStateError,
    GroupConflictError,
    RebuildFailedError,
    ScheduleError,
    UnknownGroupError,
    UnsuitableOptimizerError,
)
from tolaria.optimization import GroupPlan, OptimizerManager, UnifiedLRController, regroup
from tolaria.values.optimization import (
    AUTOMATIC,
    CONTROLLER,
    Adjustment,
    GroupRole,
    LearningRateViolation,
    RebuildOutcome,
)

FLAT: dict[str, Any] = {"lr_floor": 1e-4, "lr_ceiling": 2.0}
HALVED: dict[str, Any] = {"policy": "step", "period_steps": 1, "decay": 0.5}


def controller_of(managed: OptimizerManager, **fields: Any) -> UnifiedLRController:
    """A controller whose seeds have a warm-up of four steps."""
    settings = OptimizerSettings(**{"seed_warmup_steps": 4, "seed_warmup_floor": 0.2, **fields})
    return UnifiedLRController(managed, settings, ControlSettings(), run_steps=1000)


def param() -> nn.Parameter:
    """A parameter of two elements."""
    return nn.Parameter(torch.ones(2))


def manager_of(optimizer: Optimizer) -> OptimizerManager:
    """A manager of the optimizer, whose parameters are named by number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    return OptimizerManager(optimizer, named, min_interval_steps=0)


def sgd(lr: Any = 0.1, *, groups: int = 1) -> OptimizerManager:
    """A manager of an SGD with the given number of groups without names."""
    entries: list[dict[str, Any]] = [{"params": [param()]} for _ in range(groups)]
    return manager_of(SGD(entries, lr=lr))


def change(group: str | None = None, *, request_id: str = "r", origin: str = "operator", **what: Any) -> Adjustment:
    """An adjustment, by an operator unless `origin` is given."""
    return Adjustment(group=group, origin=origin, request_id=request_id, reason="trial", **what)


def rates_in(managed: OptimizerManager) -> dict[str, float]:
    """The rates in the optimizer."""
    return {group["name"]: float(group["lr"]) for group in managed.optimizer.param_groups}


def with_seed(managed: OptimizerManager, controller: UnifiedLRController, at_step: int = 10) -> None:
    """Adds a seed's group to the optimizer and registers it."""
    managed.optimizer.add_param_group({"params": [param()], "name": "seed:a", "lr": 99.0})
    controller.register_group("seed:a", GroupRole.SEED, at_step=at_step)


def test_host_seed_and_frozen_groups_get_their_rates() -> None:
    """The host follows the schedule, a seed a tenth of it with a warm-up, and a frozen group stays at 0."""
    managed = sgd()
    controller = controller_of(managed, policy="step", period_steps=12, decay=0.5)
    with_seed(managed, controller)
    managed.optimizer.add_param_group({"params": [param()], "name": "old"})
    controller.register_group("old", GroupRole.FROZEN, at_step=0)
    seen = []
    for step in (10, 11, 12, 14):
        controller.apply(step)
        seen.append(rates_in(managed))
    assert [rates["host"] for rates in seen] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert [rates["seed:a"] for rates in seen] == pytest.approx([0.01 * 0.2, 0.01 * 0.4, 0.005 * 0.6, 0.005])
    assert [rates["old"] for rates in seen] == [0.0] * 4
    assert controller.learning_rates() == seen[-1]


def test_groups_without_names_keep_their_own_base_rates() -> None:
    """Two groups of a job are named host/0 and host/1, and `host` means both."""
    managed = sgd(groups=2)
    managed.optimizer.param_groups[1]["lr"] = 0.5
    controller = controller_of(managed, **FLAT)
    controller.adjust(change("host", factor=0.5), at_step=0)
    controller.apply(0)
    assert rates_in(managed) == {"host/0": 0.05, "host/1": 0.25}


def test_another_write_is_detected_and_undone() -> None:
    """The violation names the group and both values; the optimizer has the controller's rate again."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    controller.apply(0)
    assert controller.verify() == []
    managed.optimizer.param_groups[0]["lr"] = 0.7
    assert controller.before_step(1) == [LearningRateViolation("host", 0.1, 0.7)]
    assert rates_in(managed) == {"host": 0.1}
    assert controller.before_step(2) == []


def test_differences_below_a_millionth_are_no_violation() -> None:
    """A rounding difference is undone without a report; above the tolerance it is reported."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    controller.apply(0)
    managed.optimizer.param_groups[0]["lr"] = 0.1 * (1 + 0.9e-6)
    assert controller.verify() == []
    assert rates_in(managed) == {"host": 0.1}
    managed.optimizer.param_groups[0]["lr"] = 0.1 * (1 + 1.1e-6)
    assert len(controller.verify()) == 1


@pytest.mark.parametrize("written", [math.nan, "fast", None, torch.tensor([0.1, 0.2])])
def test_a_write_that_is_not_a_number_is_detected(written: object) -> None:
    """NaN, strings, None and vectors are violations with `found` NaN."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    controller.apply(0)
    managed.optimizer.param_groups[0]["lr"] = written
    (violation,) = controller.verify()
    assert math.isnan(violation.found)
    assert rates_in(managed) == {"host": 0.1}


def test_a_frozen_group_is_kept_at_zero() -> None:
    """Even a tiny rate is a violation."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    controller.set_role("host", GroupRole.FROZEN)
    controller.apply(0)
    managed.optimizer.param_groups[0]["lr"] = 1e-12
    assert controller.verify() == [LearningRateViolation("host", 0.0, 1e-12)]


def test_rates_that_are_tensors_are_filled_in_place() -> None:
    """Groups that share the default's tensor get one each, which stays the same object."""
    managed = sgd(torch.tensor(0.1, dtype=torch.float64), groups=2)
    controller = controller_of(managed, **HALVED)
    controller.adjust(change("host/1", factor=0.5), at_step=0)
    controller.apply(0)
    tensors = [group["lr"] for group in managed.optimizer.param_groups]
    assert all(isinstance(tensor, Tensor) for tensor in tensors)
    controller.apply(1)
    assert all(group["lr"] is tensor for group, tensor in zip(managed.optimizer.param_groups, tensors, strict=True))
    assert rates_in(managed) == pytest.approx({"host/0": 0.05, "host/1": 0.025})


@pytest.mark.parametrize(
    "write", [lambda lr: lr.fill_(0.7), lambda lr: lr.data.fill_(0.7), lambda lr: torch.tensor(0.7)]
)
def test_other_writes_to_tensor_rates_are_detected(write: Callable[[Tensor], Tensor]) -> None:
    """In-place writes and replaced tensors are detected; the controller's tensor is restored."""
    managed = sgd(torch.tensor(0.1))
    controller = controller_of(managed, **FLAT)
    controller.apply(0)
    (group,) = managed.optimizer.param_groups
    own = group["lr"]
    group["lr"] = write(own)
    (violation,) = controller.verify()
    assert (violation.expected, violation.found) == pytest.approx((0.1, 0.7))
    assert group["lr"] is own
    assert own.item() == pytest.approx(0.1)


def test_unchanged_rates_are_not_written() -> None:
    """The version of a tensor does not change while the rate does not."""
    managed = sgd(torch.tensor(0.1))
    controller = controller_of(managed, **FLAT)
    controller.apply(0)
    rate = managed.optimizer.param_groups[0]["lr"]
    version = rate._version  # noqa: SLF001 - how torch counts the writes to a tensor
    for step in range(1, 5):
        assert controller.before_step(step) == []
    assert rate._version == version  # noqa: SLF001


def test_adjustments_expire() -> None:
    """A factor for three steps ends after them; the result has the rates before and after."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    cut = change(factor=0.5, expires_after_steps=3)
    change_of_rate = controller.adjust(cut, at_step=5)
    seen = []
    for step in range(5, 9):
        controller.apply(step)
        seen.append(rates_in(managed)["host"])
    assert seen == [0.05, 0.05, 0.05, 0.1]
    assert (change_of_rate.before, change_of_rate.after) == ({"host": 0.1}, {"host": 0.05})
    assert controller.adjustments == ()


def test_lasting_factors_are_folded_and_never_refused() -> None:
    """A thousand factors have the effect of their product, in at most 64 adjustments; a value replaces them."""
    managed = sgd(groups=2)
    controller = controller_of(managed, lr_floor=0.0)
    for number in range(996):
        controller.adjust(change(("host/0", "host/1", None)[number % 3], factor=(2.0, 0.5)[number % 2]), at_step=number)
        assert len(controller.adjustments) <= 64
    controller.adjust(change("host", factor=0.5), at_step=1000)
    controller.apply(1000)
    assert rates_in(managed) == pytest.approx({"host/0": 0.05, "host/1": 0.05})
    controller.adjust(change(value=0.2), at_step=0)
    assert len(controller.adjustments) == 1


def test_temporary_adjustments_are_bounded_except_an_automatic_cut() -> None:
    """The 65th temporary one is refused; the cut after a rollback and a lasting factor still apply."""
    managed = sgd()
    controller = controller_of(managed)
    for _ in range(64):
        controller.adjust(change(factor=1.0, expires_after_steps=100), at_step=0)
    with pytest.raises(AdjustmentRefusedError, match="64 adjustments are active"):
        controller.adjust(change(factor=0.9, expires_after_steps=100), at_step=0)
    controller.adjust(change(origin=AUTOMATIC, factor=0.5, expires_after_steps=100), at_step=0)
    controller.adjust(change(factor=0.5), at_step=0)
    controller.apply(0)
    assert rates_in(managed) == {"host": 0.025}


def test_an_automatic_cut_applies_as_far_as_the_floor_allows() -> None:
    """At the floor it is limited and not refused."""
    managed = sgd(lr=2e-4)
    controller = controller_of(managed, **FLAT)
    controller.adjust(change(origin=AUTOMATIC, factor=0.01, expires_after_steps=5), at_step=0)
    controller.apply(0)
    assert rates_in(managed) == {"host": 1e-4}


@pytest.mark.parametrize(
    ("what", "rate", "limits"),
    [
        ({"factor": 0.5}, 0.05, 0),
        ({"factor": 1e-9}, 0.001, 1),
        ({"factor": 1e9}, 1.0, 1),
        ({"value": 0.0}, 0.001, 1),
        ({"value": 0.3}, 0.3, 0),
        ({"value": 7.0}, 1.0, 1),
        ({"factor": 1e-9, "expires_after_steps": 7}, 0.001, 1),
    ],
)
def test_the_controller_stays_within_its_authority(what: dict[str, Any], rate: float, limits: int) -> None:
    """Its change is limited to 0.01 to 10 times the schedule's rate, and a sentence says so."""
    managed = sgd()
    controller = controller_of(managed, lr_floor=0.0)
    made = controller.adjust(change(origin=CONTROLLER, **what), at_step=0)
    controller.apply(0)
    assert rates_in(managed) == pytest.approx({"host": rate})
    assert made.after == pytest.approx({"host": rate})
    assert len(made.limits) == limits


def test_cuts_of_the_controller_do_not_add_up_beyond_its_bound() -> None:
    """After a hundred halvings a single doubling has effect, and the schedule's decay moves the bounds."""
    managed = sgd()
    controller = controller_of(managed, lr_floor=0.0, policy="step", period_steps=1000, decay=0.1)
    for step in range(100):
        controller.adjust(change(origin=CONTROLLER, factor=0.5), at_step=step)
    controller.apply(100)
    assert rates_in(managed) == pytest.approx({"host": 0.001})
    controller.adjust(change(origin=CONTROLLER, factor=2.0), at_step=101)
    controller.apply(101)
    assert rates_in(managed) == pytest.approx({"host": 0.002})
    controller.adjust(change(origin=CONTROLLER, value=1.0), at_step=102)
    controller.apply(102)
    assert rates_in(managed) == pytest.approx({"host": 1.0})
    controller.apply(1000)
    assert rates_in(managed) == pytest.approx({"host": 0.1})


def test_the_controller_is_bounded_by_what_the_operator_has_set() -> None:
    """Neither its value nor its factors leave 0.01 to 10 times the operator's rate, and its value replaces none."""
    managed = sgd()
    controller = controller_of(managed, lr_floor=0.0)
    controller.adjust(change(factor=0.1), at_step=0)
    controller.adjust(change(origin=CONTROLLER, value=2.0), at_step=1)
    controller.apply(1)
    assert rates_in(managed) == pytest.approx({"host": 0.1})
    assert [each.adjustment.origin for each in controller.adjustments] == ["operator", "tamiyo"]
    controller.adjust(change(value=0.03), at_step=2)
    controller.apply(2)
    assert rates_in(managed) == {"host": 0.03}
    assert [each.adjustment.origin for each in controller.adjustments] == ["operator"]


def test_an_operators_adjustment_outlives_the_load_of_an_older_state() -> None:
    """It is in force from the loaded step on, and the rest of the state is the loaded one."""
    managed = sgd()
    controller = controller_of(managed)
    controller.adjust(change(request_id="old", factor=0.5, expires_after_steps=30), at_step=5)
    saved = controller.state_dict()
    controller.adjust(change(request_id="new", factor=0.1), at_step=50)
    in_force = controller.adjustments
    controller.load_state_dict(saved)
    controller.carry_over(in_force, from_step=60, at_step=10)
    controller.apply(10)
    assert rates_in(managed) == pytest.approx({"host": 0.005})
    controller.apply(40)
    assert rates_in(managed) == pytest.approx({"host": 0.01})


@pytest.mark.parametrize(
    ("what", "field"),
    [({"value": 2.1}, "value"), ({"value": 1e-5}, "value"), ({"factor": 21.0}, "factor"), ({"factor": 1e-4}, "factor")],
)
def test_an_adjustment_out_of_bounds_changes_nothing(what: dict[str, Any], field: str) -> None:
    """Neither the rates nor the active adjustments change."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    with pytest.raises(AdjustmentRefusedError) as caught:
        controller.adjust(change(**what), at_step=0)
    controller.apply(0)
    assert (caught.value.field, rates_in(managed), controller.adjustments) == (field, {"host": 0.1}, ())


def test_adjusted_rates_stay_in_bounds_when_the_schedule_moves() -> None:
    """An adjusted rate ends at the floor or, where the schedule is lower, at the scheduled rate."""
    managed = sgd()
    controller = controller_of(managed, policy="step", period_steps=1, decay=0.1, lr_floor=1e-3)
    controller.adjust(change(factor=0.5), at_step=0)
    rates = [rates["host"] for rates in _rates_from(controller, managed, range(4))]
    assert rates == pytest.approx([0.05, 5e-3, 1e-3, 1e-4])


def test_adjusting_an_unknown_or_frozen_group_is_refused() -> None:
    """The error lists the known groups."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    managed.optimizer.add_param_group({"params": [param()], "name": "old"})
    controller.register_group("old", GroupRole.FROZEN, at_step=0)
    with pytest.raises(UnknownGroupError, match="no param group 'seed:z'; there are: host, old"):
        controller.adjust(change("seed:z", factor=0.5), at_step=0)
    with pytest.raises(AdjustmentRefusedError, match="'old' is frozen"):
        controller.adjust(change("old", factor=0.5), at_step=0)
    controller.adjust(change(factor=0.5), at_step=0)
    controller.apply(0)
    assert rates_in(managed) == {"host": 0.05, "old": 0.0}


def test_an_optimizer_without_rates_is_refused() -> None:
    """The error names the group."""
    managed = sgd()
    del managed.optimizer.param_groups[0]["lr"]
    with pytest.raises(UnsuitableOptimizerError, match="SGD: param group 'host' has no lr"):
        controller_of(managed, **FLAT)


def test_groups_that_share_a_name_are_refused() -> None:
    """Rates are set by name, so names must be unique."""
    optimizer = Adam([{"params": [param()], "name": "host"}, {"params": [param()], "name": "host"}], lr=0.1)
    with pytest.raises(UnsuitableOptimizerError, match="share names"):
        manager_of(optimizer)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, 2.5])
def test_an_invalid_base_rate_is_refused(lr: float) -> None:
    """Negative, NaN and infinite rates and those above the ceiling are refused."""
    managed = sgd()
    managed.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ScheduleError, match=r"lr: of group 'host' must be between 0 and 2\.0"):
        controller_of(managed, **FLAT)


def test_reversed_bounds_are_refused() -> None:
    """The floor must not exceed the ceiling."""
    with pytest.raises(ScheduleError, match=r"floor: must be at most the ceiling, is 1\.0 of 0\.5"):
        controller_of(sgd(), lr_floor=1.0, lr_ceiling=0.5)


def test_groups_are_registered_and_unregistered() -> None:
    """A name can be registered once; a step with an unregistered or nameless group raises an error."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    with_seed(managed, controller)
    with pytest.raises(GroupConflictError, match="'seed:a' is registered already"):
        controller.register_group("seed:a", GroupRole.SEED, at_step=0)
    controller.apply(10)
    controller.unregister_group("seed:a")
    assert controller.learning_rates() == {"host": 0.1}
    with pytest.raises(UnknownGroupError):
        controller.unregister_group("seed:a")
    with pytest.raises(UnknownGroupError, match="seed:a"):
        controller.apply(11)
    del managed.optimizer.param_groups[1]["name"]
    with pytest.raises(UnsuitableOptimizerError, match="without a name"):
        controller.apply(12)


def test_a_seed_needs_a_host_group_or_a_base_rate() -> None:
    """Without a host group the base rate must be given."""
    managed = sgd()
    controller = controller_of(managed, **FLAT)
    controller.set_role("host", GroupRole.FROZEN)
    managed.optimizer.add_param_group({"params": [param()], "name": "seed:a"})
    with pytest.raises(GroupConflictError, match="no host"):
        controller.register_group("seed:a", GroupRole.SEED, at_step=0)
    controller.register_group("seed:a", GroupRole.SEED, at_step=0, base_lr=0.02)
    controller.apply(4)
    assert rates_in(managed)["seed:a"] == 0.02


def _rates_from(controller: UnifiedLRController, managed: OptimizerManager, steps: range) -> list[dict[str, float]]:
    rates = []
    for step in steps:
        assert controller.before_step(step) == []
        rates.append(rates_in(managed))
    return rates


@given(
    resume_at=st.integers(0, 60),
    adjusted_at=st.integers(0, 59),
    expires=st.none() | st.integers(1, 30),
    warmup_steps=st.integers(0, 30),
    after=st.sampled_from(["hold", "restart"]),
)
def test_a_resumed_controller_continues_exactly(
    resume_at: int, adjusted_at: int, expires: int | None, warmup_steps: int, after: str
) -> None:
    """After saving as JSON at any step, with a seed and active adjustments, all later rates have the same bits."""
    schedule: dict[str, Any] = {"policy": "cosine", "period_steps": 20, "floor": 0.05, "after_period": after}
    schedule |= {"warmup_steps": warmup_steps, "warmup_floor": 0.1}
    managed = sgd()
    controller = controller_of(managed, **schedule)
    with_seed(managed, controller, at_step=7)
    _rates_from(controller, managed, range(adjusted_at))
    controller.adjust(change("host", factor=0.5, expires_after_steps=expires), at_step=adjusted_at)
    controller.adjust(change("seed:a", value=0.02, expires_after_steps=expires), at_step=adjusted_at)
    resume_at = max(resume_at, adjusted_at)
    _rates_from(controller, managed, range(adjusted_at, resume_at))
    saved = json.loads(json.dumps(controller.state_dict()))
    rest = _rates_from(controller, managed, range(resume_at, 80))

    other = sgd(lr=0.9)
    resumed = controller_of(other, **schedule)
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
    """It raises ControllerStateError, and the controller is unchanged."""
    controller = controller_of(sgd(), **FLAT)
    before = controller.state_dict()
    with pytest.raises(ControllerStateError):
        controller.load_state_dict(before | damage)
    assert controller.state_dict() == before


def managed_pair(min_interval_steps: int = 0) -> tuple[OptimizerManager, UnifiedLRController]:
    """A manager of one host group and its controller, with the rates of the first step applied."""
    weight = nn.Parameter(torch.ones(2))
    manager = OptimizerManager(Adam([weight], lr=0.1), [("weight", weight)], min_interval_steps=min_interval_steps)
    controller = controller_of(manager, seed_warmup_floor=0.5)
    controller.apply(0)
    return manager, controller


def seed(name: str = "seed:a", size: int = 2) -> GroupPlan:
    """A seed's group."""
    return GroupPlan(name, {f"{name}.weight": nn.Parameter(torch.ones(size))}, GroupRole.SEED)


def live_rates(manager: OptimizerManager) -> dict[str, float]:
    """The rates in the present optimizer."""
    return {group["name"]: group["lr"] for group in manager.optimizer.param_groups}


def test_a_seed_group_is_added_frozen_and_removed() -> None:
    """Group and rate change together: a warm-up from that step, 0 when frozen, unregistered when removed."""
    manager, controller = managed_pair()
    regroup(manager, controller, [*manager.plan(), seed()], at_step=10)
    assert live_rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.005})
    assert controller.before_step(14) == []
    assert live_rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.01})
    host, grown = manager.plan()
    assert grown.role is GroupRole.SEED
    regroup(manager, controller, [host, replace(grown, role=GroupRole.FROZEN)], at_step=20)
    assert live_rates(manager) == {"host": 0.1, "seed:a": 0.0}
    regroup(manager, controller, [host], at_step=30)
    assert live_rates(manager) == {"host": 0.1}
    assert list(controller.groups) == ["host"]


@pytest.mark.parametrize("interval", [0, 100], ids=["failing", "skipped"])
def test_a_failed_or_skipped_rebuild_changes_no_rate(interval: int) -> None:
    """Groups, rates and their verification are as before, and a retry succeeds."""
    manager, controller = managed_pair(interval)
    regroup(manager, controller, [*manager.plan(), seed()], at_step=0)
    before, old = controller.state_dict(), manager.optimizer
    host, grown = manager.plan()
    wanted = [host, replace(grown, role=GroupRole.FROZEN), seed("seed:b")]
    if interval:
        assert regroup(manager, controller, wanted, at_step=9).outcome is RebuildOutcome.SKIPPED
    else:
        with pytest.raises(RebuildFailedError):
            regroup(manager, controller, [*wanted, seed("seed:b")], at_step=9)
    assert manager.optimizer is old
    assert controller.state_dict() == before
    assert live_rates(manager) == pytest.approx({"host": 0.1, "seed:a": 0.005}, rel=1e-12)
    old.param_groups[0]["lr"] = 0.3
    assert [violation.group for violation in controller.verify()] == ["host"]
    assert regroup(manager, controller, wanted, at_step=100).fresh == ("seed:b.weight",)


def test_restored_groups_keep_their_warmup() -> None:
    """After a restore of the controller's state, regrouping to the same groups does not restart warm-ups."""
    manager, controller = managed_pair()
    regroup(manager, controller, [*manager.plan(), seed()], at_step=10)
    saved = controller.state_dict()
    with_seed = manager.plan()
    regroup(manager, controller, with_seed[:1], at_step=20)
    controller.load_state_dict(saved)
    regroup(manager, controller, with_seed, at_step=12, urgent=True)
    assert controller.groups["seed:a"].registered_at == 10
    assert live_rates(manager)["seed:a"] == pytest.approx(0.01 * 0.75)
