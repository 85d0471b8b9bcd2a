"""What a finished demo run came to: one JSON object for programs, a few lines for people.

Must not know how the run was started or followed.
"""

from __future__ import annotations

import json
import math

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.cli import words
from tolaria.cli.child import Serving
from tolaria.cli.stories import Stories, story_line


def summary_json(status: GetStatusResponse, stories: Stories, wall_seconds: float) -> str:
    """One line of JSON. A figure that is unknown or not finite is null: JSON has no other word for it."""
    return json.dumps(
        {
            "final_accuracy": _finite(status.validation_accuracy),
            "epochs": status.epoch,
            "steps": status.global_step,
            "wall_seconds": round(wall_seconds, 3),
            "boundary_ms_p50": _finite(status.boundary_ms_p50),
            "boundary_ms_p99": _finite(status.boundary_ms_p99),
            "seeds": [_seed(seed, stories) for seed in status.seeds],
            "commands": status.commands_accepted,
            "rollbacks": status.rollbacks,
        }
    )


def summary_lines(status: GetStatusResponse, stories: Stories, wall_seconds: float) -> list[str]:
    """The same for people, with a line for each seed, also for those that are gone by now."""
    epochs = "1 epoch" if status.epoch == 1 else f"{status.epoch} epochs"
    return [
        (
            f"{words.one_line(status.job) or 'the run'} finished: accuracy {status.validation_accuracy:.2%} after "
            f"{epochs} ({status.global_step} steps) in {wall_seconds:.1f} s"
        ),
        (
            f"boundary p50 {status.boundary_ms_p50:.1f} ms, p99 {status.boundary_ms_p99:.1f} ms "
            f"of {status.boundary_budget_ms:g} ms; "
            f"commands {words.commands(status)}; seeds: {words.seeds(status.seeds)}"
        ),
        *(story_line(story) for story in stories.all()),
    ]


def where_next(serving: Serving, *, stay: bool) -> list[str]:
    """Where to look: at the service that is still up, or how to get one that is."""
    if not stay:
        return ["the service ends now; --stay keeps it up to look around"]
    return [
        f"metrics  http://{serving.metrics}/metrics",
        f"status   tolaria status --address {serving.grpc}",
        f"watch    tolaria watch --address {serving.grpc}",
        "still serving; Ctrl-C ends it",
    ]


def _seed(seed: SeedState, stories: Stories) -> dict[str, object]:
    stages, story = SeedLifecycleStage.DESCRIPTOR.values_by_number, stories.of(seed.seed_id)
    return {
        "seed_id": seed.seed_id,
        "stage": stages[seed.stage].name if seed.stage in stages else str(seed.stage),
        "blueprint_id": seed.blueprint_id,
        "epoch_germinated": story.epoch_germinated if story else None,
        "accuracy_before": story.accuracy_before if story else None,
        "accuracy_after": story.accuracy_after if story else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
