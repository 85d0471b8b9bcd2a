from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from tolaria.errors import ConfigurationError
from tolaria.jobs import Batch
from tolaria.lane.device import choose_device, hardware_context, limit_threads, on_device, to_device, usable_cores


def test_a_missing_device_is_a_configuration_error() -> None:
    """The message for a missing GPU says how many there are."""
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has more than 7 CUDA devices")
    with pytest.raises(ConfigurationError, match="cuda:7"):
        choose_device("cuda:7")
    assert choose_device("cpu") == torch.device("cpu")


def test_threads_leave_a_core_for_the_event_loop() -> None:
    """0 is one less than the process may use; another number is taken as it is."""
    before = torch.get_num_threads()
    assert limit_threads(3) == torch.get_num_threads() == 3
    assert limit_threads(0) == torch.get_num_threads() >= 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.0, 2), (0.5, 1), (3.2, 4), (64.0, 8)])
def test_the_share_of_a_container_limits_the_cores(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than it may use at a time would be stopped in turns."""
    monkeypatch.setattr("tolaria.lane.device.os.sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr("tolaria.lane.device.cpu_quota", lambda: quota)
    assert usable_cores() == cores


class Pair(NamedTuple):
    """A pair of sentences: its field `to` is no method that moves it."""

    of: torch.Tensor
    to: torch.Tensor


def test_tensors_in_nested_payloads_are_moved() -> None:
    """Tensors in tuples, lists and dicts are moved, other values are kept; on the CPU nothing is copied."""
    meta = torch.device("meta")
    packed = to_device((nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]),), meta)[0]
    assert (packed.data.device, packed.batch_sizes.device.type) == (meta, "cpu")
    moved = to_device({"x": (torch.ones(2), [torch.ones(3)]), "name": "a"}, meta)
    assert moved["x"][0].device == moved["x"][1][0].device == meta
    assert moved["name"] == "a"
    pair = Pair(torch.ones(2), torch.ones(3))
    assert to_device(pair, meta).to.device == meta
    batch = Batch(torch.ones(2), 2)
    assert on_device(batch, torch.device("cpu")) is batch
    assert on_device(batch, meta).payload.device == meta


def test_the_hardware_context_of_a_cpu_has_memory_and_load() -> None:
    """Memory is in GB, and the utilization is the load average per core, at most 100 %."""
    context = hardware_context(torch.device("cpu"))
    assert (context.device_type, context.device_id) == ("cpu", "cpu")
    assert context.total_memory_gb > context.available_memory_gb > 0
    assert 0 <= context.utilization_percent <= 100
