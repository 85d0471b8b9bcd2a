"""The training state, defined once: its parts, the name of each tensor, and its digest.

Tensors are named `parameter/<name>`, `buffer/<name>` (persistent or not), `state/<parameter>/<key>` (optimizer state),
`group/<index>/<option>` (parameter group options that are tensors), `parts/<part>/<key>` and `rng/<generator>`, and
sorted by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from tolaria.errors import StateUnsupportedError
from tolaria.images import Fingerprint, StateImage, canonical_json, combine
from tolaria.shards import is_sharded, local, part_of, whole_value
from tolaria.state.arenas import Arena, FillSharded
from tolaria.state.encoding import (
    TENSOR_KEY,
    PutTensor,
    capture_rngs,
    encode,
    encode_plain,
    packed_bytes,
    spec_of,
    specs_of,
    tensor_view,
)
from tolaria.tensors import whole
from tolaria.values.training import Position, eager_name


class LiveTraining(Protocol):
    """The objects being trained. The attributes are read at each use, since the optimizer may be rebuilt."""

    position: Position

    @property
    def model(self) -> nn.Module:
        """The model with its grafted seeds, not a compiled wrapper."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters."""


class StatePart(Protocol):
    """A part of the state: LR controller, data cursor, seed topology, AMP scaler, the job's own state."""

    def state_dict(self) -> Mapping[str, Any]:
        """Returns the part as nested values, which `encode` converts; it may have tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restores what `state_dict` returned. After an error the caller loads the previous state again."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The live tensors themselves by name (generators: copies), and everything else as JSON values.

    `trained` has the names of those that every step changes: parameters that require gradients and their optimizer
    state; and those of all sharded tensors. `fill_sharded` copies whole sharded tensors, in which all ranks have to
    take part.
    """

    position: Position
    tensors: Mapping[str, Tensor]
    values: Mapping[str, JsonValue]
    trained: AbstractSet[str]
    fill_sharded: FillSharded

    def json(self) -> bytes:
        """Returns the canonical JSON of `values`."""
        return canonical_json(dict(self.values))


class TrainingState:
    """The definition of the training state over live objects. Used by the lane only, at a step boundary.

    Args:
        live: model, optimizer and position.
        parts: other parts by name. The names belong to the state: an image with other parts does not fit.
        optional: parts that an image may lack, as one of an earlier version or an earlier form of the job does. Such a
            part stays as it is when the image is restored.
        dormant: parts that the state has once an image with them is restored.
        stepped: parts whose tensors every step changes.
        topology: the part whose loading changes which parameters and parameter groups exist; None if none does.

    Raises:
        StateUnsupportedError: a module has extra state that is neither parameter nor buffer.
    """

    def __init__(
        self,
        live: LiveTraining,
        parts: Mapping[str, StatePart],
        *,
        topology: StatePart | None = None,
        optional: Collection[str] = (),
        dormant: Mapping[str, StatePart] = MappingProxyType({}),
        stepped: Collection[str] = (),
    ) -> None:
        self.live = live
        self.stepped = frozenset(stepped)
        self.optional = frozenset(optional)
        self._dormant = dict(dormant)
        self.parts = MappingProxyType({name: parts[name] for name in sorted(parts)})
        self.topology = topology
        self.fill_sharded: FillSharded = gather_whole
        for name, module in live.model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise StateUnsupportedError(name, "the module has extra state beside parameters and buffers")

    def wake(self, names: Collection[str]) -> None:
        """Has the dormant parts with these names be parts of the state."""
        woken = {name: part for name, part in self._dormant.items() if name in names}
        if woken.keys() - self.parts.keys():
            parts = {**self.parts, **woken}
            self.parts = MappingProxyType({name: parts[name] for name in sorted(parts)})

    def survey(self, only: Collection[str] | None = None) -> Survey:
        """Lists the whole state, or the state without other parts than `only`.

        Copies no tensor except the generators', for which it synchronises with CUDA.

        Raises:
            StateUnsupportedError: something in the state cannot be represented exactly.
        """
        parts = self.parts if only is None else {name: part for name, part in self.parts.items() if name in only}
        return _Surveyor(self, parts).survey()

    def fingerprint(self, only: Collection[str] | None = None, *, gathered: bool = True) -> Fingerprint:
        """Returns the digests of the live state, equal to those of an image of it. Reads every byte; synchronises.

        With `only`, the digests are those of an image that has no other parts. Sharded tensors are gathered, one after
        the other, so that every rank has to call this; unless `gathered` is False, which takes this rank's part, as
        `copy` does.
        """
        survey, value = self.survey(only), whole_value if gathered else local
        digests = {
            name: spec_of(name, tensor).digest(packed_bytes(value(tensor))) for name, tensor in survey.tensors.items()
        }
        return combine(digests, survey.json())

    def proof(self, image: StateImage, only: Collection[str]) -> Fingerprint:
        """Returns the digests of the live state as `fingerprint` does, but without a gather: for an image on all ranks.

        A sharded tensor has the image's digest if this rank's part of both is the same, else that of the part.
        """
        survey, sealed = self.survey(only), image.seal().tensors
        digests = dict[str, str]()
        for name, tensor in survey.tensors.items():
            spec, sharded = spec_of(name, tensor), is_sharded(tensor)
            digests[name] = spec.digest(packed_bytes(local(tensor)))
            if sharded and name in sealed:
                whole_part = part_of(tensor_view(spec, image.buffers[name]), tensor)
                same = spec.digest(packed_bytes(whole_part)) == digests[name]
                digests[name] = sealed[name] if same else f"part {digests[name]}"
        return combine(digests, survey.json())

    def replicated(self) -> dict[str, str]:
        """Returns the digests of the tensors that are the same on all ranks, without the parts. Synchronises."""
        return {
            name: spec_of(name, tensor).digest(packed_bytes(tensor))
            for name, tensor in self.survey(()).tensors.items()
            if not (is_sharded(tensor) or name.startswith("rng/"))
        }

    def gather(self) -> None:
        """Takes part in a copy of the whole state on another rank."""
        for tensor in self.survey().tensors.values():
            whole_value(tensor)

    def copy(self) -> StateImage:
        """Returns an unsealed image in new host memory, with this rank's part of sharded tensors. Synchronises."""
        survey = self.survey()
        tensors = {name: local(tensor) for name, tensor in survey.tensors.items()}
        arena = Arena(specs_of(tensors), pinned=False)
        arena.fill(tensors)
        parts = {name: tuple(tensors[name].shape) for name, tensor in survey.tensors.items() if is_sharded(tensor)}
        specs = specs_of(survey.tensors)
        return StateImage(survey.position, specs, arena.buffers, survey.json(), parts=parts)


def gather_whole(sharded: Mapping[str, tuple[Tensor, Tensor]], _arena: Arena) -> None:
    """Copies sharded tensors as a `FillSharded`; every rank has to gather them meanwhile, as `gather` does."""
    with torch.no_grad():
        for tensor, target in sharded.values():
            target.copy_(whole_value(tensor))  # one after the other, so that only one is in memory


def parameter_names(live: LiveTraining) -> dict[Tensor, str]:
    """Returns the names of the model's and the optimizer's parameters. A tied parameter has its first name."""
    names: dict[Tensor, str] = {}
    for name, parameter in live.model.named_parameters():
        names.setdefault(parameter, eager_name(name))
    for index, group in enumerate(live.optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            names.setdefault(parameter, f"optimizer:{index}.{position}")
    return names


class _Surveyor:
    """One pass over the live objects."""

    def __init__(self, state: TrainingState, parts: Mapping[str, StatePart]) -> None:
        self._state = state
        self._parts = parts
        self._live = state.live
        self._names = parameter_names(state.live)
        self._tensors: dict[str, Tensor] = {}
        self._trained: set[str] = set()

    def survey(self) -> Survey:
        for parameter, name in self._names.items():
            self._put(f"parameter/{name}", parameter, trained=parameter.requires_grad)
        for name, buffer in self._live.model.named_buffers():
            self._put(f"buffer/{eager_name(name)}", whole(buffer))
        topology = self._state.topology
        rng_tensors, rng_values = capture_rngs()
        values: dict[str, JsonValue] = {
            "position": asdict(self._live.position),
            "optimizer": self._optimizer(),
            "parts": {name: self._part(name, part) for name, part in self._parts.items()},
            "topology": None if topology is None else encode_plain(topology.state_dict(), "topology"),
            "rng": rng_values,
        }
        self._tensors.update(rng_tensors)
        tensors = MappingProxyType({name: self._tensors[name] for name in sorted(self._tensors)})
        return Survey(self._live.position, tensors, MappingProxyType(values), self._trained, self._state.fill_sharded)

    def _part(self, name: str, part: StatePart) -> JsonValue:
        return encode(dict(part.state_dict()), f"parts/{name}", self._put_home(trained=name in self._state.stepped))

    def _put_home(self, *, trained: bool) -> PutTensor:
        """Records whether a part's tensor is on the CPU or on a device, which is then that of training."""

        def put(name: str, tensor: Tensor) -> JsonValue:
            reference = cast("dict[str, JsonValue]", self._put(name, whole(tensor), trained=trained))
            return {**reference, "home": "cpu" if tensor.device.type == "cpu" else "device"}

        return put

    def _optimizer(self) -> JsonValue:
        optimizer = self._live.optimizer
        groups: list[JsonValue] = []
        for index, group in enumerate(optimizer.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            parameters: list[JsonValue] = [self._names[parameter] for parameter in group["params"]]
            groups.append({"parameters": parameters, "options": encode(options, f"group/{index}", self._put)})
        state: dict[str, JsonValue] = {}
        for parameter, entries in optimizer.state.items():
            name = self._names.get(parameter)
            if name is None:
                raise StateUnsupportedError("optimizer", "its state has an entry of an unknown parameter")
            state[name] = encode(dict(entries), f"state/{name}", self._put_beside(parameter))
        return {"kind": type(optimizer).__name__, "groups": groups, "state": state}

    def _put(self, name: str, tensor: Tensor, *, trained: bool = False) -> JsonValue:
        if name in self._tensors:
            raise StateUnsupportedError(name, "two tensors have this name")
        if trained or is_sharded(tensor):
            self._trained.add(name)
        self._tensors[name] = tensor
        return {TENSOR_KEY: name}

    def _put_beside(self, parameter: Tensor) -> PutTensor:
        """Records for each tensor whether it is on the parameter's device or, like step counts, always on the CPU."""
        device, trained = parameter.device, parameter.requires_grad

        def put(name: str, tensor: Tensor) -> JsonValue:
            with_parameter = tensor.device == device and (tensor.dim() > 0 or device.type != "cpu")
            reference = cast("dict[str, JsonValue]", self._put(name, tensor, trained=trained))
            return {**reference, "home": "parameter" if with_parameter else "cpu"}

        return put
