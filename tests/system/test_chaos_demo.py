"""The real demo with chaos: what an operator who has never seen it would try.

They train on one process and on two, expect that nothing is lost and that the exit code says so, and press Ctrl-C in
the middle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.processes import python_path
from support.waiting import wait_for
from tolaria.cli.process_tree import ProcessTree
from tolaria.ranks.local_ranks import ranks_of


@contextmanager
def demo(*options: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs the demo with chaos; kills it at the end if it is still running."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOLARIA_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tolaria", "demo", "--chaos", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def report_of(cwd: Path, *options: str) -> dict[str, Any]:
    """Returns what the demo reports about chaos; everything else is checked to have succeeded."""
    with demo("--json", *options, cwd=cwd) as process:
        out, err = process.communicate(timeout=420)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)["chaos"]
    assert "nothing was lost" in err
    return found


@pytest.fixture
def bystanders() -> Iterator[list[int]]:
    """Processes with the names of ranks and agents, which belong to somebody else."""
    others = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", name], env={**os.environ, "RANK": "1"})
        for name in ("tolaria.lane.rank", "tolaria.ranks.agent", "tolaria.lane")
    ]
    yield [other.pid for other in others]
    for other in others:
        other.kill()
        other.wait(10)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_is_lost(ranks: int, bystanders: list[int], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The final state is that of the undisturbed run, bit by bit; with --long in a whole demo, else after one death.

    Only processes of the demo are killed.
    """
    whole = request.config.getoption("--long")
    found = report_of(tmp_path, f"--ranks={ranks}", *([] if whole else ["--epochs=2", "--set=training.seed=1"]))
    assert found["lost"] == []
    assert found["digests"][0]
    assert found["digests"][0] == found["digests"][1]
    assert len(found["deaths"]) == found["planned"] == (4 if whole else 1)
    assert all(death["recovery_s"] > 0 for death in found["deaths"])
    assert 0 < found["recovery_s_median"] <= found["recovery_s_max"]
    assert found["checkpoints_verified"] >= 2
    assert (found["checkpoints_damaged"], found["processes_left"]) == (0, 0)
    assert all(Path(f"/proc/{pid}/stat").read_text().split()[2] in "SR" for pid in bystanders)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ctrl_c_in_the_middle_leaves_no_process(tmp_path: Path) -> None:
    """Also while a rank is stopped, which cannot be asked to end."""
    with demo("--ranks=2", "--epochs=60", cwd=tmp_path) as process:
        assert process.stdout is not None
        assert any("state running" in line for line in process.stdout), process.communicate()
        tree = ProcessTree()
        tree.add(process.pid)
        running = tree.running()
        ranks = [ranks_of(pid) for pid in running if ranks_of(pid)]
        assert ranks
        assert len(running) > 8
        os.kill(ranks[0][1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "ended by SIGINT" in err
    wait_for(lambda: tree.running() == ())
