"""What a finished demo run came to: one JSON object for programs, a few lines for people.

Must not know how the run was started or followed.
"""

from __future__ import annotations

import json
import math

from leyline.v1.admin_service_pb2 import GetStatusResponse
from leyline.v1.enums_pb2 import SeedLifecycleStage
from tolaria.cli import words
from tolaria.cli.child import Serving


def summary_json(status: GetStatusResponse, wall_seconds: float) -> str:
    """One line of JSON. A figure that is not finite is null: JSON has no other word for it."""
    stages = SeedLifecycleStage.DESCRIPTOR.values_by_number
    return json.dumps(
        {
            "final_accuracy": _finite(status.validation_accuracy),
            "epochs": status.epoch,
            "steps": status.global_step,
            "wall_seconds": round(wall_seconds, 3),
            "boundary_ms_p50": _finite(status.boundary_ms_p50),
            "boundary_ms_p99": _finite(status.boundary_ms_p99),
            "seeds": [
                {
                    "seed_id": seed.seed_id,
                    "stage": stages[seed.stage].name if seed.stage in stages else str(seed.stage),
                    "blueprint_id": seed.blueprint_id,
                }
                for seed in status.seeds
            ],
            "commands": status.commands_accepted,
            "rollbacks": status.rollbacks,
        }
    )


def summary_lines(status: GetStatusResponse, wall_seconds: float) -> list[str]:
    """The same for people."""
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
    ]


def where_next(serving: Serving, *, stay: bool) -> list[str]:
    """Where to look: at the service that is still up, or how to get one that is."""
    lines = [
        f"metrics  http://{serving.metrics}/metrics",
        f"status   tolaria status --address {serving.grpc}",
        f"watch    tolaria watch --address {serving.grpc}",
    ]
    ending = "still serving; Ctrl-C ends it" if stay else "the service ends now; --stay keeps it up to look around"
    return [*lines, ending]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
