"""Restores an image into the live training state: checks first, then one grouped copy into the live tensors.

`Optimizer.load_state_dict` is not used: it adopts the given tensors, so that further training would change the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from tolaria.errors import RestoreAbandonedError, StateMismatchError
from tolaria.images.image import StateImage
from tolaria.images.specs import TensorSpec
from tolaria.state.encoding import (
    DTYPES,
    TENSOR_KEY,
    capture_rngs,
    decode,
    decode_plain,
    encode_plain,
    restore_rngs,
    spec_of,
    tensor_view,
)
from tolaria.state.training_state import StatePart, Survey, TrainingState, parameter_names, whole

if TYPE_CHECKING:
    from pydantic import JsonValue

_REFUSALS: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a part, such as a job's own cursor, may raise for a state that it cannot load."""

_MODEL: Final = ("parameter/", "buffer/")


def stage_restore(state: TrainingState, image: StateImage, *, verify: bool) -> StagedRestore:
    """Checks everything that can be checked without changing the live state.

    Args:
        state: the live state.
        image: the state to restore. A snapshot must stay leased until the restore is done.
        verify: hash the image again and compare with its fingerprint. Not needed for one just loaded from disk.

    Raises:
        ImageDamagedError: the image has changed since it was captured.
        StateMismatchError: the image does not fit. If the topology differs, `commit` raises this instead.
    """
    if verify:
        image.verify()
    values = cast("dict[str, JsonValue]", json.loads(image.values))
    _check_parts(state, values)
    staged = StagedRestore(state, image, values)
    if not staged.changes_topology:
        _check_tensors(state.survey(), image, values)
    return staged


class StagedRestore:
    """A checked restore, made by `stage_restore`. `commit` may be called once, at a step boundary."""

    def __init__(self, state: TrainingState, image: StateImage, values: Mapping[str, JsonValue]) -> None:
        self._state = state
        self._image = image
        self._values = values
        topology = state.topology
        self.changes_topology = (
            topology is not None and encode_plain(topology.state_dict(), "topology") != values["topology"]
        )

    def commit(self, expired: Callable[[], bool] | None = None) -> None:
        """Restores topology, parts, tensors and generators, in this order. After an error everything is as before.

        A changed topology first copies the live state, to undo the change. To prove the result, compare
        `state.fingerprint().total` with `image.seal().total`.

        Args:
            expired: called last, right before tensors change; True abandons the restore.

        Raises:
            StateMismatchError: the image does not fit the live state, or not the topology that it names.
            RestoreAbandonedError: `expired` returned True.
            TolariaError: the topology raised it while loading.
            RuntimeError: a part loads neither the image's state nor its own previous one: the live state is undefined.
        """
        with ExitStack() as undo:
            undo.callback(restore_rngs, *capture_rngs())
            if self.changes_topology:
                self._change_topology(undo)
            plan = _plan(self._state, self._image, self._values)
            _load_parts(self._state.parts, cast("Mapping[str, JsonValue]", self._values["parts"]), undo)
            if expired is not None and expired():
                raise RestoreAbandonedError("about to copy")
            plan.apply()
            undo.pop_all()

    def _change_topology(self, undo: ExitStack) -> None:
        topology = self._state.topology
        if topology is None:
            return
        undo.callback(_undo_topology, self._state, self._state.copy())
        topology.load_state_dict(_part_state(self._values["topology"]))


def _check_parts(state: TrainingState, values: Mapping[str, JsonValue]) -> None:
    problems = _name_problems(
        {f"parts/{name}" for name in state.parts},
        {f"parts/{name}" for name in cast("dict[str, JsonValue]", values["parts"])},
    )
    if (values["topology"] is None) != (state.topology is None):
        problems.append("topology: in one of the two only")
    if problems:
        raise StateMismatchError(problems)


def _load_parts(parts: Mapping[str, StatePart], wanted: Mapping[str, JsonValue], undo: ExitStack) -> None:
    for name, part in parts.items():
        undo.callback(_put_back, name, part, encode_plain(part.state_dict(), f"parts/{name}"))
        try:
            part.load_state_dict(_part_state(wanted[name]))
        except _REFUSALS as error:
            raise StateMismatchError([f"parts/{name}: {type(error).__name__}: {error}"]) from error


def _put_back(name: str, part: StatePart, before: JsonValue) -> None:
    try:
        part.load_state_dict(_part_state(before))
    except _REFUSALS as error:  # not a StateMismatchError, which would mean that nothing has changed
        raise RuntimeError(f"parts/{name} refuses the state that it had itself: {error}") from error


def _part_state(state: JsonValue) -> dict[str, JsonValue]:
    return cast("dict[str, JsonValue]", decode_plain(state))


def _undo_topology(state: TrainingState, before: StateImage) -> None:
    values = cast("dict[str, JsonValue]", json.loads(before.values))
    if state.topology is not None:
        state.topology.load_state_dict(_part_state(values["topology"]))
    _plan(state, before, values).apply()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that changes: `sources[i]` is copied into `targets[i]`, and the optimizer's dicts get live tensors."""

    state: TrainingState
    image: StateImage
    targets: list[Tensor]
    sources: list[Tensor]
    optimizer_state: dict[Tensor, dict[str, object]]
    group_options: list[dict[str, object]]
    rng_tensors: dict[str, Tensor]
    rng_values: Mapping[str, JsonValue]

    def apply(self) -> None:
        """Changes the live state. Synchronises with the devices involved."""
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
        self.state.live.position = self.image.position
        restore_rngs(self.rng_tensors, self.rng_values)


def _plan(state: TrainingState, image: StateImage, values: Mapping[str, JsonValue]) -> _Plan:
    """Compares the live state, with the image's topology, with the image and prepares everything for `apply`.

    Raises:
        StateMismatchError: names the differences.
    """
    survey = state.survey()
    _check_tensors(survey, image, values)
    planner = _Planner(state, survey, image)
    for name, tensor in survey.tensors.items():
        if name.startswith(_MODEL):
            planner.fill(name, tensor)
    optimizer_state, group_options = planner.optimizer(cast("dict[str, Any]", values["optimizer"]))
    return _Plan(
        state=state,
        image=image,
        targets=planner.targets,
        sources=planner.sources,
        optimizer_state=optimizer_state,
        group_options=group_options,
        rng_tensors={spec.name: planner.source(spec.name) for spec in image.specs if spec.name.startswith("rng/")},
        rng_values=cast("Mapping[str, JsonValue]", values["rng"]),
    )


def _check_tensors(survey: Survey, image: StateImage, values: Mapping[str, JsonValue]) -> None:
    problems = _model_problems(survey, image)
    problems += _optimizer_problems(survey, cast("dict[str, Any]", values["optimizer"]))
    if problems:
        raise StateMismatchError(problems)


def _name_problems(live: set[str], kept: set[str]) -> list[str]:
    return [f"{name}: in the image only" for name in sorted(kept - live)] + [
        f"{name}: live only" for name in sorted(live - kept)
    ]


def _model_problems(survey: Survey, image: StateImage) -> list[str]:
    live = {name for name in survey.tensors if name.startswith(_MODEL)}
    kept = {spec.name: spec for spec in image.specs if spec.name.startswith(_MODEL)}
    problems = _name_problems(live, set(kept))
    for name in sorted(live & set(kept)):
        ours, theirs = spec_of(name, survey.tensors[name]), kept[name]
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
    """Pairs live tensors with the image's, and allocates those that the live side lacks."""

    def __init__(self, state: TrainingState, survey: Survey, image: StateImage) -> None:
        self._survey = survey
        self._image = image
        self._specs = {spec.name: spec for spec in image.specs}
        self._parameters = {name: parameter for parameter, name in parameter_names(state.live).items()}
        self._taken: set[int] = set()
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def source(self, name: str) -> Tensor:
        """Returns a view of the image's tensor."""
        return tensor_view(self._specs[name], self._image.buffers[name])

    def fill(self, name: str, target: Tensor) -> Tensor:
        """Plans to copy the image's `name` into `target`, and returns `target`."""
        self._taken.add(id(target))
        self.targets.append(target.detach())
        self.sources.append(self.source(name))
        return target

    def optimizer(self, wanted: Mapping[str, Any]) -> tuple[dict[Tensor, dict[str, object]], list[dict[str, object]]]:
        """Returns the optimizer's state by parameter and each group's options, made of live or new tensors."""
        cpu = torch.device("cpu")
        all_options: list[dict[str, object]] = []
        on_device: set[str] = set()
        for group in wanted["groups"]:
            options = cast("dict[str, object]", decode(group["options"], lambda ref: self._take(ref, cpu)))
            all_options.append(options)
            if options.get("capturable") or options.get("fused"):
                on_device.update(group["parameters"])
        state = {
            self._parameters[name]: self._entries(
                entries, self._parameters[name].device, everything_on_device=name in on_device
            )
            for name, entries in wanted["state"].items()
        }
        return state, all_options

    def _entries(self, entries: JsonValue, device: torch.device, *, everything_on_device: bool) -> dict[str, object]:
        """Returns a parameter's state. Step counts stay on the CPU unless `everything_on_device`."""

        def take(ref: Mapping[str, JsonValue]) -> Tensor:
            beside = everything_on_device or ref["home"] == "parameter"
            return self._take(ref, device if beside else torch.device("cpu"))

        return cast("dict[str, object]", decode(entries, take))

    def _take(self, ref: Mapping[str, JsonValue], device: torch.device) -> Tensor:
        """Plans a copy into the live tensor of that name if it fits and is not used yet, else into a new one."""
        name = cast("str", ref[TENSOR_KEY])
        spec = self._specs[name]
        live = self._survey.tensors.get(name)
        if live is None or not self._can_hold(live, spec):
            live = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)
        return self.fill(name, live)

    def _can_hold(self, live: Tensor, wanted: TensorSpec) -> bool:
        return spec_of(wanted.name, live) == wanted and id(live) not in self._taken and whole(live) is live
