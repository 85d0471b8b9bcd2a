from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from support.fake_admin import FakeAdmin, fake_admin
from tolaria.cli.chaos import CHAOS_SETTINGS, DEATHS_MAX, Chaos, Injury, check_chaos, injuries_of
from tolaria.cli.client import Target
from tolaria.cli.demo import Demo
from tolaria.config import Address, Settings, load_settings
from tolaria.errors import ConfigurationError

GROUP = ["lane.mode=torchrun", "lane.processes=2"]


def settings_of(*given: str, seed: int = 0) -> Settings:
    """Returns settings that suit chaos, but for what is given."""
    return load_settings(None, ["training.deterministic=true", f"training.seed={seed}", *given])


@pytest.mark.parametrize("seed", range(20))
def test_victims_and_signals_take_turns(seed: int) -> None:
    """The agent and each rank are hit, each signal is used, and nothing twice in the same way."""
    injuries = injuries_of(settings_of(*GROUP, "training.epochs=45", seed=seed))
    assert len(injuries) == DEATHS_MAX
    assert len({(injury.victim, injury.signal) for injury in injuries}) == DEATHS_MAX
    assert {injury.victim for injury in injuries} == {"the agent", "rank 0", "rank 1"}
    assert {injury.signal for injury in injuries} == {signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP}
    shares = [injury.at for injury in injuries]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


def test_the_seed_decides_what_is_done() -> None:
    """The same seed repeats it; others differ."""
    plans = [injuries_of(settings_of(*GROUP, seed=seed)) for seed in (1, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert len(set(plans)) == 3


@pytest.mark.parametrize(("epochs", "deaths"), [(1, 1), (2, 1), (6, 3), (45, DEATHS_MAX), (10**9, DEATHS_MAX)])
def test_a_short_run_has_few_deaths(epochs: int, deaths: int) -> None:
    """One at least, and with one process it is the lane's."""
    injuries = injuries_of(settings_of(f"training.epochs={epochs}"))
    assert [injury.victim for injury in injuries] == ["the lane"] * deaths


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lane.mode=thread"], "lane.mode is thread: --chaos would kill the service itself"),
        (["training.deterministic=false"], "training.deterministic is off: --chaos compares two runs bit by bit"),
        (["checkpoint.every_epochs=0"], "--chaos compares the last checkpoints"),
        (["lane.restarts_max=1"], "lane.restarts_max is 1: --chaos needs"),
    ],
)
def test_settings_with_which_nothing_could_be_shown_are_refused(given: list[str], message: str) -> None:
    """The reason is said before anything starts."""
    with pytest.raises(ConfigurationError, match=message):
        check_chaos(settings_of(*given), stay=False, alone=False)


def test_a_state_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    """Earlier runs that an operator keeps there would be resumed, and killed."""
    check_chaos(settings_of(f"state.dir={tmp_path}"), stay=False, alone=False)
    (tmp_path / "journal.sqlite3").touch()
    with pytest.raises(ConfigurationError, match=r"holds earlier runs; --chaos needs an empty directory"):
        check_chaos(settings_of(f"state.dir={tmp_path}"), stay=False, alone=False)


def test_all_reasons_are_said_at_once() -> None:
    """Options and settings."""
    with pytest.raises(ConfigurationError) as caught:
        check_chaos(settings_of("lane.mode=thread"), stay=True, alone=True)
    assert all(word in str(caught.value) for word in ("--stay", "--alone", "lane.mode"))


def plan_of(*overrides: str, ranks: int | None = None, chaos: bool = True) -> Demo:
    """Returns a planned demo."""
    return Demo.plan(None, overrides, epochs=None, stay=False, as_json=False, ranks=ranks, chaos=chaos)


@pytest.mark.parametrize(("ranks", "mode"), [(1, "process"), (2, "torchrun"), (16, "torchrun")])
def test_ranks_decide_the_mode_of_the_lane(ranks: int, mode: str) -> None:
    """One is the process that there is without the option; the option wins over settings, as --epochs does."""
    settings = plan_of("lane.mode=thread", "lane.processes=7", ranks=ranks).settings
    assert (settings.lane.mode, settings.lane.processes) == (mode, ranks)
    assert (settings.training.device, settings.training.threads) == ("cpu", 1)


def test_settings_of_ranks_and_chaos_can_be_overridden() -> None:
    """Each value that is given stays; without the options nothing changes."""
    given = plan_of("training.threads=2", "rollback.every_steps=7", "training.epochs=9", ranks=2).settings
    assert (given.training.threads, given.rollback.every_steps, given.training.epochs) == (2, 7, 9)
    plain = plan_of(chaos=False)
    assert plain.injuries == ()
    assert plain.compare
    assert "every_steps" not in plain.settings.rollback.model_fields_set
    assert plain.settings.lane.model_fields_set == set()


def test_the_corrupt_shard_of_chaos_is_skipped() -> None:
    """A rollback would go to a point that depends on time, so that two runs could differ without any death."""
    options = plan_of(chaos=False).settings.training.options
    assert plan_of().settings.training.options == {**options, "poison": "nan"}
    own = plan_of("training.options.width=4").settings.training.options
    assert own == {"width": 4}


def test_another_job_is_made_deterministic() -> None:
    """Chaos compares it with itself, undisturbed, although it has no comparison without seeds."""
    plan = plan_of("training.job=mine:job", ranks=2)
    assert plan.settings.training.deterministic
    assert plan.settings.emergency.heartbeat_timeout_s == CHAOS_SETTINGS["emergency.heartbeat_timeout_s"]
    assert plan.injuries
    assert not plan.compare


def status_at(step: int, state: RunState.ValueType = RunState.RUN_STATE_RUNNING) -> GetStatusResponse:
    """Returns a status of a run of ten epochs of ten steps."""
    return GetStatusResponse(state=state, global_step=step, epochs=10, steps_per_epoch=10)


@pytest.mark.anyio
async def test_a_process_is_killed_when_it_is_due_and_its_recovery_is_timed(
    serve_fake: Callable[[FakeAdmin], str],
) -> None:
    """Not before; the first step after the restored one ends the recovery, and the next injury follows only then."""
    chaos = Chaos([Injury("the lane", signal.SIGKILL, 0.2), Injury("the lane", signal.SIGKILL, 0.3)])
    admin = fake_admin([status_at(10)])
    target = Target(Address.parse(serve_fake(admin)), 5.0)
    process = await anyio.open_process([sys.executable, "-c", "import time; time.sleep(600)"])
    chaos.on_entry({"event": "lane_started", "pid": process.pid, "generation": 1})
    async with process, chaos.inflicted(process.pid, target):
        await anyio.sleep(0.3)
        assert process.returncode is None
        admin.statuses.append(status_at(40))
        with anyio.fail_after(180):
            assert await process.wait() == -signal.SIGKILL
        chaos.on_entry({"event": "tolaria.lane_lost", "cause": "killed", "step": 41, "detail": "it was killed"})
        chaos.on_entry({"event": "tolaria.lane_recovered", "step": 38})
        admin.statuses.append(status_at(38))
        await anyio.sleep(0.3)
        assert [death.recovery_s for death in chaos.deaths] == [None]
        admin.statuses.append(status_at(39))
        with anyio.fail_after(180):
            while chaos.deaths[0].recovery_s is None:
                await anyio.sleep(0.02)
    (death,) = chaos.deaths[:1]
    assert (death.step, death.cause, death.restored_step, death.repeated) == (40, "killed", 38, 3)
    assert 0.3 < (death.recovery_s or 0) < 60
    assert chaos.uninvited == []


def test_a_death_that_chaos_did_not_cause_is_recorded() -> None:
    """The report names it."""
    chaos = Chaos([])
    chaos.on_entry({"event": "tolaria.lane_lost", "cause": "exited", "step": 1, "detail": "it ended with code 3"})
    chaos.on_entry({"event": "tolaria.lane_recovered", "step": 0})
    chaos.on_entry({"event": "another"})
    assert chaos.uninvited == ["it ended with code 3"]
    assert chaos.deaths == []


def test_help_starts_nothing() -> None:
    """--help wins over everything beside it."""
    command = [sys.executable, "-m", "tolaria", "demo", "--ranks", "2", "--chaos", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "200"}, timeout=180)
    assert done.returncode == 0
    assert "--chaos" in done.stdout
    assert "starting" not in done.stdout
