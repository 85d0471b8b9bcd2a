"""A real service that trains with a scheduler, an average of the weights and callbacks, and is disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL
from support.processes import Serve, serve, status, stub_of
from support.runs_on_disk import last_checkpoint
from support.waiting import wait_for
from tolaria.checkpoint.directory import JOURNAL
from tolaria.journal.reader import read_journal
from tolaria.journal.rows import STOPPED_EARLY, CommandRow

SETTINGS: Final = [
    "preset=plain",
    "training.job=support.practice_jobs:Practised",
    "training.device=cpu",
    "training.threads=1",
    "training.deterministic=true",
    "training.epochs=6",
    "training.options.samples=320",
    "ema.decay=0.9",
    "checkpoint.best=ema/loss:min",
]


def losses_of(service: Serve) -> list[object]:
    """The log's figures of each finished epoch, the last ones of those that were repeated."""
    found = {str(line["epoch"]): line["metrics"] for line in service.events() if line["event"] == "epoch_finished"}
    return list(found.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_and_rollbacks_of_both_tiers_change_nothing(tmp_path: Path) -> None:
    """The last checkpoint has the digest of a run without them: of weights, scheduler, average and callbacks."""
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    with serve(*SETTINGS, "service.exit_when_done=true", cwd=tmp_path / "undisturbed") as service:
        assert service.wait() == 0
        expected = losses_of(service)
    slow = ["training.options.at=90", "training.options.step_s=0.02", "service.exit_when_done=true"]
    with serve(*SETTINGS, *slow, cwd=tmp_path / "disturbed") as service, stub_of(service) as stub:
        wait_for(lambda: any(line["event"] == "tolaria.lane_recovered" for line in service.events()))
        wait_for(lambda: status(stub).global_step > 120)
        for number, tier in enumerate((ROLLBACK_TIER_FAST, ROLLBACK_TIER_FULL)):
            request = admin.TriggerRollbackRequest(request_id=str(number), reason="test", tier=tier)
            answer = stub.TriggerRollback(request, timeout=180)
            assert answer.state_digest == answer.expected_digest != ""
        shown = status(stub)
        assert shown.learning_rate_schedule == "OneCycleLR of the job, by step"
        assert set(shown.learning_rates) == {"body", "head"}
        assert service.wait() == 0
        assert losses_of(service) == expected
    assert last_checkpoint(tmp_path / "disturbed") == last_checkpoint(tmp_path / "undisturbed")
    assert "ema/loss" in json.dumps(expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_stopped_early_and_resumed_with_more_patience(tmp_path: Path) -> None:
    """It has finished, for a reason that its state and its journal have; the same settings leave it so, and say why."""
    given = [
        "preset=plain", "training.job=support.practice_jobs:Scored", "training.device=cpu", "training.threads=1",
        "training.epochs=6", "training.options.scores=[3, 2, 2, 2, 2, 1]", "early_stopping.metric=score",
        "early_stopping.mode=min", "service.exit_when_done=true",
    ]  # fmt: skip
    found = []
    for patience in (2, 2, 4):
        with serve(*given, f"early_stopping.patience={patience}", cwd=tmp_path) as service:
            assert service.wait() == 0
            ends = [line for line in service.events() if line["event"] == "run_state" and line["state"] == "finished"]
            begun = next(str(line["detail"]) for line in service.events() if line["event"] == "state")
        found.append((last_checkpoint(tmp_path)[0], str(ends[-1]["reason"])))
        assert ("is resumed; it had stopped early: score was 2 at step 16" in begun) is (len(found) > 1)
    stopped = "stopped early: score was 2 at step 16, and not better in the 2 evaluations since"
    to_go_on = (
        "to go on, set a larger early_stopping.patience (it is 2), another early_stopping.metric (it is score) or none"
    )
    assert found == [(32, stopped), (32, f"{stopped}; {to_go_on}"), (48, "all epochs done")]
    rows = read_journal(tmp_path / "state" / JOURNAL, CommandRow)
    assert [(row.kind, row.global_step, row.reason) for row in rows] == [(STOPPED_EARLY, 32, stopped)]
