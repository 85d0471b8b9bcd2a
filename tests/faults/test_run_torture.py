from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import python_path


@pytest.mark.slow
def test_a_killed_run_loses_no_reported_checkpoint(request: pytest.FixtureRequest) -> None:
    """SIGKILL during checkpoints, rollbacks and rebuilds: the run is resumed from an intact, new enough state."""
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
