"""Folds seeds that are linear maps, such as those of `lora`, into the linear layer before or behind their slot.

A seed adds alpha M h to the activations h, so that the slot is the map T = 1 + alpha M. Behind a layer W h + b that
only the slot reads, T W and T b replace W and b; before a layer that alone reads the slot, W T replaces W. Where the
layers are is found by torch.fx, which follows the model's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from tolaria.seeds.slots import Graft, SeedSlot, slots_of

Layer: TypeAlias = nn.Linear | nn.Conv2d

_PASSED_OVER = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
"""Layers that do nothing in evaluation mode."""


@dataclass(frozen=True, slots=True)
class Folding:
    """The layer that each folded seed is a part of now, and why each of the others was not folded; by seed id."""

    folded: Mapping[str, str]
    kept: Mapping[str, str]


def fold(model: nn.Module) -> Folding:
    """Folds the seeds of a model in evaluation mode as far as that is possible. Changes the model."""
    grafts = {(name, i): graft for name, (_, slot) in slots_of(model).items() for i, graft in slot.grafts().items()}
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # noqa: BLE001 - runs the user's own code on values that stand for tensors
        reason = f"the forward pass cannot be traced: {type(error).__name__}: {str(error).splitlines()[0:1]}"
        return Folding({}, {seed_id: reason for _, seed_id in grafts})
    folded: dict[str, str] = {}
    kept: dict[str, str] = {}
    for path, slot in slots_of(model).values():
        neighbours = _Neighbours(model, graph, path)
        done = _fold_slot(slot, neighbours.before, neighbours.behind)
        folded |= {seed_id: neighbours.path(layer) for seed_id, layer in done.items()}
        kept |= {seed_id: _reason(graft) for seed_id, graft in slot.grafts().items()}
    return Folding(folded, kept)


def matrix_of(graft: Graft) -> Tensor | None:
    """Returns M of a branch that maps h to M h at every position, in float64; None for another branch."""
    layers = list(graft.branch) if isinstance(graft.branch, nn.Sequential) else [graft.branch]
    product: Tensor | None = None
    for layer in layers:
        if not _is_pointwise(layer):
            return None
        weight = cast("Tensor", layer.weight).detach().double().flatten(1)
        product = weight if product is None else weight @ product
    return product


def _is_pointwise(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.bias is None
    return isinstance(layer, nn.Conv2d) and layer.bias is None and layer.kernel_size == (1, 1) and layer.groups == 1


def _reason(graft: Graft) -> str:
    if matrix_of(graft) is None:
        return "it is not a linear map"
    return "no linear layer is connected with its slot alone"


def _fold_slot(slot: SeedSlot, before: Layer | None, behind: Layer | None) -> dict[str, Layer]:
    """Folds the first seeds of a slot into the layer before it, and the last ones into the layer behind it."""
    chain = slot.grafts()
    done: dict[str, Layer] = {}
    for layer, order, outputs in ((before, list(chain), True), (behind, list(chain)[::-1], False)):
        if layer is None:
            continue
        for seed_id in order:
            if seed_id in done:
                break
            matrix = matrix_of(chain[seed_id])
            if matrix is None:
                break
            change = torch.eye(len(matrix), dtype=torch.float64) + chain[seed_id].alpha * matrix
            _multiply(layer, change, outputs=outputs)
            done[seed_id] = layer
    slot.arrange({seed_id: graft for seed_id, graft in chain.items() if seed_id not in done})
    return done


def _multiply(layer: Layer, change: Tensor, *, outputs: bool) -> None:
    weight = layer.weight.detach().double()
    with torch.no_grad():
        if outputs:
            layer.weight.copy_(torch.einsum("po,o...->p...", change, weight))
            if layer.bias is not None:
                layer.bias.copy_(change @ layer.bias.double())
        else:
            layer.weight.copy_(torch.einsum("oi...,ij->oj...", weight, change))


class _Tracer(fx.Tracer):
    """Does not look into slots, whose forward pass checks shapes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns whether a module is one operation of the graph."""
        return isinstance(m, SeedSlot) or super().is_leaf_module(m, module_qualified_name)


class _Neighbours:
    """The linear layers that are connected with a slot and with nothing else on that side; None without one."""

    def __init__(self, model: nn.Module, graph: fx.Graph, slot: str) -> None:
        self._model, self._graph = model, graph
        self._layout = cast("SeedSlot", model.get_submodule(slot)).spec.layout
        nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == slot]
        self.before: Layer | None = None
        self.behind: Layer | None = None
        if len(nodes) == 1:
            source = nodes[0].args[0]
            if isinstance(source, fx.Node) and len(source.users) == 1:
                self.before = self._layer(source)
            self.behind = self._layer(self._reader(nodes[0]))

    def path(self, layer: Layer) -> str:
        """Returns the layer's name in the model."""
        names: list[str] = [name for name, module in self._model.named_modules() if module is layer]
        return names[0]

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """Returns the one node that reads this one's result, after those that pass it on."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            passes = node.op == "call_module" and isinstance(self._model.get_submodule(str(node.target)), _PASSED_OVER)
            if not passes:
                return node
        return None

    def _layer(self, node: fx.Node | None) -> Layer | None:
        if node is None or node.op != "call_module":
            return None
        calls = [other for other in self._graph.nodes if other.op == "call_module" and other.target == node.target]
        layer = self._model.get_submodule(str(node.target))
        kind = nn.Conv2d if self._layout == "image" else nn.Linear
        if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer) is not kind:
            return None
        if len(calls) > 1 or self._shared(layer) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            return None
        return layer

    def _shared(self, layer: nn.Module) -> bool:
        """Whether a parameter of the layer is used elsewhere in the model."""
        own = {id(parameter) for parameter in layer.parameters()}
        return sum(id(p) in own for p in _all_parameters(self._model)) > len(own)


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, parameter in model.named_parameters(remove_duplicate=False):
        yield parameter
