from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from support.lane_driver import built
from tolaria.lane.train_module import TrainModule
from tolaria.ranks.group import Group

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own

LEADING, FOLLOWING = 7, 11
"""Seeds of the generators of two ranks."""


class Recorded(Group):
    """A rank of a group of two: the leader's broadcasts are recorded, and are what the other one receives."""

    def __init__(self, rank: int, sent: list[Any]) -> None:
        super().__init__(rank, 2)
        self.sent = sent

    def broadcast_bytes(self, data: bytes = b"", source: int = 0) -> bytes:
        if not self.leads:
            return bytes(self.sent.pop(0))
        self.sent.append(data)
        return data

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        if self.leads:
            self.sent.append([tensor.clone() for tensor in tensors])
            return
        for mine, given in zip(tensors, self.sent.pop(0), strict=True):
            mine.copy_(given)


def drawn() -> tuple[int, float, float]:
    """A number of each global generator of the processor."""
    return int(torch.randint(2**40, ())), random.random(), float(np.random.random())  # noqa: NPY002 - the global ones


def seed(number: int) -> None:
    """Seeds them."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - as above


def module_of(rank: int, sent: list[Any], orders: list[tuple[int, float, float]]) -> TrainModule:
    """The module of a rank whose data draw the order of a pass of six batches from the global generators."""
    lane = built("support.data_jobs:StreamJob", steps=60, evaluate_every_steps=20, options={"samples": 22})
    module, cursor = lane.module, cast("Any", lane.module.cursor)
    begin = cursor.data.begin_epoch

    def begin_epoch(number: int) -> None:
        begin(number)
        orders.append(drawn())

    cursor.data.begin_epoch = begin_epoch
    cursor.begin_epoch(1)
    module.group = Recorded(rank, sent)
    return module


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_pass_within_an_epoch_leaves_each_rank_its_random_numbers(rank: int) -> None:
    """All ranks draw the same order of it; noise and dropout of the step are those of the rank, as in any step."""
    sent, orders, after = list[Any](), list[tuple[int, float, float]](), list[tuple[int, float, float]]()
    for each in range(rank + 1):
        module = module_of(each, sent, orders)
        for _ in range(6):
            module.cursor.next_batch()
        seed(FOLLOWING if each else LEADING)
        module.cursor.next_batch()
        after.append(drawn())
    of_passes = orders[1::2]
    seed(LEADING)
    assert of_passes == [drawn()] * (rank + 1)
    if rank:
        seed(FOLLOWING)
    assert after[-1] == drawn()
