"""`TrainedFlags`: which parameters of the host are trained, and when a rolled-back run sets them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from pydantic import JsonValue
from torch import nn

from tolaria.seeds.slots import parameters_by_owner
from tolaria.values.training import HOST


class TrainedFlags:
    """Which parameters of the host are trained (`requires_grad`), as a part of the state; a seed's follow its stage.

    The state has those that the job has frozen or unfrozen since it built the model: where its code has changed
    meanwhile, a resumed run has what the code builds now.

    A job without `state_dict` that counts passes does not repeat after a rollback what it does once. So the flags that
    the run had are set again at the step from which it went back, unless the job has set them by then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._host = parameters_by_owner(model)[HOST]
        self._built = self.now()
        self._restored: dict[str, bool] = {}
        self._due: dict[str, bool] = {}
        self._due_step = 0

    def now(self) -> dict[str, bool]:
        """Returns the present flags by name."""
        return {name: parameter.requires_grad for name, parameter in self._host}

    def state_dict(self) -> dict[str, JsonValue]:
        """Returns the names of the changed parameters in the model's order."""
        built, restored = self._built, self._restored
        changed = {name: on for name, on in self.now().items() if on != built[name] or on is restored.get(name)}
        return {"frozen": [n for n, on in changed.items() if not on], "trained": [n for n, on in changed.items() if on]}

    def load_state_dict(self, state: Mapping[str, JsonValue]) -> None:
        """Restores what `state_dict` returned. Raises KeyError or TypeError, and is then unchanged."""
        frozen, trained = cast("list[str]", state["frozen"]), cast("list[str]", state["trained"])
        self._restored = dict.fromkeys(frozen, False) | dict.fromkeys(trained, True)
        self._set(self._built | self._restored)

    def rolled_back(self, before: Mapping[str, bool], *, from_step: int, to_step: int) -> None:
        """Notes the flags that the run had at `from_step`, for `step_begins`."""
        due_step = max(from_step, self._due_step if self._due else 0)
        due = {**(before if to_step < from_step else {}), **self._due} if to_step < due_step else {}
        now = self.now()
        self._due = {name: on for name, on in due.items() if now[name] != on}
        self._due_step = due_step

    def step_begins(self, global_step: int) -> None:
        """Sets the flags that are due at this step."""
        if self._due and global_step >= self._due_step:
            self._set(self._due)
            self._due = {}

    def _set(self, flags: Mapping[str, bool]) -> None:
        for name, parameter in self._host:
            if parameter.requires_grad != flags.get(name, parameter.requires_grad):
                parameter.requires_grad_(flags[name])
