"""What an export of the model needs to know beside its tensors: shared and transient tensors, slots, its config.

The description is JSON, so that the run can keep it in each checkpoint's manifest without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import structlog
from torch import Tensor, nn

from tolaria.seeds.slots import slots_of
from tolaria.values.training import eager_name


def describe(model: nn.Module) -> str:
    """Returns the description of a model, without what belongs to its seeds, as JSON; empty if its code refuses.

    `tied` maps each further name of a tensor in `state_dict` to the name under which the training state has it;
    `transient` lists the buffers that `state_dict` leaves out; `slots` has path, features and layout of each slot by
    name; `transformers` describes a model of that library, if there is one inside.
    """
    try:
        return json.dumps(_description(model), sort_keys=True)
    except Exception as error:  # noqa: BLE001 - the model's own state_dict and config; training does not need them
        structlog.get_logger(__name__).warning("model_not_described", detail=f"{type(error).__name__}: {error}")
        return ""


def _description(model: nn.Module) -> dict[str, Any]:
    slots = slots_of(model)
    seeds = tuple(f"{path}.seeds." if path else "seeds." for path, _ in slots.values())
    known = {id(tensor): name for name, tensor in _tensors(model)}
    listed = {eager_name(name): id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    tied = {name: known[key] for name, key in listed.items() if known.get(key, name) != name}
    description: dict[str, Any] = {
        "tied": {name: first for name, first in tied.items() if not name.startswith(seeds)},
        "transient": [name for name, _ in _named_buffers(model) if name not in listed and not name.startswith(seeds)],
        "slots": {
            name: {"path": path, "features": slot.spec.features, "layout": slot.spec.layout}
            for name, (path, slot) in slots.items()
        },
    }
    if (pretrained := _pretrained(model)) is not None:
        description["transformers"] = pretrained
    return description


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield eager_name(name), parameter
    yield from _named_buffers(model)


def _named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in model.named_buffers():
        yield eager_name(name), buffer


def _pretrained(model: nn.Module) -> dict[str, Any] | None:
    """Returns path, class and configs of the outermost model of `transformers`; None if the job has none.

    The library is not imported: a job that uses it has done so.
    """
    library = sys.modules.get("transformers.modeling_utils")
    kind = getattr(library, "PreTrainedModel", None)
    if kind is None:
        return None
    for path, module in model.named_modules():
        if isinstance(module, kind):
            found: Any = module
            config = json.loads(found.config.to_json_string())
            config["architectures"] = [type(module).__name__]
            config["dtype"] = str(found.dtype).removeprefix("torch.")
            generation = getattr(found, "generation_config", None)
            generates = None if generation is None else json.loads(generation.to_json_string())
            return {"path": eager_name(path), "config": config, "generation_config": generates}
    return None
