"""Buffers through skipped steps. The modules change them in every way in which modules do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tolaria.lane.buffers import SavedBuffers

LARGE = 2**16


class Statistics(nn.Module):
    """Has a small, a large, an expanded and an optional buffer."""

    small: Tensor
    absent: Tensor | None
    large: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("small", torch.zeros(4))
        self.register_buffer("large", torch.zeros(LARGE))
        self.register_buffer("rows", torch.arange(3.0).reshape(1, 3).expand(5, 3))
        self.register_buffer("absent", None)
        self.norm = nn.BatchNorm1d(4)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all buffers."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def in_place(model: Statistics) -> None:
    """Changes all of them in place."""
    model.small.add_(float("nan"))
    model.large[7] = float("nan")
    model.norm(torch.full((2, 4), float("nan")))


def assigned(model: Statistics) -> None:
    """Assigns new tensors, as an exponential average does."""
    model.small = model.small * float("nan")
    model.large = model.large * float("nan")


def both(model: Statistics) -> None:
    """Changes the old tensor, then assigns a new one."""
    in_place(model)
    assigned(model)


def views(model: Statistics) -> None:
    """Writes through a view."""
    model.large.view(2, -1)[1].fill_(5.0)
    model.small[1:].mul_(0.0).add_(3.0)


@pytest.mark.parametrize("change", [in_place, assigned, both, views])
@pytest.mark.parametrize("good_steps", [0, 1, 3])
def test_a_skipped_step_changes_no_buffer(change: Callable[[Statistics], None], good_steps: int) -> None:
    """Whatever good steps before it did: values and the tensors themselves are those before the step."""
    model = Statistics()
    saved = SavedBuffers(model)
    saved.follow(model)
    for _ in range(good_steps):
        saved.save()
        change(model)
        with torch.no_grad():
            for buffer in (model.small, model.large):
                buffer.nan_to_num_(1.0)
    for _ in range(2):  # two skipped steps in a row
        saved.save()
        before, tensors = values(model), [model.small, model.large, model.norm.running_mean]
        change(model)
        assert saved.restore()
        for name, value in values(model).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
        assert all(a is b for a, b in zip(tensors, (model.small, model.large, model.norm.running_mean), strict=True))


def test_a_buffer_that_was_none_is_none_again() -> None:
    """A cache that a skipped step fills does not keep that step's values; one that a good step fills stays."""
    model = Statistics()
    saved = SavedBuffers(model)
    saved.follow(model)
    for _ in range(2):
        saved.save()
        model.absent = torch.full((4,), float("nan"))
        assert saved.restore()
        assert model.absent is None
    saved.save()
    model.absent = torch.ones(4)
    saved.save()
    model.absent.mul_(float("nan"))
    assert saved.restore()
    assert torch.equal(model.absent, torch.ones(4))


def copies_of(saved: SavedBuffers, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the elements that one save copies."""
    copied: list[int] = []
    copy = torch._foreach_copy_

    def counting(targets: list[Tensor], sources: list[Tensor]) -> None:
        copied.extend(target.numel() for target in targets)
        copy(targets, sources)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", counting)
        saved.save()
    return copied


def test_a_static_large_buffer_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at a step, nor after a rollback has written it; one that changes is copied."""
    model = Statistics()
    saved = SavedBuffers(model)
    saved.follow(model)
    saved.save()
    assert LARGE not in copies_of(saved, monkeypatch)
    model.large.copy_(torch.ones(LARGE))
    saved.follow(model)
    assert LARGE not in copies_of(saved, monkeypatch)
    model.large[0] = 2.0
    saved.save()
    model.large[0] = 3.0
    assert LARGE in copies_of(saved, monkeypatch)
    assert LARGE not in copies_of(saved, monkeypatch)


def test_a_large_buffer_that_changes_for_the_first_time_cannot_be_restored() -> None:
    """That is said; all others are restored."""
    model = Statistics()
    saved = SavedBuffers(model)
    saved.follow(model)
    saved.save()
    saved.save()
    in_place(model)
    assert not saved.restore()
    assert torch.equal(model.small, torch.zeros(4))
