"""The training state, defined once: what it consists of, what each piece is called, and its digest.

Snapshot, checkpoint, restore and proof are views of `TrainingState.survey`. Owns names and canonical order (sorted
by name); must not know where images of the state are kept.

Names: `parameter/<name>`, `buffer/<name>` (persistent or not), `state/<parameter>/<key>` (the optimizer's),
`group/<index>/<option>` (options that are tensors), `rng/<generator>`. At a fence there are no
gradients, so they are no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from tolaria.errors import ImageDamagedError, StateUnsupportedError
from tolaria.rollback.digest import Fingerprint, fingerprint
from tolaria.rollback.encoding import TENSOR_KEY, canonical_json, encode, encode_plain
from tolaria.rollback.rng import capture_rngs
from tolaria.values.training import Position


class LiveTraining(Protocol):
    """What is trained. The attributes are read anew each time, so a rebuilt optimizer is found."""

    position: Position

    @property
    def model(self) -> nn.Module:
        """The model, seeds grafted in; not a compiled wrapper's copy."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters."""


class StatePart(Protocol):
    """A piece of state that is not tensors: LR controller, data cursor, seed topology, AMP scaler."""

    def state_dict(self) -> dict[str, JsonValue]:
        """The piece as JSON values; floats may be infinite or NaN."""

    def load_state_dict(self, state: dict[str, JsonValue]) -> Any:
        """Become what `state_dict` told; an error leaves it to the caller to load the old state again."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The live state at a glance: the live tensors themselves by name (RNGs: copies), and the rest as JSON values."""

    position: Position
    tensors: Mapping[str, Tensor]
    values: Mapping[str, JsonValue]

    def json(self) -> bytes:
        """The canonical JSON of `values`."""
        return canonical_json(dict(self.values))


class StateImage:
    """A copy of a training state that nobody changes: tensors in canonical order, canonical JSON of the rest.

    `seal` records its digest; the caller says when, since hashing takes about half as long as copying.
    """

    def __init__(
        self, position: Position, tensors: Mapping[str, Tensor], values: bytes, *, sealed: Fingerprint | None = None
    ) -> None:
        self.position = position
        self.tensors = MappingProxyType(dict(tensors))
        self.values = values
        self._fingerprint = sealed

    @property
    def sealed(self) -> Fingerprint | None:
        """The digest recorded, if it has been."""
        return self._fingerprint

    @property
    def size_bytes(self) -> int:
        """Bytes of tensors and JSON."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + len(self.values)

    def seal(self) -> Fingerprint:
        """The digest of this image, computed once. From any thread; the GIL is free meanwhile."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.tensors, self.values)
        return self._fingerprint

    def verify(self) -> Fingerprint:
        """Read everything again and compare with the seal; seals an image that has none.

        Raises:
            ImageDamagedError: naming the first tensor that is not what it was.
        """
        sealed = self.seal()
        found = fingerprint(self.tensors, self.values)
        if found.total != sealed.total:
            raise ImageDamagedError(_first_difference(sealed, found))
        return sealed


class TrainingState:
    """The one definition of the training state, over live objects. For the compute lane only, at a fence.

    Args:
        live: model, optimizer, position.
        parts: other pieces by name; the names belong to the state, and a state without one of them does not fit.
        topology: the piece whose loading changes which parameters and optimizer groups exist; None where nothing does.

    Raises:
        StateUnsupportedError: when a module keeps extra state that is neither parameter nor buffer.
    """

    def __init__(
        self, live: LiveTraining, parts: Mapping[str, StatePart], *, topology: StatePart | None = None
    ) -> None:
        self.live = live
        self.parts = MappingProxyType({name: parts[name] for name in sorted(parts)})
        self.topology = topology
        for name, module in live.model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise StateUnsupportedError(name, "the module has extra state beside parameters and buffers")

    def survey(self) -> Survey:
        """Name everything. Copies no tensor but the RNGs'; synchronises with CUDA for those.

        Raises:
            StateUnsupportedError: naming what has no faithful form.
        """
        return _Surveyor(self).survey()

    def fingerprint(self) -> Fingerprint:
        """Digests of the live state. Synchronises; reads every byte."""
        survey = self.survey()
        return fingerprint(survey.tensors, survey.json())

    def copy(self) -> StateImage:
        """An image in fresh memory on the tensors' own devices, unsealed. The ring does this without allocating."""
        survey = self.survey()
        tensors = {name: tensor.detach().clone() for name, tensor in survey.tensors.items()}
        return StateImage(survey.position, tensors, survey.json())


def parameter_names(live: LiveTraining) -> dict[Tensor, str]:
    """Canonical names of all parameters, of the model and of the optimizer alone; tied ones have their first name."""
    names: dict[Tensor, str] = {}
    for name, parameter in live.model.named_parameters():
        names.setdefault(parameter, eager_name(name))
    for index, group in enumerate(live.optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            names.setdefault(parameter, f"optimizer:{index}.{position}")
    return names


def eager_name(name: str) -> str:
    """The name without what `torch.compile` put into it, so that compiled and eager runs share checkpoints."""
    return name.replace("_orig_mod.", "")


def whole(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that has memory of its own, as a view; other tensors as they are."""
    if tensor.layout != torch.strided:
        return tensor
    for dimension, (stride, length) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and length > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


class _Surveyor:
    """One walk over the live objects."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._live = state.live
        self._names = parameter_names(state.live)
        self._tensors: dict[str, Tensor] = {}

    def survey(self) -> Survey:
        for parameter, name in self._names.items():
            self._put(f"parameter/{name}", parameter)
        for name, buffer in self._live.model.named_buffers():
            self._put(f"buffer/{eager_name(name)}", whole(buffer))
        topology = self._state.topology
        rng_tensors, rng_values = capture_rngs()
        values: dict[str, JsonValue] = {
            "position": asdict(self._live.position),
            "optimizer": self._optimizer(),
            "parts": {
                name: encode_plain(part.state_dict(), f"parts/{name}") for name, part in self._state.parts.items()
            },
            "topology": None if topology is None else encode_plain(topology.state_dict(), "topology"),
            "rng": rng_values,
        }
        self._tensors.update(rng_tensors)
        tensors = MappingProxyType({name: self._tensors[name] for name in sorted(self._tensors)})
        return Survey(self._live.position, tensors, MappingProxyType(values))

    def _optimizer(self) -> JsonValue:
        optimizer = self._live.optimizer
        groups: list[JsonValue] = [
            {
                "parameters": [self._names[p] for p in group["params"]],
                "options": {
                    key: encode(value, f"group/{index}/{key}", self._put)
                    for key, value in group.items()
                    if key != "params"
                },
            }
            for index, group in enumerate(optimizer.param_groups)
        ]
        state: dict[str, JsonValue] = {}
        for parameter, entries in optimizer.state.items():
            name = self._names.get(parameter)
            if name is None:
                raise StateUnsupportedError(
                    "optimizer", "its state has an entry that belongs to none of its parameters"
                )
            state[name] = encode(dict(entries), f"state/{name}", _Anchored(self._put, parameter))
        return {"kind": type(optimizer).__name__, "groups": groups, "state": state}

    def _put(self, name: str, tensor: Tensor) -> JsonValue:
        if name in self._tensors:
            raise StateUnsupportedError(name, "two tensors have this name")
        self._tensors[name] = tensor
        return {TENSOR_KEY: name}


class _Anchored:
    """Notes of a parameter's optimizer tensors whether they live where it does or always on the CPU (step counts)."""

    def __init__(self, put: Any, parameter: Tensor) -> None:
        self._put = put
        self._device = parameter.device

    def __call__(self, name: str, tensor: Tensor) -> JsonValue:
        with_parameter = tensor.device == self._device and (tensor.dim() > 0 or self._device.type != "cpu")
        stand_in = cast("dict[str, JsonValue]", self._put(name, tensor))
        return {**stand_in, "home": "parameter" if with_parameter else "cpu"}


def _first_difference(sealed: Fingerprint, found: Fingerprint) -> str:
    for name, digest in sealed.tensors.items():
        if found.tensors.get(name) != digest:
            return name
    return "values"
