"""Upgrades, downgrades, backups and restorations under SIGKILL, failing system calls and losses of power."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faults.interrupted import ACTIONS
from support.processes import python_path

HERE = Path(__file__).parent
SHORT_RUNS = 5
"""Interruptions of each kind in the short form; `--long` interrupts every call."""


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library that interrupts system calls."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc, of the package gcc) on this machine")
    library = tmp_path_factory.mktemp("syscalls") / "syscalls.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", str(HERE / "syscalls.c")]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    return library


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_an_interruption_loses_nothing(action: str, preloaded: Path, request: pytest.FixtureRequest) -> None:
    """Before any call that changes a file: killed, or this call fails, or it and all later ones do."""
    runs = 0 if request.config.getoption("--long") else SHORT_RUNS
    found = subprocess.run(
        [sys.executable, HERE / "interrupted.py", action, str(runs), "kill", "fail", "fail-for-good"],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
        env={"PYTHONPATH": python_path(), "LD_PRELOAD": str(preloaded), "PATH": os.environ["PATH"]},
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout + found.stderr
    assert int(found.stdout.split()[0]) > 40  # calls that could be interrupted


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_a_loss_of_power_loses_nothing(action: str, preloaded: Path, request: pytest.FixtureRequest) -> None:
    """After any call, whether the disk has nothing of what was not flushed, or only names, or only contents of it."""
    runs = 0 if request.config.getoption("--long") else SHORT_RUNS
    found = subprocess.run(
        [sys.executable, HERE / "power_loss.py", action, str(runs)],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
        env={"PYTHONPATH": python_path(), "LD_PRELOAD": str(preloaded), "PATH": os.environ["PATH"]},
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout + found.stderr
    calls, directories = (int(word) for word in found.stdout.split() if word.isdigit())
    assert calls > 40
    assert directories > 20
