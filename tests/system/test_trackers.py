"""A real service with TensorBoard and with a tracker that fails, rolled back, killed and resumed."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.bad_trackers import installed_in
from support.processes import is_alive, serve, status, stub_of
from support.waiting import wait_for
from tolaria.trackers.records import surviving_points

STEPS, EPOCHS = 8, 32
SETTINGS = [
    "training.job=support.metric_jobs:UnhurriedJob",
    "training.options.optimizer=AdamW",
    "training.device=cpu",
    "training.deterministic=true",
    f"training.epochs={EPOCHS}",
    "preset=plain",
    "service.exit_when_done=true",
    "rollback.every_steps=4",
    "checkpoint.every_steps=8",
    "tracking.trackers=tensorboard,raising",
    "tracking.every_steps=1",
    "tracking.close_s=25",
]
LAST = STEPS * EPOCHS


@dataclass
class Ended:
    """What a run has left."""

    metrics: Path
    tensorboard: Path
    log: list[dict[str, Any]]
    exit_code: int
    left: list[int]
    page: dict[str, Any]
    """The first frame of the status page after the kill."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Rolls a run back, kills its service, and lets another one finish it."""
    directory = tmp_path_factory.mktemp("run")
    installed_in(directory / "plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory / "plugins"))
        with serve(*SETTINGS, cwd=directory) as service, stub_of(service) as stub:
            wait_for(lambda: status(stub).global_step > 60)
            request = admin.TriggerRollbackRequest(request_id="r", tier=ROLLBACK_TIER_FAST, reason="to see it")
            restored = stub.TriggerRollback(request, timeout=180).restored_step
            wait_for(lambda: status(stub).global_step > restored + 20)
            log, children = service.events(), service.children()
            service.process.kill()
        with serve(*SETTINGS, cwd=directory) as service:
            children += service.children()
            page = first_frame(service.addresses()[1])
            code = service.wait()
            log += service.events()
        wait_for(lambda: not any(map(is_alive, children)))
    state = directory / "state"
    (folder,) = (state / "trackers" / "tensorboard").iterdir()
    return Ended(state / "metrics", folder, log, code, [pid for pid in children if is_alive(pid)], page)


def first_frame(address: str) -> dict[str, Any]:
    """Opens the status page; returns all that it shows at first."""
    with urllib.request.urlopen(f"http://{address}/page/events", timeout=180) as stream:
        line = next(line for line in stream if line.startswith(b"data:"))
    found: dict[str, Any] = json.loads(line.removeprefix(b"data:"))
    return found


def curve(ended: Ended, name: str) -> list[tuple[int, Any]]:
    """The surviving values of a metric in the log."""
    found = [(each.global_step, each.values[name]) for each in surviving_points(ended.metrics) if name in each.values]
    return [(step, pytest.approx(value, rel=1e-5)) for step, value in found]


@pytest.mark.slow
def test_the_curves_of_the_status_page_go_on_after_a_restart(ended: Ended) -> None:
    """The service that took the run over shows the losses of the one before, without the steps that were undone."""
    points = ended.page["curves"]["loss"]["points"]
    known = dict(curve(ended, "train/loss"))
    assert points[0][0] == 1
    assert len(points) > 40
    assert [point[4] for point in points if point[0] == point[1]] == [
        known[point[0]] for point in points if point[0] == point[1]
    ]
    assert ended.page["curves"]["validation_loss"]["points"][0][0] == STEPS


def test_the_log_has_every_surviving_step_once(ended: Ended) -> None:
    """Of a run that was rolled back and killed; evaluations too, and what the job logs.

    A kill costs the last points that had not been written, at most.
    """
    points = surviving_points(ended.metrics)
    losses = [each for each in points if "train/loss" in each.values]
    assert ended.exit_code == 0
    steps = [each.global_step for each in losses]
    assert steps == sorted(set(steps))
    assert steps[-1] == LAST
    lost = sorted({*range(1, LAST + 1)} - {*steps})  # at the kill, what had not been written yet
    assert len(lost) <= STEPS
    assert lost == list(range(lost[0], lost[-1] + 1)) if lost else True
    evaluated = [step for step, _ in curve(ended, "validation/loss")]
    assert len({*range(STEPS, LAST + 1, STEPS)} - {*evaluated}) <= 1
    assert evaluated == sorted(set(evaluated))
    attempts = [each.attempt for each in losses]
    assert attempts == sorted(attempts)
    assert len(set(attempts)) >= 2
    assert {"train/learning_rate", "train/thirds", "train/gradient_norm"} <= {name for p in points for name in p.values}
    text = (ended.metrics / "metrics-000001.jsonl").read_text()
    kinds = [json.loads(line)["kind"] for line in text.splitlines()]
    assert kinds.count("run") == 2
    assert kinds.count("rewind") >= 1
    assert kinds[-1] == "end"
    assert "to see it" in text


def test_tensorboard_shows_the_same_curves(ended: Ended) -> None:
    """Read by its own package: only surviving steps, each once, and annotations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ended.tensorboard), {"scalars": 0}).Reload()
    for name in ("train/loss", "validation/loss", "validation/accuracy", "lr/host"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == curve(ended, name), name
    attempts = [event.value for event in events.Scalars("attempt")]
    assert len(attempts) == len([each for each in surviving_points(ended.metrics) if "train/loss" in each.values])
    texts = EventAccumulator(str(ended.tensorboard / "annotations")).Reload().Tensors("annotations/text_summary")
    assert any(b"rolled back to step" in text.tensor_proto.string_val[0] for text in texts)


def test_a_tracker_that_fails_is_named_and_costs_nothing_else(ended: Ended) -> None:
    """One event in each process at most; the run finishes, and no process is left."""
    failed = [line for line in ended.log if line["event"] == "tolaria.tracker_failed"]
    assert {line["tracker"] for line in failed} == {"raising"}
    assert len(failed) <= 2
    assert all("the tracking server is away" in line["detail"] for line in failed)
    assert not [line for line in ended.log if line["event"] == "tolaria.lane_lost"]
    assert ended.left == []
