from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leyline.v1.commands_pb2 import AdaptationCommand
from support.runs import FakePeers, RunUnderTest, new_run
from support.settings_holders import stale_holders
from tolaria.config import Settings, is_live
from tolaria.errors import CommandRejectedError, ConfigurationError
from tolaria.resilience.breaker import Breaker
from tolaria.resilience.deadline import DeadlineCaller
from tolaria.service.protection import Protection, protected
from tolaria.service.reload import Reload
from tolaria.telemetry.metrics import Metrics
from tolaria.transport.process_lane import ProcessLane

pytestmark = pytest.mark.anyio


class Reloading:
    """The parts of a service that is not started, and the settings that it reads again."""

    def __init__(self, folder: Path) -> None:
        self.run: RunUnderTest = new_run(FakePeers(), sections={"state": {"dir": str(folder)}})
        self.settings = self.run.core.foundation.settings
        self.metrics = Metrics()
        self.protection: Protection = protected(self.settings, self.metrics)
        self.live = self.run.service.live
        self.callers = {
            peer: DeadlineCaller(peer, Breaker(peer, clock=time.monotonic), section, observe=lambda _record: None)
            for peer, section in (("tamiyo", self.settings.tamiyo), ("kasmina", self.settings.kasmina))
        }
        self.wanted: Settings = self.settings
        self.reread: Callable[[], Settings] = lambda: self.wanted
        self.reload = Reload(
            self.settings, self.read_sources, self.protection, self.run.emitter, metrics=self.metrics, run_id="run"
        )
        self.reload.parts = self.live

    def read_sources(self) -> Settings:
        """Returns what the test says."""
        return self.reread()

    def want(self, name: str, value: Any) -> None:
        """Writes a setting into the file."""
        section, _, field = name.partition(".")
        sections = {key: part.model_dump() for key, part in self.settings}
        sections[section][field] = value
        self.wanted = Settings.model_validate(sections)


@pytest.fixture
def it(tmp_path: Path) -> Reloading:
    """A service that is not started."""
    return Reloading(tmp_path / "state")


Probe = Callable[[Reloading], Any]

USED: dict[str, tuple[Any, Probe]] = {
    "service.exit_code_drained": (9, lambda it: it.reload.in_force.service.exit_code_drained),
    "metrics.connections_max": (9, lambda it: it.protection.guard.connections_max),
    "telemetry.queue_packets": (99, lambda it: it.run.core.telemetry.settings.queue_packets),
    "telemetry.subscribers_max": (9, lambda it: it.run.core.telemetry.settings.subscribers_max),
    "tamiyo.timeout_s": (1.5, lambda it: it.callers["tamiyo"].settings.timeout_s),
    "tamiyo.timeouts_s": ({"EvaluateStep": 0.5}, lambda it: it.callers["tamiyo"].settings.timeouts_s),
    "tamiyo.retries": (3, lambda it: it.callers["tamiyo"].settings.retries),
    "kasmina.timeout_s": (3.5, lambda it: (it.live.boundary.policy.patience_s - 2.0 - 1.0) / 2),
    "kasmina.timeouts_s": ({"ApplyCommand": 0.5}, lambda it: it.callers["kasmina"].settings.timeouts_s),
    "kasmina.retries": (3, lambda it: it.callers["kasmina"].settings.retries),
    "control.boundary_budget_ms": (3000.0, lambda it: it.live.boundary.policy.budget_s * 1000),
    "control.tamiyo_budget_ms": (9.0, lambda it: it.live.boundary.policy.tamiyo_s * 1000),
    "control.boundary_slack_ms": (7.0, lambda it: it.live.boundary.policy.slack_s * 1000),
    "control.hook_budget_ms": (9.0, lambda it: it.live.questions.control.hook_budget_ms),
    "control.step_interval": (9, lambda it: it.live.questions.control.step_interval),
    "gradients.compact": (True, lambda it: it.run.core.seed_telemetry.settings.compact),
    "gradients.share_jump": (0.9, lambda it: it.run.core.seed_telemetry.settings.share_jump),
    "gradients.seed_conflict": (0.9, lambda it: it.run.core.seed_telemetry.settings.seed_conflict),
    "gradients.conflict": (0.9, lambda it: it.run.core.seed_telemetry.settings.conflict),
    "rollback.fast_budget_s": (0.9, lambda it: it.live.coordinator.settings.fast_budget_s),
    "rollback.full_budget_s": (9.0, lambda it: it.live.coordinator.settings.full_budget_s),
    "rollback.automatic": (True, lambda it: it.run.health.settings.automatic),
    "rollback.accuracy_drop": (0.9, lambda it: it.run.health.settings.accuracy_drop),
    "rollback.automatic_max": (9, lambda it: it.run.health.settings.automatic_max),
    "rollback.per_steps": (9, lambda it: it.run.health.settings.per_steps),
    "rollback.lr_cut": (0.9, lambda it: it.run.health.settings.lr_cut),
    "rollback.lr_cut_steps": (9, lambda it: it.run.health.settings.lr_cut_steps),
    "rollback.progress_rollbacks_max": (9, lambda it: it.run.health.settings.progress_rollbacks_max),
    "checkpoint.every_epochs": (9, lambda it: it.run.checkpointing.settings.every_epochs),
    "checkpoint.every_steps": (9, lambda it: it.run.checkpointing.settings.every_steps),
    "checkpoint.keep_last": (9, lambda it: it.run.storage.checkpoints.retention.last),
    "checkpoint.keep_superseded": (9, lambda it: it.run.storage.checkpoints.retention.superseded),
    "checkpoint.keep_superseded_s": (9.0, lambda it: it.run.storage.checkpoints.retention.superseded_s),
    "checkpoint.on_failure": ("continue", lambda it: it.run.checkpointing.settings.on_failure),
    "checkpoint.retry_s": (9.0, lambda it: it.run.checkpointing.settings.retry_s),
    "profiler.active_steps": (9, lambda it: it.live.profiles.settings.active_steps),
    "profiler.every_steps": (9, lambda it: it.live.profiles.settings.every_steps),
}
"""A new value of each live setting, and what the part that uses it has then; the others have tests below."""

BELOW = {
    *(f"server.{name}" for name in ("calls_per_second", "bad_calls_per_second", "calls_in_flight_max", "streams_max")),
    *("logging.level", "leyline.secret", "leyline.previous_secret", "leyline.freshness_s"),
    *("lane.restarts_max", "lane.restarts_within_s"),
}


WHOLE = {
    *(
        "Foundation.settings",
        "BuiltLane.settings",
        "LaneProcess._settings",
        "SpareLane._lane",
    ),  # what parts were, and lanes are, built from
    *("TrainingRun._settings", "GradientMerger._settings"),  # read nothing that is live
    "TrackingTelemetry._settings",  # tells trackers the settings that the run has begun with
}
"""Attributes that keep the settings of the start. Whoever adds one says why no live setting is read from it."""


async def test_no_other_part_keeps_settings_of_before_a_reload(it: Reloading) -> None:
    """Those of a group of machines included: a part that the reload forgets is found by what it refers to."""
    group = {"lane": {"mode": "torchrun", "nodes": "1:2", "rendezvous": "127.0.0.1:29400", "secret_file": "secret"}}
    it.run.core.process = lane = ProcessLane(Settings.model_validate(group))
    sections = {name: part.model_dump() for name, part in it.settings}
    changes = {name: value for name, (value, _) in USED.items()}
    changes |= {"server.streams_max": 9, "leyline.freshness_s": 9.0, "lane.restarts_within_s": 9.0}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        sections[section][field] = value
    it.wanted = Settings.model_validate(sections)
    await it.reload.carry_out("test")
    assert stale_holders((it.run, it.reload, lane), it.wanted) == WHOLE
    assert lane.settings is it.reload.in_force.lane


def test_each_live_setting_has_a_case() -> None:
    """So that none is called live that no part takes."""
    live = {
        f"{name}.{field}"
        for name, section in Settings()
        for field in type(section).model_fields
        if is_live(type(section), field)
    }
    assert live == USED.keys() | BELOW


async def test_parts_use_each_live_setting_after_the_reload(it: Reloading) -> None:
    """And only then; the answer names it, with both values, and nothing waits for a restart."""
    it.live.callers.update(it.callers)  # type: ignore[attr-defined] # of a service whose peers are connected
    for name, (value, probe) in USED.items():
        assert probe(it) != value, name
        it.want(name, value)
        answer = await it.reload.carry_out("test")
        assert [change.name for change in answer.changed] == [name]
        assert json.loads(answer.changed[0].after) == value
        assert probe(it) == pytest.approx(value), name
        assert not answer.waiting
        it.want(name, it.settings.model_dump()[name.partition(".")[0]][name.partition(".")[2]])
        await it.reload.carry_out("test")
        assert probe(it) != value, name


async def test_callers_are_held_to_new_limits_at_once(it: Reloading) -> None:
    """Also those that are known already."""
    usage = it.protection.limits.usage("token a")
    assert it.protection.limits.refusal(usage, stream=False) == ""
    for name, stream in (("calls_in_flight_max", False), ("streams_max", True)):
        it.want(f"server.{name}", 1)
        await it.reload.carry_out("test")
        usage.in_flight = usage.streams = 1
        assert name in it.protection.limits.refusal(usage, stream=stream)
        usage.in_flight = usage.streams = 0
    it.want("server.calls_per_second", 0.5)
    await it.reload.carry_out("test")
    assert it.protection.limits.refusal(usage, stream=False) == ""  # the burst of one
    assert "calls_per_second" in it.protection.limits.refusal(usage, stream=False)
    it.want("server.bad_calls_per_second", 0.1)
    await it.reload.carry_out("test")
    it.protection.limits.mistake(usage)
    assert it.protection.limits.must_wait(usage)


async def test_commands_are_verified_by_the_new_secrets(it: Reloading) -> None:
    """The rotation of a key without an outage: the old one is accepted until it is removed."""

    def refusal() -> str:
        command = AdaptationCommand(command_id="c")
        try:
            it.live.verifier.verify(command, wall_s=0.0, now_s=0.0)
        except CommandRejectedError as error:
            return error.reason
        return ""

    assert refusal() != "unsigned"
    it.want("leyline.secret", "new")
    answer = await it.reload.carry_out("test")
    assert refusal() == "unsigned"
    assert "new" not in str(answer)


async def test_a_wrong_file_changes_nothing(it: Reloading) -> None:
    """Neither one that does not parse nor one that the service would not start with."""

    def broken() -> Settings:
        raise ConfigurationError(["checkpoint.keep_last: input should be a valid integer (tolaria.toml)"])

    it.reread = broken
    with pytest.raises(ConfigurationError, match=r"checkpoint\.keep_last"):
        await it.reload.carry_out("SIGHUP")
    it.reread = lambda: it.wanted
    it.want("server.listen", "0.0.0.0:50051")
    with pytest.raises(ConfigurationError, match=r"server\.listen"):
        await it.reload.carry_out("SIGHUP")
    assert it.reload.in_force is it.settings
    assert it.run.emitter.names == ["tolaria.config_reload_failed"] * 2


async def test_a_metric_says_whether_the_last_reload_succeeded(it: Reloading) -> None:
    """1 from the start on, 0 after one that failed, 1 after the next one that changes nothing or something."""

    def successful() -> float | None:
        return it.metrics.registry.get_sample_value("tolaria.config.last_reload_successful")

    assert successful() == 1
    it.want("server.listen", "0.0.0.0:50051")
    for _ in range(2):
        with pytest.raises(ConfigurationError):
            await it.reload.carry_out("SIGHUP")
        assert successful() == 0
    it.wanted = it.settings
    await it.reload.carry_out("SIGHUP")
    assert successful() == 1


async def test_what_waits_for_a_restart_is_named_until_then(it: Reloading) -> None:
    """By every reload; what has been taken is not named again."""
    it.want("training.epochs", 99)
    sections = {name: part.model_dump() for name, part in it.wanted}
    sections["checkpoint"]["keep_last"] = 9
    it.wanted = Settings.model_validate(sections)
    first = await it.reload.carry_out("test")
    second = await it.reload.carry_out("test")
    assert [change.name for change in first.changed] == ["checkpoint.keep_last"]
    assert not second.changed
    assert (
        [change.name for change in first.waiting] == [change.name for change in second.waiting] == ["training.epochs"]
    )
    assert it.run.status.epochs != 99
    recorded = json.loads((Path(it.settings.state.dir) / "settings.json").read_text())["settings"]
    assert (recorded["checkpoint"]["keep_last"], recorded["training"]["epochs"]) == (9, it.settings.training.epochs)
