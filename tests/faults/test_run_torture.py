from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import python_path


def test_kills_of_a_run_lose_nothing_reported(request: pytest.FixtureRequest) -> None:
    """SIGKILL while checkpoints, rollbacks and rebuilds go on: each time the run comes back, whole, where it must."""
    kills = 100 if request.config.getoption("--long") else 5
    script = Path(__file__).with_name("run_torture.py")
    found = subprocess.run(
        [sys.executable, script, "--kills", str(kills)],
        capture_output=True,
        text=True,
        timeout=60 + 10 * kills,
        check=False,
        env={"PYTHONPATH": python_path()},
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout + found.stderr
