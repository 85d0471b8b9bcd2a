"""Restores an image into the live training state: checks first, then one grouped copy into the live tensors.

`Optimizer.load_state_dict` is not used: it adopts the given tensors, so that further training would change the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from tolaria.errors import RestoreAbandonedError, StateMismatchError
from tolaria.images import StateImage, TensorSpec
from tolaria.shards import is_sharded, local, part_of, sharded_like
from tolaria.state.encoding import (
    TENSOR_KEY,
    KeptValues,
    capture_rngs,
    decode,
    decode_plain,
    encode_plain,
    restore_rngs,
    spec_of,
    tensor_view,
)
from tolaria.state.training_state import StatePart, Survey, TrainingState, parameter_names
from tolaria.tensors import DTYPES, whole

if TYPE_CHECKING:
    from pydantic import JsonValue

_REFUSALS: Final = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a part, such as a job's own cursor, may raise for a state that it cannot load."""

_MODEL: Final = ("parameter/", "buffer/")
_CPU: Final = torch.device("cpu")


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
    staged = StagedRestore(state, image)
    if not staged.changes_topology:
        _check_tensors(state.survey(), image, staged.values)
    return staged


class StagedRestore:
    """A checked restore, made by `stage_restore`. `commit` may be called once, at a step boundary."""

    def __init__(self, state: TrainingState, image: StateImage) -> None:
        self._state = state
        self._image = image
        self.values: Mapping[str, Any] = json.loads(image.values)
        state.wake(self.values["parts"])
        _check_parts(state, self.values)
        topology = state.topology
        self.changes_topology = (
            topology is not None and encode_plain(topology.state_dict(), "topology") != self.values["topology"]
        )

    def commit(self, expired: Callable[[], bool] | None = None, failed: Callable[[], object] = lambda: None) -> None:
        """Restores topology, parts, tensors and generators, in this order. After an error everything is as before.

        If the topology differs, the live state is copied first, so that the change can be undone. To prove the result,
        compare `state.fingerprint().total` with `image.seal().total`.

        Args:
            expired: called last, right before tensors change; True abandons the restore.
            failed: called after an error, before anything is put back: other ranks put theirs back at the same time.

        Raises:
            StateMismatchError: the image does not fit the live state, or not the topology that it names.
            RestoreAbandonedError: `expired` returned True.
            TolariaError: the topology raised it while loading.
            RuntimeError: a part loads neither the image's state nor its own previous one: the live state is undefined.
        """
        state = self._state
        with ExitStack() as undo:
            undo.callback(restore_rngs, *capture_rngs())
            if self.changes_topology:
                undo.callback(_restore_topology, state, state.copy())
            try:
                self._change(undo, expired)
            except BaseException:
                failed()
                raise
            undo.pop_all()

    def _change(self, undo: ExitStack, expired: Callable[[], bool] | None) -> None:
        state = self._state
        if self.changes_topology:
            _load_topology(state, self.values)
        plan = _Plan(state, self._image, self.values)
        for name, part in state.parts.items():
            if name not in self.values["parts"]:
                continue
            undo.callback(_put_back, name, part, KeptValues(dict(part.state_dict()), f"parts/{name}"))
            try:
                part.load_state_dict(plan.part(self.values["parts"][name]))
            except _REFUSALS as error:
                raise StateMismatchError([f"parts/{name}: {type(error).__name__}: {error}"]) from error
        if expired is not None and expired():
            raise RestoreAbandonedError("about to copy")
        plan.apply()


def _put_back(name: str, part: StatePart, before: KeptValues) -> None:
    try:
        part.load_state_dict(before.values())
    except _REFUSALS as error:  # not a StateMismatchError, which would mean that nothing has changed
        raise RuntimeError(f"parts/{name} does not load its own previous state: {error}") from error


def _part_state(state: JsonValue) -> dict[str, JsonValue]:
    return cast("dict[str, JsonValue]", decode_plain(state))


def _load_topology(state: TrainingState, values: Mapping[str, Any]) -> None:
    if state.topology is not None:
        state.topology.load_state_dict(_part_state(values["topology"]))


def _restore_topology(state: TrainingState, before: StateImage) -> None:
    values = json.loads(before.values)
    _load_topology(state, values)
    _Plan(state, before, values).apply()


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_parts(state: TrainingState, values: Mapping[str, Any]) -> None:
    captured = {f"parts/{name}" for name in values["parts"]}
    required = {f"parts/{name}" for name in state.parts if name in values["parts"] or name not in state.optional}
    problems = _name_problems(required, captured)
    if (values["topology"] is None) != (state.topology is None):
        problems.append("topology: in one of the two only")
    if problems:
        raise StateMismatchError(problems)


def _check_tensors(survey: Survey, image: StateImage, values: Mapping[str, Any]) -> None:
    live = {name for name in survey.tensors if name.startswith(_MODEL)}
    captured = {spec.name: spec for spec in image.specs if spec.name.startswith(_MODEL)}
    problems = _name_problems(live, set(captured))
    for name in sorted(live & set(captured)):
        ours, theirs = spec_of(name, survey.tensors[name]), captured[name]
        if ours != theirs:
            problems.append(f"{name}: live {ours.dtype}{list(ours.shape)}, image {theirs.dtype}{list(theirs.shape)}")
    problems += _optimizer_problems(cast("dict[str, Any]", survey.values["optimizer"]), values["optimizer"])
    if problems:
        raise StateMismatchError(problems)


def _name_problems(live: set[str], captured: set[str]) -> list[str]:
    missing = [f"{name}: in the image only" for name in sorted(captured - live)]
    return missing + [f"{name}: live only" for name in sorted(live - captured)]


def _optimizer_problems(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if live["kind"] != wanted["kind"]:
        return [f"optimizer: live {live['kind']}, image {wanted['kind']}"]
    ours = [group["parameters"] for group in live["groups"]]
    theirs = [group["parameters"] for group in wanted["groups"]]
    if len(ours) != len(theirs):
        return [f"optimizer: {len(ours)} groups live, {len(theirs)} in the image"]
    return [f"optimizer: group {i} has other parameters" for i, a in enumerate(ours) if a != theirs[i]]


# -- the copy --------------------------------------------------------------------------------------------------------


class _Plan:
    """Pairs the image's tensors with live ones, and with new ones where the live state has none that fits.

    The live state must have the image's topology.

    Raises:
        StateMismatchError: the image does not fit; names the differences.
    """

    def __init__(self, state: TrainingState, image: StateImage, values: Mapping[str, Any]) -> None:
        survey = state.survey()
        _check_tensors(survey, image, values)
        self._live, self._image = state.live, image
        self._live_tensors = survey.tensors
        self._specs = {spec.name: spec for spec in image.specs}
        self._parameters = {name: parameter for parameter, name in parameter_names(state.live).items()}
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._used: set[int] = set()
        for name, tensor in survey.tensors.items():
            if name.startswith(_MODEL):
                self._fill(name, tensor)
        groups = values["optimizer"]["groups"]
        self._group_options = [
            cast("dict[str, object]", decode(group["options"], lambda ref: self._take(ref, _CPU))) for group in groups
        ]
        on_device = {
            name
            for group, options in zip(groups, self._group_options, strict=True)
            if options.get("capturable") or options.get("fused")
            for name in group["parameters"]
        }
        self._optimizer_state = {
            self._parameters[name]: self._entries(name, entries, everything_on_device=name in on_device)
            for name, entries in values["optimizer"]["state"].items()
        }
        rng_tensors = {name: self._source(name) for name in self._specs if name.startswith("rng/")}
        self._rngs = rng_tensors, values["rng"]

    def part(self, encoded: JsonValue) -> dict[str, Any]:
        """Returns the state of a part, with new tensors."""
        device = local(next(iter(self._parameters.values()))).device

        def take(ref: Mapping[str, JsonValue]) -> Tensor:
            home = device if ref.get("home") == "device" else _CPU
            name = cast("str", ref[TENSOR_KEY])
            source = self._source(name)
            if (like := self._sharded_like(name)) is None:
                return source.to(home, copy=True)
            part = source if name in self._image.parts else part_of(source, like)
            return sharded_like(part.to(home, copy=True), like)

        return cast("dict[str, Any]", decode(encoded, take))

    def _sharded_like(self, name: str) -> Tensor | None:
        """Returns as which tensor one of a part is sharded: the live one, or the parameter whose name ends its name."""
        shape = self._specs[name].shape
        named = (p for each, p in self._parameters.items() if name.endswith((f"/{each}", f".{each}")))
        found = (each for each in (self._live_tensors.get(name), *named) if each is not None and is_sharded(each))
        return next((each for each in found if tuple(each.shape) == shape), None)

    def apply(self) -> None:
        """Changes the live state. Synchronises with the devices involved."""
        optimizer = self._live.optimizer
        if self._targets:
            with torch.no_grad():
                torch._foreach_copy_(self._targets, self._sources)
        for parameter in [p for p in optimizer.state if p not in self._optimizer_state]:
            del optimizer.state[parameter]
        for parameter, entries in self._optimizer_state.items():
            live = optimizer.state[parameter]
            live.clear()
            live.update(entries)
        for group, options in zip(optimizer.param_groups, self._group_options, strict=True):
            for key in [k for k in group if k != "params" and k not in options]:
                del group[key]
            group.update(options)
        self._live.position = self._image.position
        restore_rngs(*self._rngs)

    def _source(self, name: str) -> Tensor:
        spec = self._specs[name]
        if (shape := self._image.parts.get(name)) is not None:
            spec = TensorSpec(name, spec.dtype, shape)
        return tensor_view(spec, self._image.buffers[name])

    def _fill(self, name: str, target: Tensor) -> Tensor:
        self._used.add(id(target))
        self._targets.append(local(target.detach()))
        source = self._source(name)
        self._sources.append(source if name in self._image.parts else part_of(source, target))
        return target

    def _entries(self, name: str, entries: JsonValue, *, everything_on_device: bool) -> dict[str, object]:
        """Returns a parameter's state. Step counts stay on the CPU unless `everything_on_device`."""
        parameter = self._parameters[name]

        def take(ref: Mapping[str, JsonValue]) -> Tensor:
            beside = everything_on_device or ref["home"] == "parameter"
            return self._take(ref, parameter.device if beside else _CPU, like=parameter)

        return cast("dict[str, object]", decode(entries, take))

    def _take(self, ref: Mapping[str, JsonValue], device: torch.device, *, like: Tensor | None = None) -> Tensor:
        """Plans a copy into the live tensor of that name if it fits and is not used yet, else into a new one.

        A new one of the shape of `like` has its memory layout, as moments must: fused kernels walk raw memory.
        """
        name = cast("str", ref[TENSOR_KEY])
        spec, live = self._specs[name], self._live_tensors.get(name)
        if live is None or spec_of(name, live) != spec or id(live) in self._used or whole(live) is not live:
            dtype = DTYPES[spec.dtype]
            if like is not None and like.shape == spec.shape:
                live = torch.empty_like(like, dtype=dtype, device=device, memory_format=torch.preserve_format)
            else:
                live = torch.empty(spec.shape, dtype=dtype, device=device)
        return self._fill(name, live)
