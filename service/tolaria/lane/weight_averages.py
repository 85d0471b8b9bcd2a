"""`WeightAverages`: an exponential moving average of the weights, beside the model that is trained.

It is that of `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`: a copy after the first update, then
`decay` of the average and the rest of the present weights. It follows the model's structure, without a second model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tolaria.config import EmaSettings
from tolaria.shards import local_parts
from tolaria.tensors import whole
from tolaria.values.evaluation import AVERAGES
from tolaria.values.training import eager_name

PART: Final = AVERAGES
"""The name of this part of the training state, and of its evaluation."""


class WeightAverages:
    """Averages of all parameters that are, or have been, trained; others are those of the model, as are buffers.

    With `ema.buffers = average` those of floating point are averaged too. A part of the training state. Used in the
    lane's thread.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        self._model = model
        average: Any = get_ema_multi_avg_fn
        self._average = average(settings.decay)
        self._with_buffers = settings.buffers == "average"
        self.evaluated = settings.evaluate
        self._updates = 0
        self._averages: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self.follow()

    def follow(self) -> None:
        """Adapts to a model whose parameters have come, gone, or begun to be trained; new averages begin as copies."""
        named = [(eager_name(name), parameter) for name, parameter in self._model.named_parameters()]
        known = self._averages
        self._parameters = {name: each for name, each in named if each.requires_grad or name in known}
        live = self._live()
        self._averages = {name: known[name] if name in known else _copy(tensor) for name, tensor in live.items()}

    def restart(self) -> None:
        """Begins anew, with the present weights: those of a state without averages have been restored."""
        self._updates, self._averages = 0, {}
        self.follow()

    @torch.no_grad()
    def update(self) -> None:
        """Follows an optimizer update. Does not synchronise."""
        live = self._live()
        averages, present = local_parts([self._averages[name] for name in live]), local_parts(list(live.values()))
        if not averages:
            return
        if self._updates:
            self._average(averages, present, self._updates)
        else:
            torch._foreach_copy_(averages, present)
        self._updates += 1

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model has the averages, which hold its own weights meanwhile. Needs no more memory."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages by the names of their tensors, and the number of updates."""
        return {"updates": self._updates, "tensors": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; `follow` has to be called next. Raises KeyError."""
        tensors, updates = cast("Mapping[str, Tensor]", state["tensors"]), int(state["updates"])
        self._averages, self._updates = dict(tensors), updates

    def _live(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers()}

    def _buffers(self) -> dict[str, Tensor]:
        if not self._with_buffers:
            return {}
        named = ((eager_name(name), whole(buffer)) for name, buffer in self._model.named_buffers())
        return {name: buffer for name, buffer in named if buffer.is_floating_point()}

    @torch.no_grad()
    def _exchange(self) -> None:
        live = self._live()
        averages = local_parts([self._averages[name] for name in live])
        for average, present in zip(averages, local_parts(list(live.values())), strict=True):
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
