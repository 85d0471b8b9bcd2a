from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import python_path


@pytest.mark.slow
@pytest.mark.timeout(4500)
def test_peers_that_fail_at_random_change_nothing(request: pytest.FixtureRequest) -> None:
    """Killed, frozen, restarted, late, hanging and lying: the last digest is that of a run with working peers.

    The trial itself makes every fault reach the service first, which takes a minute, and counts what the service saw.
    """
    seconds = 900 if request.config.getoption("--long") else 15
    script = Path(__file__).with_name("peer_chaos.py")
    found = subprocess.run(
        [sys.executable, script, "--minutes", str(seconds / 60)],
        capture_output=True,
        text=True,
        timeout=1200 + 3 * seconds,
        check=False,
        env={"PYTHONPATH": python_path()},
    )
    assert (found.returncode, found.stderr) == (0, ""), found.stdout + found.stderr
