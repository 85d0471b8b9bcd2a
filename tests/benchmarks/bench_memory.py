"""Memory at the peak of a first look, of training with checkpoints, and of a full restore, against a bare loop's.

    python tests/benchmarks/bench_memory.py

300 MB of model and Adam state, in the ring (`rollback.memory_mb` 400) and out of it (64), each in a separate process.
A figure is the peak above the bare loop's, without what the ring holds, in units of the state; it must be at most 2.2.
Linux only; takes a minute, 2 GB of memory and 1 GB of disk in the temporary directory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.lane_driver import DrivenLane
from support.user_jobs import Table
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import Settings, TrainingSettings
from tolaria.jobs import JobContext
from tolaria.lane.build import build
from tolaria.lane.messages import SnapshotsChanged

ROWS = 26000
STATE_BYTES = ROWS * 1000 * 4 * 3
RATIO_MAX = 2.2
STEPS = 3


def peak_bytes() -> int:
    """The greatest resident size since the last `reset`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def reset() -> None:
    """Starts a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def bare() -> dict[str, float]:
    """A loop of the user's own."""
    job = Table(JobContext(0, torch.device("cpu"), {"rows": ROWS}))  # type: ignore[no-untyped-call]
    model: nn.Module = job.build_model()  # type: ignore[no-untyped-call]
    optimizer, cursor = job.build_optimizer(model), job.training_data()  # type: ignore[no-untyped-call]
    cursor.begin_epoch(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        job.losses(model, cursor.next_batch())["host"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"trained": peak_bytes()}


def hosted(memory_mb: int) -> dict[str, float]:
    """The same steps in a lane, with two checkpoints, then a restore of one of them."""
    training = TrainingSettings(
        job="support.user_jobs:Table", device="cpu", threads=1, options={"rows": ROWS}, clip_norm=0.0
    )
    started_s = time.monotonic()
    lane = DrivenLane(build(Settings(training=training, rollback={"memory_mb": memory_mb})))  # type: ignore[arg-type]
    found: dict[str, float] = {"build_s": time.monotonic() - started_s, "built": peak_bytes()}
    reset()
    with tempfile.TemporaryDirectory() as place:
        storage = open_storage(Path(place), run_id="r", retention=Retention(last=2, best="lowest"))
        for step in range(1, STEPS + 1):
            lane.train_to(step)
            with lane.capture() as image:
                storage.checkpoints.write(image)
        found["trained"] = peak_bytes()
        reset()
        loaded = storage.checkpoints.load_first(storage.checkpoints.restore_points()[-2:])
        restored = lane.restore(loaded.row.global_step, loaded.image)
        assert restored.state_digest == restored.expected_digest
        found["restored"] = peak_bytes()
        storage.journal.close()
    changes = [event for event in lane.snapshots.take_events() if isinstance(event, SnapshotsChanged)]
    found["ring"] = changes[-1].statistics.size_bytes
    return found


def main() -> None:
    """Prints the table, or the figures of one process as JSON."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(bare() if sys.argv[1] == "bare" else hosted(int(sys.argv[1]))))
        return
    base = run("bare")["trained"]
    print(f"torch {torch.__version__}; state {STATE_BYTES / 1e6:.0f} MB; a bare loop's peak {base / 1e6:.0f} MB")
    for memory_mb in (400, 64):
        found = run(str(memory_mb))
        print(f"memory_mb {memory_mb}: built in {found['build_s']:.1f} s, ring {found['ring'] / 1e6:.0f} MB")
        for phase, name in (
            ("built", "first look"),
            ("trained", "training, checkpoints"),
            ("restored", "full restore"),
        ):
            ratio = (found[phase] - base - found["ring"] * (phase != "built")) / STATE_BYTES
            verdict = "within" if ratio <= RATIO_MAX else "ABOVE"
            print(f"  {name:<22} {ratio:5.2f} x the state ({verdict} {RATIO_MAX})")


def run(what: str) -> dict[str, float]:
    """Returns the figures of a separate process."""
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
