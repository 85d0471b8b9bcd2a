"""`SavedBuffers`: the buffers of a model before a step, so that a skipped step changes none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from tolaria.tensors import whole

_SMALL_BYTES: Final = 2**16
"""Size up to which a buffer is copied before every step, which is cheaper than to find out whether it changes."""


@dataclass(slots=True)
class _Saved:
    """One registered buffer: the tensor at the last save, its version counter, and a copy of that version, if any.

    `changes`: whether it has been seen to change in place.
    """

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None = None
    version: int = 0
    copy: Tensor | None = None
    changes: bool = False

    @property
    def small(self) -> bool:
        """Whether it is copied before every step."""
        return self.tensor is not None and self.tensor.nbytes <= _SMALL_BYTES

    def note_change(self) -> bool:
        """Returns whether the saved tensor has changed in place since."""
        changed = self.tensor is not None and self.tensor._version != self.version  # noqa: SLF001 - torch's counter of changes in place has no public name
        self.changes = self.changes or changed
        return changed

    def adopt(self, tensor: Tensor | None, *, keep: bool) -> None:
        """Takes a tensor that was assigned to the buffer, and copies it if it is small or `keep` is set."""
        self.tensor, self.copy = tensor, None
        if tensor is not None:
            self.version = tensor._version  # noqa: SLF001 - see above
            if keep or self.small:
                self.copy = whole(tensor).detach().clone()


class SavedBuffers:
    """Saves and restores the buffers of a model; also those that the model assigns anew instead of changing them.

    The first save copies all of them. From then on large ones are copied only after they have changed, so that a
    static one costs neither time nor memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [_Saved(owner, name) for owner, name in _registered(model)]
        self._first = True

    def follow(self, model: nn.Module) -> None:
        """Adapts to a model whose modules or whose state have been changed between two steps."""
        known = {(id(saved.owner), saved.name): saved for saved in self._saved}
        self._saved = [known.get((id(owner), name)) or _Saved(owner, name) for owner, name in _registered(model)]
        for saved in self._saved:
            saved.adopt(saved.owner[saved.name], keep=saved.changes)

    def save(self) -> None:
        """Saves the buffers. Does not synchronise."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for saved in self._saved:
            tensor = saved.owner[saved.name]
            if self._first or tensor is not saved.tensor:
                saved.note_change()
                saved.adopt(tensor, keep=self._first or saved.changes)
            elif tensor is not None:
                changed, saved.version = saved.note_change(), tensor._version  # noqa: SLF001 - see above
                if saved.copy is None and changed:
                    saved.adopt(tensor, keep=True)
                elif saved.copy is not None and (changed or saved.small):
                    targets.append(saved.copy)
                    sources.append(whole(tensor))
                elif not saved.changes:
                    saved.copy = None  # of the first save
        self._first = False
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)

    def restore(self) -> bool:
        """Restores the saved buffers; returns False if a large one that had never changed before cannot be."""
        wanted: list[tuple[_Saved, Tensor]] = []
        for saved in self._saved if not self._first else ():
            tensor = saved.owner[saved.name] = saved.tensor
            if tensor is None:
                continue
            if saved.note_change() or saved.small:
                wanted.append((saved, tensor))
        copied = [(whole(tensor).detach(), saved.copy) for saved, tensor in wanted if saved.copy is not None]
        if copied:
            with torch.no_grad():
                torch._foreach_copy_([target for target, _ in copied], [copy for _, copy in copied])
        for saved, tensor in wanted:
            saved.version = tensor._version  # noqa: SLF001 - see above
        return len(copied) == len(wanted)


def _registered(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str]]:
    """Yields each registered buffer as the dictionary of its module, and its name there."""
    for module in model.modules():
        owner = module._buffers  # noqa: SLF001 - the only access that shows which module assigns a buffer anew
        for name in owner:
            yield owner, name
