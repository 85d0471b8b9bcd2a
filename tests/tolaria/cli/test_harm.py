from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from faults.small_training import new_training
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.cli.chaos import Chaos, Death, Injury
from tolaria.cli.harm import Harm, death_line, harm_of
from tolaria.values.training import Position

KILLED = Death(
    Injury("rank 1", signal.SIGKILL, 0.5), 40, 0.0, "killed", 1, lost_step=41, restored_step=38, recovery_s=4.2
)


def state_of(directory: Path, *steps: int) -> Path:
    """Makes a state directory with a checkpoint of each step."""
    training = new_training()
    storage = open_storage(directory, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        for step in steps:
            training.position = Position(step, 1)
            storage.checkpoints.write(training.state().copy())
    return directory


def chaos_of(*deaths: Death, planned: int | None = None) -> Chaos:
    """Returns a chaos that is over."""
    chaos = Chaos([KILLED.injury] * (len(deaths) if planned is None else planned))
    chaos.deaths = list(deaths)
    return chaos


def examined(state_dir: Path, undisturbed_dir: Path, chaos: Chaos | None = None, failure: str = "") -> Harm:
    """Returns the harm between two directories."""
    chaos = chaos_of(KILLED) if chaos is None else chaos
    examine = partial(harm_of, seed=3, state_dir=state_dir, undisturbed_dir=undisturbed_dir, failure=failure)
    return anyio.run(examine, chaos)


def test_equal_states_have_lost_nothing(tmp_path: Path) -> None:
    """The digests are those of the last checkpoints, every checkpoint is verified, and the times are in the report."""
    harm = examined(state_of(tmp_path / "a", 10, 20), state_of(tmp_path / "b", 5, 20))
    assert harm.problems == []
    lines = harm.lines()
    assert lines[0] == "chaos, seed 3: 1 death"
    assert "from death to the first good step: median 4.2 s, longest 4.2 s; 3 steps taken again" in lines
    assert any(line.startswith("final state: step 20, digest ") and line.endswith(": equal") for line in lines)
    assert lines[-3:] == ["checkpoints: 2 verified, 0 damaged", "processes: 0 seen, none left", "nothing was lost"]
    assert harm.as_json()["digests"][0] == harm.as_json()["digests"][1]


def test_another_final_state_is_a_loss(tmp_path: Path) -> None:
    """The comparison can fail."""
    harm = examined(state_of(tmp_path / "a", 20), state_of(tmp_path / "b", 21))
    assert harm.problems == ["the final state is not that of the undisturbed run"]
    assert any(line.endswith(": NOT EQUAL") for line in harm.lines())
    assert replace(harm, rollbacks=1).problems[0].endswith("; it was rolled back, to a point that depends on time")
    assert harm.lines()[-1] == "LOST: the final state is not that of the undisturbed run"


def test_a_damaged_checkpoint_is_a_loss(tmp_path: Path) -> None:
    """Also one that is not the last."""
    directory = state_of(tmp_path / "a", 10, 20)
    shutil.rmtree(min((directory / "checkpoints").iterdir()))
    harm = examined(directory, state_of(tmp_path / "b", 20))
    assert "checkpoints: 1 verified, 1 damaged" in harm.lines()
    assert harm.problems[0].startswith("1 checkpoints or journals are damaged: 000000000010-")


def test_what_cannot_be_compared_is_no_success(tmp_path: Path) -> None:
    """No state on either side, an undisturbed run that failed, and no death at all."""
    whole = state_of(tmp_path / "a", 20)
    for directory, failure, message in [
        (tmp_path / "none", "", "it wrote no checkpoint"),
        (whole, "exit code 2", "exit code 2"),
    ]:
        harm = examined(whole, directory, failure=failure)
        assert harm.problems == [f"the undisturbed run has no final state: {message}"]
    assert (examined(tmp_path / "none", whole)).problems[0].startswith("the final state is not")
    assert "before any process was killed" in (examined(whole, whole, chaos_of(planned=2))).problems[0]


def test_a_process_that_is_left_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id is named."""
    monkeypatch.setattr("tolaria.cli.harm._ENDS_WITHIN_S", 0.1)
    whole, chaos = state_of(tmp_path / "a", 20), chaos_of(KILLED)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        chaos.tree.add(process.pid)
        harm = examined(whole, whole, chaos)
        process.kill()
    assert harm.problems == [f"processes are left: {process.pid}"]


def test_deaths_are_told_apart() -> None:
    """Unnoticed ones, those that the run did not come back from, and those that took several processes."""
    stop = Injury("rank 0", signal.SIGSTOP, 0.5)
    shown = "step 7: rank 0 got SIGSTOP: "
    assert death_line(Death(stop, 7, 0.0)) == shown + "training went on, and the service did not notice"
    assert death_line(Death(stop, 7, 0.0, "silent", 1)) == shown + "silent; there was no step after it"
    back = Death(stop, 7, 0.0, "silent", 2, restored_step=5, recovery_s=8.26)
    assert death_line(back) == shown + "silent; back at step 5 at the 2. attempt, first good step after 8.3 s"


def test_deaths_that_did_not_come_and_others_are_reported() -> None:
    """A run that was over too early is not shown as one with all deaths."""
    chaos = chaos_of(KILLED, planned=3)
    chaos.uninvited.append("it ended with\ncode 3")
    lines = Harm(chaos, 0, None, None).lines()
    assert lines[0] == "chaos, seed 0: 1 death; the run was over before 2 more"
    assert "  and one that was not part of it: it ended with code 3" in lines
