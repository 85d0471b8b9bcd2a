"""`load`: the model of an export as a plain module, with the seeds that the run has grown. Needs torch alone."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.errors import ExportDamagedError, ExportMismatchError
from tolaria.export.card import TORCH_FILE, TRANSIENT_FILE, ExportCard, read_card, verify_files
from tolaria.seeds.blueprints import Blueprints
from tolaria.seeds.slots import Graft, seed_prefix, slots_of
from tolaria.tensors import DTYPES, whole


def load(path: str | Path, build_model: Callable[[], nn.Module], *, verify: bool = True) -> nn.Module:
    """Returns the exported model, on the CPU and in evaluation mode.

    Its outputs equal those of the service bit for bit, on the same device with the same number of threads, and without
    mixed precision. A seed is a part of the module that it was grafted to, frozen; its blueprint has to be installed.

    Args:
        path: the directory that `tolaria export` made.
        build_model: builds the model as the job does, for example the job's own `build_model`.
        verify: compare the files' digests with the card's first.

    Raises:
        ExportDamagedError: the directory is not a whole export.
        ExportMismatchError: the model has other tensors than the export, which is named.
        SeedError: a slot or a blueprint is missing.
    """
    place = Path(path)
    card = read_card(place)
    if verify:
        verify_files(place, card)
    if card.left_out:
        raise ExportMismatchError(
            str(place), f"it lacks {len(card.left_out)} tensors of the job's model ({card.left_out[0]}, ...)"
        )
    tensors = read_tensors(place, card)
    model = build_model()
    if card.grown:
        graft_seeds(model, card, tensors)
    fill(model, tensors, card.tied, str(place))
    return model.eval()


def read_tensors(place: Path, card: ExportCard) -> dict[str, Tensor]:
    """Returns the tensors of an export by name; they share memory with the mapped files, and must not be changed."""
    tensors: dict[str, Tensor] = {}
    for name in card.weights:
        if name == TORCH_FILE:
            tensors |= torch.load(place / name, map_location="cpu", weights_only=True)
        else:
            tensors |= read_safetensors(place / name)
    if TRANSIENT_FILE in card.files:
        tensors |= read_safetensors(place / TRANSIENT_FILE)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file in the safetensors format. Raises ExportDamagedError for another one."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapped[:8], "little")
        entries = json.loads(mapped[8:start])
        entries.pop("__metadata__", None)
        return {name: _tensor(mapped, start, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportDamagedError(str(path.parent), f"{path.name}: {type(error).__name__}: {error}") from error


def _tensor(mapped: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if low == high:
        return torch.empty(shape, dtype=dtype)
    count = (high - low) // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + low).view(shape)


def graft_seeds(model: nn.Module, card: ExportCard, tensors: Mapping[str, Tensor]) -> None:
    """Grafts the seeds of an export into the model's slots, with their tensors and at their alphas.

    Raises:
        ExportMismatchError: the model lacks a slot.
        SeedError: a blueprint is unknown or does not fit.
    """
    slots, blueprints = slots_of(model), Blueprints.installed()
    grafts: dict[str, dict[str, Graft]] = {}
    for seed in card.grown:
        if seed.slot not in slots:
            raise ExportMismatchError(card.checkpoint_id, f"the model has no slot {seed.slot!r} for {seed.seed_id!r}")
        path, slot = slots[seed.slot]
        branch = blueprints.build(seed.blueprint, slot.spec, 0)
        graft = Graft(seed.seed_id, branch, slot.spec, isolated=False)
        prefix = f"{seed_prefix(path, seed.seed_id)}."
        own = {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
        graft.load_state_dict(own, strict=False, assign=True)
        graft.set_trainable(trainable=False)
        graft.alpha = seed.alpha
        grafts.setdefault(seed.slot, {})[seed.seed_id] = graft
    for name, by_id in grafts.items():
        slots[name][1].arrange(by_id)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], where: str) -> None:
    """Copies the tensors into the model. Raises ExportMismatchError, and names what differs."""
    # A module with lazy parameters takes their shapes from what it loads.
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        model.load_state_dict(dict(tensors), strict=False)
    own = {name: whole(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    known = set(own) | set(model.state_dict()) | set(tied)
    problems = [f"it lacks {name}" for name in own if name not in tensors and tied.get(name) not in tensors]
    problems += [f"the model lacks {name}" for name in tensors if name not in known]
    for name, tensor in own.items():
        source = tensors.get(name, tensors.get(tied.get(name, "")))
        if source is not None and (source.shape, source.dtype) != (tensor.shape, tensor.dtype):
            problems.append(
                f"{name} is {source.dtype} of shape {tuple(source.shape)}, in the model {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExportMismatchError(where, "; ".join(problems[:3]) + more)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name] if name in tensors else tensors[tied[name]])
