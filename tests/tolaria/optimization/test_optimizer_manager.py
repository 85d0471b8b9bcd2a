from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import StepLR

from tolaria.errors import RebuildFailedError, UnsuitableOptimizerError
from tolaria.optimization import GroupPlan, OptimizerManager
from tolaria.values.optimization import RebuildOutcome

torch.set_num_threads(1)

DENSE = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, Optimizer) and kind not in {Optimizer, SparseAdam, LBFGS}
]
VARIANTS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *[(kind, {}) for kind in DENSE],
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.9, "fused": True}),
    (RMSprop, {"momentum": 0.9, "centered": True}),
    (Adam, {"amsgrad": True, "foreach": True}),
    (Adam, {"fused": True}),
    (AdamW, {"fused": True}),
    (Adagrad, {"fused": True}),
    (Adam, {"lr": torch.tensor(0.01)}),
    (NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
]


@dataclass
class Training:
    """Three matrices, two in `host` and one in `seed:a`, and their optimizer after some steps."""

    parameters: dict[str, nn.Parameter]
    manager: OptimizerManager
    draws: torch.Generator

    @property
    def optimizer(self) -> Optimizer:
        return self.manager.optimizer

    def step(self) -> None:
        """Makes one step with random gradients."""
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=self.draws)
        self.optimizer.step()


def training(kind: type[Optimizer] = Adam, steps: int = 5, **options: Any) -> Training:
    """Returns the same training for the same arguments, bit for bit."""
    draws = torch.Generator().manual_seed(7)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=draws))
        for name, shape in (("a", (3, 4)), ("b", (4, 2)), ("s", (2, 2)))
    }
    groups: list[dict[str, Any]] = [
        {"name": "host", "params": [parameters["a"], parameters["b"]]},
        {"name": "seed:a", "params": [parameters["s"]], "weight_decay": 0.02},
    ]
    optimizer = kind(groups, **({"lr": 0.01} | options))
    made = Training(parameters, OptimizerManager(optimizer, parameters.items(), min_interval_steps=0), draws)
    for _ in range(steps):
        made.step()
    return made


def matrix(*shape: int) -> nn.Parameter:
    """A new parameter."""
    return nn.Parameter(torch.ones(shape))


def everything(made: Training) -> dict[str, Any]:
    """Parameters, options and state, cloned and by name."""
    names: dict[Tensor, str] = {tensor: name for name, tensor in made.parameters.items()}
    return {
        "parameters": {name: tensor.detach().clone() for name, tensor in made.parameters.items()},
        "groups": [
            {key: [names[p] for p in value] if key == "params" else value for key, value in group.items()}
            for group in made.optimizer.param_groups
        ],
        "state": {names[tensor]: cloned(state) for tensor, state in made.optimizer.state.items()},
    }


def cloned(value: Any) -> Any:
    """A deep copy of state."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: cloned(item) for key, item in value.items()}
    return [cloned(item) for item in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Whether they are equal bit by bit, in dtype and in structure."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def variant_name(value: object) -> str:
    """The name of a variant in test ids."""
    return value.__name__ if isinstance(value, type) else " ".join(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=variant_name)
def test_kept_parameters_continue_exactly(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """With a group added and one removed, states, options and the next steps are bit-equal."""
    rebuilt, untouched = training(kind, **options), training(kind, **options)
    before = everything(rebuilt)
    assert before["state"] or (kind, options) == (SGD, {}), "there is no state to lose"
    host, _ = rebuilt.manager.plan()
    new = matrix(2, 5)
    result = rebuilt.manager.rebuild([host, GroupPlan("seed:b", {"new": new})], at_step=5)
    assert (result.outcome, result.kept, result.fresh, result.dropped) == (
        RebuildOutcome.REBUILT,
        ("a", "b"),
        ("new",),
        ("s",),
    )
    del rebuilt.parameters["s"]
    rebuilt.parameters["new"] = new
    after = everything(rebuilt)
    assert same(after["groups"][0], before["groups"][0])
    for name in ("a", "b"):
        assert same(after["state"].get(name), before["state"].get(name))
    assert all(not value.any() for value in after["state"].get("new", {}).values()), "a new parameter starts clean"
    for _ in range(3):
        gradients = {name: torch.randn(p.shape, generator=rebuilt.draws) for name, p in untouched.parameters.items()}
        for made in (rebuilt, untouched):
            for name, parameter in made.parameters.items():
                parameter.grad = gradients[name].clone() if name in gradients else torch.ones_like(parameter)
            made.optimizer.step()
        assert all(torch.equal(rebuilt.parameters[name], untouched.parameters[name]) for name in ("a", "b"))
    assert not torch.equal(new, torch.ones(2, 5))


@pytest.mark.skip(reason="SparseAdam takes sparse gradients only; Tolaria merges dense ones")
def test_sparse_adam() -> None:
    """Skipped on purpose."""


def test_every_class_of_torch_is_covered() -> None:
    """The list is read from torch, so that new classes are tested as well."""
    assert {kind.__name__ for kind in DENSE} >= {"Adadelta", "Adafactor", "Adam", "Muon", "NAdam", "Rprop", "SGD"}
    assert len(DENSE) >= 13


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=variant_name)
def test_every_class_supports_parameters_that_change_shape(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """A parameter that grew and one that shrank continue to train with finite numbers."""
    made = training(kind, **options)
    _, seed = made.manager.plan()
    grown, cut = matrix(5, 4), matrix(4, 1)
    with torch.no_grad():
        grown[:3] = made.parameters["a"]
        cut.copy_(made.parameters["b"][:, :1])
    result = made.manager.rebuild([GroupPlan("host", {"a": grown, "b": cut}), seed], at_step=5)
    assert set(result.transformed + result.kept) == {"a", "b", "s"}
    assert "s" in result.kept
    made.parameters.update(a=grown, b=cut)
    made.step()
    assert all(bool(parameter.isfinite().all()) for parameter in made.parameters.values())


def test_muon_refuses_a_vector() -> None:
    """Muon trains matrices only; the rebuild fails at the build stage."""
    made = training(Muon)
    with pytest.raises(RebuildFailedError, match="2D") as caught:
        made.manager.rebuild([*made.manager.plan(), GroupPlan("seed:b", {"new": matrix(2)})], at_step=5)
    assert caught.value.stage == "build"


def fail(*arguments: object, **keywords: object) -> Any:
    """Raises RuntimeError."""
    raise RuntimeError("injected")


def _bad_plan(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    return [*made.manager.plan(), GroupPlan("host", {"new": matrix(2, 2)})]


def _bad_build(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    monkeypatch.setattr(Adam, "add_param_group", fail)
    host, _ = made.manager.plan()
    return [GroupPlan("host", {"b": host.parameters["b"]}), GroupPlan("seed:b", {"new": matrix(2, 2)})]


def _bad_carry(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    made.optimizer.state[made.parameters["a"]]["odd"] = torch.ones(9, 9)
    return [GroupPlan("host", {"a": matrix(5, 5), "b": made.parameters["b"]}), made.manager.plan()[1]]


def _bad_state(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    made.optimizer.state[made.parameters["b"]]["exp_avg"][0, 0] = float("nan")
    return made.manager.plan()


class Refusing(defaultdict[Any, Any]):
    """State in which no entry can be set."""

    __setitem__ = fail


def _bad_swap(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    made.optimizer.state = Refusing(dict, made.optimizer.state)
    return [GroupPlan("host", {"b": made.parameters["b"], "new": matrix(2, 2)})]


@pytest.mark.parametrize(
    ("stage", "prepare"),
    [
        ("plan", _bad_plan),
        ("build", _bad_build),
        ("carry", _bad_carry),
        ("validate", _bad_state),
        ("swap", _bad_swap),
    ],
)
def test_a_failed_rebuild_changes_nothing(
    stage: str,
    prepare: Callable[[Training, pytest.MonkeyPatch], list[GroupPlan]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any stage, the optimizer, its parameters, options and state are bit-equal afterwards."""
    made = training()
    groups = prepare(made, monkeypatch)
    old, before, plan = made.optimizer, everything(made), made.manager.plan()
    with pytest.raises(RebuildFailedError) as caught:
        made.manager.rebuild(groups, at_step=5)
    assert caught.value.stage == stage
    assert made.optimizer is old
    after = everything(made)
    nan_safe = [{**view, "state": repr(view["state"])} for view in (before, after)]
    assert same(*nan_safe)
    assert [group.name for group in made.manager.plan()] == [group.name for group in plan]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no group at all"),
        ([GroupPlan("host", {})], "'host' without parameters"),
        ([GroupPlan("host", {"a": matrix(1)}), GroupPlan("host", {"b": matrix(1)})], "'host' twice"),
        ([GroupPlan("host", {"a": matrix(1)}), GroupPlan("seed:a", {"a": matrix(1)})], "in two places"),
    ],
)
def test_an_invalid_plan_is_refused(groups: list[GroupPlan], message: str) -> None:
    """The error names the problem."""
    with pytest.raises(RebuildFailedError, match=message):
        training(steps=0).manager.rebuild(groups, at_step=0)


def test_rebuilds_keep_a_minimum_interval() -> None:
    """Within the interval a rebuild is skipped and the result says when to retry; urgent and earlier ones run."""
    made = training()
    manager = OptimizerManager(made.optimizer, made.parameters.items(), min_interval_steps=10)
    first = manager.rebuild(manager.plan(), at_step=100)
    skipped = manager.rebuild(manager.plan(), at_step=109)
    assert (first.outcome, skipped.outcome, skipped.retry_at_step) == (
        RebuildOutcome.REBUILT,
        RebuildOutcome.SKIPPED,
        110,
    )
    assert manager.rebuild(manager.plan(), at_step=109, urgent=True).outcome is RebuildOutcome.REBUILT
    assert manager.rebuild(manager.plan(), at_step=119).outcome is RebuildOutcome.REBUILT
    assert manager.rebuild(manager.plan(), at_step=50).outcome is RebuildOutcome.REBUILT


def test_failed_attempts_count_for_the_interval() -> None:
    """A rebuild that fails is not tried at every step."""
    made = training()
    manager = OptimizerManager(made.optimizer, made.parameters.items(), min_interval_steps=10)
    with pytest.raises(RebuildFailedError):
        manager.rebuild([], at_step=100)
    assert manager.rebuild([], at_step=101).outcome is RebuildOutcome.SKIPPED


class Scaled(Adam):
    """An optimizer with arguments that are not among its defaults."""

    def __init__(self, params: Any, scale: float, *, floor: float, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)
        self.scale, self.floor = scale, floor


def test_the_optimizer_stays_the_same_object() -> None:
    """With its class, attributes and groups, so that a scheduler that holds it sets the rates of the one in use."""
    parameters = {"a": matrix(2, 3), "b": matrix(3)}
    optimizer = Scaled(parameters.values(), 0.01, floor=2.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    manager = OptimizerManager(optimizer, parameters.items(), min_interval_steps=0)
    groups, host, held = optimizer.param_groups, optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    new = matrix(2)
    result = manager.rebuild([*manager.plan(), GroupPlan("seed:a", {"new": new})], at_step=3)
    assert (result.kept, result.fresh) == (("a", "b"), ("new",))
    assert manager.optimizer is optimizer
    assert (optimizer.scale, optimizer.floor) == (0.01, 2.0)
    assert optimizer.param_groups is groups
    assert groups[0] is host
    assert host["params"] is held
    for parameter in (*parameters.values(), new):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    assert groups[0]["lr"] == 0.005
    manager.rebuild([GroupPlan("host", {"b": parameters["b"]})], at_step=4)
    assert [id(p) for p in held] == [id(parameters["b"])]
    assert set(optimizer.state) == {parameters["b"]}


def test_a_new_parameter_with_gaps_in_memory_has_no_fused_kernel() -> None:
    """Its moments have another layout, and the kernel walks memory in order; the other groups keep it."""
    parameters = {"a": matrix(2, 3)}
    manager = OptimizerManager(Adam(parameters.values(), fused=True), parameters.items(), min_interval_steps=0)
    gaps = nn.Parameter(torch.ones(4, 4)[:, ::2])
    manager.rebuild([*manager.plan(), GroupPlan("seed:a", {"new": gaps})], at_step=0)
    assert [group["fused"] for group in manager.optimizer.param_groups] == [True, False]


def test_step_hooks_stay_registered() -> None:
    """A hook runs after a rebuild until it is removed by its handle."""
    made, seen = training(), []
    handle = made.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    made.manager.rebuild(made.manager.plan(), at_step=5)
    made.step()
    handle.remove()
    made.step()
    assert seen == [1]


def test_a_parameter_resized_in_place_is_detected() -> None:
    """The form at the last rebuild is compared with the present one."""
    made = training(SGD, momentum=0.9)
    made.parameters["b"].data = torch.ones(6, 2)
    assert made.manager.rebuild(made.manager.plan(), at_step=5).transformed == ("b",)
    made.step()


def test_a_parameter_with_another_number_of_dimensions_restarts() -> None:
    """Its state cannot be fitted."""
    made = training()
    _, seed = made.manager.plan()
    result = made.manager.rebuild([GroupPlan("host", {"a": matrix(12)}), seed], at_step=5)
    assert (result.restarted, result.kept, result.dropped) == (("a",), ("s",), ("b",))


def test_the_optimizers_own_parameter_names_are_kept() -> None:
    """An optimizer over named parameters has the names after a rebuild too."""
    parameters = {"a": matrix(2), "b": matrix(3)}
    manager = OptimizerManager(Adam(parameters.items()), parameters.items(), min_interval_steps=0)
    manager.rebuild([GroupPlan("host", {"b": parameters["b"]})], at_step=0)
    assert manager.optimizer.param_groups[0]["param_names"] == ["b"]


def test_a_parameter_outside_the_model_is_refused() -> None:
    """State is transferred by name, so every parameter needs one."""
    with pytest.raises(UnsuitableOptimizerError, match="parameter 1 of group 'host' is not the model's"):
        OptimizerManager(SGD([a := matrix(1), matrix(1)]), [("a", a)], min_interval_steps=0)


def test_large_finite_state_is_accepted() -> None:
    """An overflow of the sum is not reported as a non-finite number."""
    made = training()
    made.optimizer.state[made.parameters["a"]]["exp_avg_sq"].fill_(3e38)
    assert made.manager.rebuild(made.manager.plan(), at_step=5).outcome is RebuildOutcome.REBUILT
