"""`StepLosses`: the losses and samples of one step's microbatches, and their sums over the ranks of a group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tolaria.gradients import laid_out
from tolaria.jobs import Batch
from tolaria.lane.gradient_merge import total_loss
from tolaria.lane.parameter_check import judged_sum
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import Group
from tolaria.ranks.step_word import DTYPES, WORLD_MAX, StepWord


@dataclass(slots=True)
class StepLosses:
    """The microbatches of one step. The losses are weighted sums over those that were not left out.

    Attributes:
        read: samples of all microbatches.
        samples: samples of those that were not left out.
        loss: of all sources.
        plain: whether the host's loss is the only one; `essential` and `judged` are not needed then.
        essential: without the sources of isolated seeds.
        judged: the mean over the sources that are not seeds, times the samples that have one.
        judged_samples: number of those samples.
        counted: samples of the present microbatch that count on this rank.
        sources: checksum of the sources that the losses of each microbatch had.
        left_out: places in the epoch of the microbatches that were not finite.
        last_batch: the last one that was not left out.
        gradients_summed: whether the gradients are those of all ranks already.
    """

    read: int = 0
    samples: int = 0
    planned_samples: int = 0
    waited_s: float = 0.0
    copied_s: float = 0.0
    loss: Tensor | None = None
    plain: bool = True
    essential: Tensor | None = None
    judged: Tensor | None = None
    judged_samples: int = 0
    counted: int = 0
    sources: int = 0
    left_out: list[int] = field(default_factory=list)
    last_batch: Batch | None = None
    gradients_summed: bool = False

    def add(self, module: TrainModule, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Adds the losses of a microbatch, which are weighted by samples."""
        share, total = self.counted / self.planned_samples, total_loss(losses).detach()
        loss = total if share == 1.0 else total * share
        self.loss = loss if self.loss is None else self.loss + loss
        self.samples += self.counted
        if len(losses) == 1 and batch.seed_ids is None and self.plain:
            return
        self.plain = False
        seeds = set(module.seeds.topology.training_seeds)
        essential = [each.detach() for source, each in losses.items() if source not in module.isolated_seeds]
        part = torch.stack(essential).sum() * share if essential else torch.zeros_like(loss)
        self.essential = part if self.essential is None else self.essential + part
        judged, samples = judged_sum(losses, batch, self.counted, seeds)
        if judged is not None:
            self.judged = judged if self.judged is None else self.judged + judged
            self.judged_samples += samples

    def over_ranks(self, module: TrainModule, group: Group, *, failed: bool = False) -> None:
        """Replaces the losses and samples of this rank by the sums over all ranks. Synchronises.

        Where they travel with the gradients (`Group.rides`), also these, unless the step merges rows. `failed`: this
        rank has none, since a pass has raised an exception.

        Raises:
            RanksDifferError: the ranks are not at the same step of the same data.
            RankFailedError: a pass has failed on another rank.
            PeerLostError: another rank has gone.
        """
        parts = (self.loss, self.essential, self.judged)
        given = [*(0.0 if part is None else part.item() for part in parts), self.judged_samples, self.samples]
        must_match = {
            "completed steps": module.global_step,
            "batches read": module.progress.batches,
            "samples in them": self.read,
            "names of losses": self.sources,
            "announced changes of the task": len(module.announced),
        }
        asked_s, rides = time.monotonic(), _can_ride(module, group)
        if group.rides and module.parameters:
            word = group.step_word(given, must_match, rides=rides, failed=failed)
            sums = self._ride(module, group, word, gives=self.read > 0 and not (failed or module.merger.merges))
        elif failed:
            group.report_failure()
            return
        else:
            sums = group.all_reduce_step(given, must_match, rides=rides)
        module.waits.ranks_s += time.monotonic() - asked_s
        if not failed:
            self._replace(module, sums)

    def _ride(self, module: TrainModule, group: Group, word: StepWord, *, gives: bool) -> list[float]:
        """Sums the gradients too, if this step `gives` any, as it does on all ranks unless one has failed."""
        gradients = [p.grad if gives else None for p in module.parameters]
        sums, summed = group.all_reduce_ride(word, module.parameters, gradients)
        if gives:
            _write(module, summed)
            self.gradients_summed = True
        return sums

    def sum_gradients(self, module: TrainModule, group: Group) -> None:
        """Replaces the gradients of all trained parameters by their sums over the ranks, unless they are these."""
        if not self.gradients_summed:
            _write(module, group.all_reduce_gradients(module.parameters, [p.grad for p in module.parameters]))
            self.gradients_summed = True

    def _replace(self, module: TrainModule, all_sums: list[float]) -> None:
        *sums, judged_samples, samples = all_sums
        device, dtype = module.device, torch.float32 if module.device.type == "mps" else torch.float64
        found = [
            None if part is None else torch.tensor(value, dtype=dtype, device=device)
            for part, value in zip((self.loss, self.essential, self.judged), sums, strict=True)
        ]
        self.loss, self.essential = found[:2]
        self.judged = torch.tensor(sums[2], dtype=dtype, device=device) if judged_samples else None
        self.judged_samples, self.samples = int(judged_samples), int(samples)


def _write(module: TrainModule, gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(module.parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else laid_out(gradient, parameter)


def _can_ride(module: TrainModule, group: Group) -> bool:
    """Whether the sums of the next step may travel with its gradients: no rank needs to know more before.

    A step of several microbatches has other agreements before its sums, a sharded one other gradients, and one that
    merges rows has none; with CUDA, gradients and numbers take different ways.
    """
    if module.accumulate > 1 or module.sharded or module.merger.merges:
        return False
    if module.device.type != "cpu" or group.world > WORLD_MAX:
        return False
    return DTYPES.issuperset(parameter.dtype for parameter in module.parameters)
