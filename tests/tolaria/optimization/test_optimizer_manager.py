from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from tolaria.errors import RebuildFailedError, UnsuitableOptimizerError
from tolaria.optimization import GroupPlan, OptimizerManager
from tolaria.optimization.groups import ParamGroup
from tolaria.optimization.state_transfer import Build
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
    return made.manager.plan()


def _bad_carry(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    made.optimizer.state[made.parameters["a"]]["odd"] = torch.ones(9, 9)
    return [GroupPlan("host", {"a": matrix(5, 5), "b": made.parameters["b"]}), made.manager.plan()[1]]


def _bad_state(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    made.optimizer.state[made.parameters["b"]]["exp_avg"][0, 0] = float("nan")
    return made.manager.plan()


class Refusing(dict[Any, Any]):
    """State that cannot be updated."""

    update = fail


def _refusing(groups: list[ParamGroup]) -> Optimizer:
    built = Adam(groups, lr=0.01)
    if len(groups) > 1:  # a trial step has a single group
        built.state = Refusing()  # type: ignore[assignment]
    return built


def _present_plan(made: Training, monkeypatch: pytest.MonkeyPatch) -> list[GroupPlan]:
    return made.manager.plan()


@pytest.mark.parametrize(
    ("stage", "prepare", "change_to"),
    [
        ("plan", _bad_plan, None),
        ("build", _bad_build, None),
        ("carry", _bad_carry, None),
        ("validate", _bad_state, None),
        ("swap", _present_plan, _refusing),
    ],
)
def test_a_failed_rebuild_changes_nothing(
    stage: str,
    prepare: Callable[[Training, pytest.MonkeyPatch], list[GroupPlan]],
    change_to: Build | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At any stage, the optimizer, its parameters, options and state are bit-equal afterwards."""
    made = training()
    groups = prepare(made, monkeypatch)
    old, before, plan = made.optimizer, everything(made), made.manager.plan()
    with pytest.raises(RebuildFailedError) as caught:
        made.manager.rebuild(groups, at_step=5, change_to=change_to)
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


def test_a_builder_that_drops_parameters_is_refused() -> None:
    """The new optimizer is compared with the plan before it is used."""
    made = training()
    with pytest.raises(RebuildFailedError) as caught:
        made.manager.rebuild(
            made.manager.plan(),
            at_step=5,
            change_to=lambda groups: Adam([{**groups[0], "params": groups[0]["params"][:1]}]),
        )
    assert caught.value.stage == "validate"


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


def test_options_can_change_while_state_is_kept() -> None:
    """Options that the state does not depend on keep it; new groups take the optimizer's defaults."""
    made = training(Adam, weight_decay=0.3)
    before = everything(made)["state"]
    host, seed = made.manager.plan()
    host = GroupPlan(host.name, host.parameters, options={"weight_decay": 0.5, "betas": (0.8, 0.99)})
    new = matrix(2, 2)
    result = made.manager.rebuild([host, seed, GroupPlan("seed:b", {"new": new})], at_step=5)
    made.parameters["new"] = new
    assert result.kept == ("a", "b", "s")
    assert same(everything(made)["state"], before)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.5, 0.02, 0.3]
    assert made.optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_an_option_that_needs_other_state_restarts() -> None:
    """AMSGrad needs a maximum that does not exist: the parameters of the group restart, others keep their state."""
    made = training(Adam)
    host, seed = made.manager.plan()
    result = made.manager.rebuild([GroupPlan(host.name, host.parameters, options={"amsgrad": True}), seed], at_step=5)
    assert (result.restarted, result.kept) == (("a", "b"), ("s",))
    made.step()


@pytest.mark.parametrize(
    ("to", "restarted"), [(AdamW, ()), (RAdam, ()), (SGD, ("a", "b", "s")), (Adafactor, ("a", "b", "s"))]
)
def test_the_class_can_change(to: type[Optimizer], restarted: tuple[str, ...]) -> None:
    """State is kept if the new class has the same entries, else parameters restart; later rebuilds keep the class."""
    made = training(Adam)

    def build(groups: list[ParamGroup]) -> Optimizer:
        return to(groups, weight_decay=0.25)  # type: ignore[call-arg]

    result = made.manager.rebuild(made.manager.plan(), at_step=5, change_to=build)
    assert type(made.optimizer) is to
    assert result.restarted == restarted
    assert [(g["lr"], g["weight_decay"]) for g in made.optimizer.param_groups] == [(0.01, 0.25), (0.01, 0.25)]
    made.step()
    made.manager.rebuild(made.manager.plan(), at_step=6)
    assert type(made.optimizer) is to
    made.step()


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
