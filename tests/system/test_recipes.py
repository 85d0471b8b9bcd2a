"""The recipes of the guide run as their first lines say; the loops that they are compared with run too."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

from support.processes import serve
from support.recipes import JOBS, PAGE, RECIPES, with_table

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes recipes and loops importable as their users do, beside each other."""
    known = set(sys.modules)
    for folder in (JOBS / "loops", JOBS):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - known:
        if name in RECIPES or name.startswith(("bare_", "fabric_")):
            del sys.modules[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name: str) -> None:
    """It has fewer than 80 lines."""
    assert len((JOBS / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


SLOW: Final = ("hugging_face", "images", "language_model", "poisoned", "tasks")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    """By the command at its top, for three evaluations: the run finishes, without a rollback, and has learnt."""
    source = (JOBS / f"{name}.py").read_text(encoding="utf-8")
    shutil.copy(JOBS / f"{name}.py", tmp_path)
    command = re.search(r"^ *tolaria serve (.*)$", source, re.MULTILINE)
    assert command is not None
    given = re.findall(r"--set (\S+)", command[1])
    assert {f"training.job={name}:Job", f"training.job={name}:job"} & set(given)
    steps = ("training.steps=300", "training.evaluate_every_steps=100")
    length = steps if any("training.steps" in each for each in given) else ("training.epochs=3",)
    settings = [*given, *length, "service.exit_when_done=true"]
    with serve(*settings, cwd=tmp_path, reference_peers=True) as service:
        assert service.wait() == 0
        events = service.events()
    losses = [event["validation_loss"] for event in events if event["event"] == "epoch_finished"]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert [event["state"] for event in events if event["event"] == "run_state"] == ["running", "finished"]
    skipped = [event for event in events if event["event"] == "tolaria.step_skipped"]
    assert bool(skipped) == (name == "poisoned")
    assert not [event for event in events if event["event"] == "tolaria.rollback.completed"]


class StoppedError(Exception):
    """Ends a loop in the middle, as a kill does."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other libraries
@pytest.mark.parametrize("kind", ["bare", "fabric"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_loop_to_compare_with_does_what_the_page_says(
    name: str, kind: str, importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It evaluates, and a loop that was stopped after its first checkpoint ends bit-equal to one that was not."""
    loop: Any = importlib.import_module(f"{kind}_{name}")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    undisturbed: nn.Module = loop.train(whole, 1)
    save = loop.save

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", save_and_stop)
        with pytest.raises(StoppedError):
            loop.train(halves, 1)
    resumed: nn.Module = loop.train(halves, 1)
    assert (halves / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    pairs = zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_table_of_lines_is_that_of_the_files() -> None:
    """`python -m support.recipes` writes it."""
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page
