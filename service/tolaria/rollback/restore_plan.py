"""What exactly a restore will do: which live tensor takes which bytes, what the optimizer's state and options become.

Owns the comparison of names, shapes and dtypes, and the allocation of what the live side lacks. Planning changes
nothing live; applying is one grouped copy and a few assignments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tolaria.errors import StateMismatchError
from tolaria.rollback.digest import TensorSpec, spec_of
from tolaria.rollback.encoding import TENSOR_KEY, decode
from tolaria.rollback.rng import restore_rngs
from tolaria.rollback.state import StateImage, Survey, TrainingState, parameter_names, whole
from tolaria.values.training import Position

if TYPE_CHECKING:
    from pydantic import JsonValue

_MODEL = ("parameter/", "buffer/")


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """All that changes: `sources[i]` is copied into `targets[i]`; the optimizer's dicts get live tensors."""

    state: TrainingState
    image: StateImage
    targets: list[Tensor]
    sources: list[Tensor]
    optimizer_state: dict[Tensor, dict[str, object]]
    group_options: list[dict[str, object]]
    position: Position
    rng_values: Mapping[str, JsonValue]

    def apply(self) -> None:
        """Change the live state. Synchronises with the devices involved."""
        optimizer = self.state.live.optimizer
        with torch.no_grad():
            if self.targets:
                torch._foreach_copy_(self.targets, self.sources)
        for parameter in [p for p in optimizer.state if p not in self.optimizer_state]:
            del optimizer.state[parameter]
        for parameter, entries in self.optimizer_state.items():
            live = optimizer.state[parameter]
            live.clear()
            live.update(entries)
        for group, options in zip(optimizer.param_groups, self.group_options, strict=True):
            for key in [k for k in group if k != "params" and k not in options]:
                del group[key]
            group.update(options)
        self.state.live.position = self.position
        restore_rngs(self.image.tensors, self.rng_values)


def plan_restore(state: TrainingState, image: StateImage, values: Mapping[str, JsonValue]) -> RestorePlan:
    """Compare the live state with the image and prepare everything that `apply` needs.

    Args:
        state: the live state, its topology being the image's already.
        image: the tensors to come.
        values: the image's `values`, parsed.

    Raises:
        StateMismatchError: naming what differs.
    """
    survey = state.survey()
    wanted = cast("dict[str, Any]", values["optimizer"])
    problems = _model_problems(survey, image) + _optimizer_problems(survey, wanted)
    if problems:
        raise StateMismatchError(problems)
    planner = _Planner(state, survey, image)
    for name in survey.tensors:
        if name.startswith(_MODEL):
            planner.fill(name, survey.tensors[name])
    optimizer_state, group_options = planner.optimizer(wanted)
    position = cast("dict[str, int]", values["position"])
    return RestorePlan(
        state=state,
        image=image,
        targets=planner.targets,
        sources=planner.sources,
        optimizer_state=optimizer_state,
        group_options=group_options,
        position=Position(position["global_step"], position["epoch"]),
        rng_values=cast("Mapping[str, JsonValue]", values["rng"]),
    )


def _model_problems(survey: Survey, image: StateImage) -> list[str]:
    live = {name for name in survey.tensors if name.startswith(_MODEL)}
    kept = {name for name in image.tensors if name.startswith(_MODEL)}
    problems = [f"{name}: in the image only" for name in sorted(kept - live)]
    problems += [f"{name}: live only" for name in sorted(live - kept)]
    for name in sorted(live & kept):
        ours, theirs = spec_of(name, survey.tensors[name]), spec_of(name, image.tensors[name])
        if ours != theirs:
            problems.append(f"{name}: live {ours.dtype}{list(ours.shape)}, image {theirs.dtype}{list(theirs.shape)}")
    return problems


def _optimizer_problems(survey: Survey, wanted: Mapping[str, Any]) -> list[str]:
    live = cast("dict[str, Any]", survey.values["optimizer"])
    if live["kind"] != wanted["kind"]:
        return [f"optimizer: live {live['kind']}, image {wanted['kind']}"]
    ours = [group["parameters"] for group in live["groups"]]
    theirs = [group["parameters"] for group in wanted["groups"]]
    if len(ours) != len(theirs):
        return [f"optimizer: {len(ours)} groups live, {len(theirs)} in the image"]
    return [f"optimizer: group {i} has other parameters" for i, a in enumerate(ours) if a != theirs[i]]


class _Planner:
    """Pairs live tensors with the image's, and makes those that the live side lacks."""

    def __init__(self, state: TrainingState, survey: Survey, image: StateImage) -> None:
        self._live = state.live
        self._survey = survey
        self._image = image
        self._parameters = {name: parameter for parameter, name in parameter_names(state.live).items()}
        self._taken: set[int] = set()
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def fill(self, name: str, target: Tensor) -> Tensor:
        """Plan to copy the image's `name` into `target`."""
        self._taken.add(id(target))
        self.targets.append(target.detach())
        self.sources.append(self._image.tensors[name])
        return target

    def optimizer(self, wanted: Mapping[str, Any]) -> tuple[dict[Tensor, dict[str, object]], list[dict[str, object]]]:
        """The optimizer's state by parameter, and the options of each group, made of live or new tensors."""
        cpu = torch.device("cpu")
        all_options: list[dict[str, object]] = []
        follows: set[str] = set()
        for group in wanted["groups"]:
            options = cast("dict[str, object]", decode(group["options"], lambda ref: self._take(ref, cpu)))
            all_options.append(options)
            if options.get("capturable") or options.get("fused"):
                follows.update(group["parameters"])
        state = {
            self._parameters[name]: self._entries(entries, self._parameters[name].device, everything=name in follows)
            for name, entries in wanted["state"].items()
        }
        return state, all_options

    def _entries(self, entries: JsonValue, device: torch.device, *, everything: bool) -> dict[str, object]:
        """One parameter's state; step counts stay on the CPU unless `everything` goes to the parameter's device."""

        def take(ref: Mapping[str, JsonValue]) -> Tensor:
            return self._take(ref, device if everything or ref["home"] == "parameter" else torch.device("cpu"))

        return cast("dict[str, object]", decode(entries, take))

    def _take(self, ref: Mapping[str, JsonValue], device: torch.device) -> Tensor:
        """The live tensor of that name if it can hold the image's, else a new one; each live tensor serves once."""
        name = cast("str", ref[TENSOR_KEY])
        source = self._image.tensors[name]
        live = self._survey.tensors.get(name)
        if live is None or not self._can_hold(live, spec_of(name, source)):
            live = torch.empty(source.shape, dtype=source.dtype, device=device)
        return self.fill(name, live)

    def _can_hold(self, live: Tensor, wanted: TensorSpec) -> bool:
        return spec_of(wanted.name, live) == wanted and id(live) not in self._taken and whole(live) is live
