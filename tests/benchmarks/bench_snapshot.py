"""The cost of snapshots and restores compared with copies of the same bytes, and their share of a run.

    python tests/benchmarks/bench_snapshot.py [--repeats 7] [--threads 1] [--steps 6000]

0.6 GB of training state (parameters and Adam's two moments), medians of a few runs taken in turn, as ratios within one
run; a head on a frozen backbone of 0.2 GB; then the digits, with snapshots as often as `rollback.overhead_max` lets
them be taken. Takes a minute, at most 5 GB of memory and 1.4 GB of disk under the working directory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.side_by_side import in_turn, machine, show
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.config import Settings, TrainingSettings
from tolaria.images import Lease, StateImage
from tolaria.lane.build import build
from tolaria.lane.messages import SnapshotsChanged
from tolaria.lane.snapshot_manager import SnapshotManager
from tolaria.lane.step import train_step
from tolaria.state.restore import stage_restore
from tolaria.state.snapshots import SnapshotRing
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position

LAYERS, WIDTH = 50, 1000


@dataclass
class Live:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


def live_training() -> Live:
    """Returns 50 million parameters in 100 tensors, with Adam's moments: 0.6 GB."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Live(model, optimizer, Position(1, 1))


def held(lease: Lease | None) -> StateImage:
    """Returns the image of a lease."""
    if lease is None:
        raise LookupError("the ring holds nothing")
    with lease as image:
        return image


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    live = live_training()
    state = TrainingState(live, {})
    in_memory(state, arguments.repeats)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
        on_disk(state, Path(name), max(3, arguments.repeats // 2))
    del state, live
    frozen(arguments.repeats)
    share(arguments.steps)


def in_memory(state: TrainingState, repeats: int) -> None:
    """Measures the fast tier against memcpy of the same bytes into allocated memory."""
    bare = SnapshotRing(bytes_max=10**9, entries_max=1, seal=False)
    sealing = SnapshotRing(bytes_max=10**9, entries_max=1, seal=True)
    bare.capture(state)
    image = held(bare.lookup())
    size_bytes = image.size_bytes
    source, target = torch.ones(size_bytes, dtype=torch.uint8), torch.ones(size_bytes, dtype=torch.uint8)
    found = in_turn(
        repeats,
        {
            "memcpy": lambda: target.copy_(source),
            "snapshot": lambda: bare.capture(state),
            "sealed": lambda: sealing.capture(state),
            "seal": lambda: StateImage(image.position, image.specs, image.buffers, image.values).seal(),
            "commit": lambda: restore_fast(state, bare, verify=False),
            "proved": lambda: restore_fast(state, sealing, verify=True),
        },
    )
    speed = size_bytes / statistics.median(found["memcpy"]) / 1e9
    show(
        f"in memory, {size_bytes / 1e9:.2f} GB, memcpy {speed:.1f} GB/s; {machine()}",
        "memcpy",
        found,
        {
            "memcpy": "plain copy",
            "snapshot": "snapshot into the ring, without its digest",
            "sealed": "snapshot into the ring, with its digest, as the lane takes it",
            "seal": "digest of a snapshot (any thread, GIL free)",
            "commit": "fast restore, without proof",
            "proved": "fast restore, image verified before, live state proved after",
        },
    )


def frozen(repeats: int) -> None:
    """Measures snapshots of a model whose layers but the last are frozen, and counts those that fit into 256 MiB."""
    live = live_training()
    for parameter in list(live.model.parameters())[:-2]:
        parameter.requires_grad_(False)
    live.optimizer = torch.optim.Adam([p for p in live.model.parameters() if p.requires_grad])
    state, ring = TrainingState(live, {}), SnapshotRing(bytes_max=2**28, entries_max=5, seal=True)
    source = torch.ones(sum(parameter.nbytes for parameter in live.model.parameters()), dtype=torch.uint8)
    target = torch.ones_like(source)

    def snapshot() -> None:
        live.position = Position(live.position.global_step + 1, 1)
        ring.capture(state)

    found = in_turn(repeats, {"memcpy": lambda: target.copy_(source), "sealed": snapshot})
    held = ring.statistics()
    title = f"frozen backbone, {source.nbytes / 1e9:.2f} GB, {held.entries} snapshots in {held.size_bytes / 1e9:.2f} GB"
    show(title, "memcpy", found, {"memcpy": "plain copy", "sealed": "snapshot into the ring, with its digest"})


def restore_fast(state: TrainingState, cache: SnapshotRing, *, verify: bool) -> None:
    """Restores with a copy alone, or with both proofs."""
    stage_restore(state, held(cache.lookup()), verify=verify).commit()
    if verify:
        state.fingerprint()


def on_disk(state: TrainingState, directory: Path, repeats: int) -> None:
    """Measures the full tier against reading the same file from the page cache."""
    storage = open_storage(directory, run_id="bench", retention=Retention(last=1, best="highest"))
    with storage.journal:
        row = storage.checkpoints.write(state.copy())
        path = directory / "checkpoints" / row.checkpoint_id / "tensors.safetensors"

        def restore(*, prove: bool) -> None:
            loaded = storage.checkpoints.load_newest()
            stage_restore(state, loaded.image, verify=False).commit()
            if prove:
                state.fingerprint()

        found = in_turn(
            repeats,
            {
                "read": path.read_bytes,
                "load": storage.checkpoints.load_newest,
                "restore": lambda: restore(prove=False),
                "proved": lambda: restore(prove=True),
            },
        )
        image = state.copy()
        image.seal()
        written = in_turn(
            2,
            {
                "plain": lambda: write_plainly(image, directory / "plain"),
                "checkpoint": lambda: storage.checkpoints.write(image),
            },
        )
    speed = row.size_bytes / statistics.median(found["read"]) / 1e9
    show(
        f"on disk, reading {speed:.1f} GB/s from the page cache; {machine()}",
        "read",
        found,
        {
            "read": "reading the file into memory",
            "load": "checkpoint loaded, every digest verified",
            "restore": "full restore: loaded, verified, copied into the live state",
            "proved": "full restore, live state proved after",
        },
    )
    show("", "plain", written, {"plain": "plain write and fsync", "checkpoint": "checkpoint written and committed"})


def write_plainly(image: StateImage, path: Path) -> None:
    """Writes the image's bytes into one file, syncs it, and removes it as retention does."""
    with path.open("wb") as file:
        for buffer in image.buffers.values():
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def share(steps: int) -> None:
    """Measures the share of the lane's time that snapshots of the digits take, without the first tenth of the steps."""
    settings = Settings(training=TrainingSettings(job="digits", device="cpu", threads=1))
    built = build(settings)
    module, manager = built.module, built.snapshots
    stepping_s = keeping_s = 0.0
    before = 0
    module.begin_epoch()
    manager.epoch_begins()
    for place in range(steps):
        if place == steps // 10:
            stepping_s, keeping_s, before = 0.0, 0.0, snapshots_taken(manager, 0)
        started_s = time.perf_counter()
        step = train_step(module, lambda: True)
        if step is None:
            module.progress = module.progress.ended()
            module.begin_epoch()
            continue
        module.seeds.advance(module.global_step)
        stepped_s = time.perf_counter()
        manager.step_done(step.duration_s)
        kept_s = time.perf_counter()
        stepping_s += stepped_s - started_s
        keeping_s += kept_s - stepped_s
    taken = snapshots_taken(manager, before) - before
    print(f"\ndigits, {steps - steps // 10} steps of {1e3 * stepping_s / (steps - steps // 10):.2f} ms; {machine()}")
    print(
        f"{taken} snapshots, {100 * keeping_s / (stepping_s + keeping_s):.2f} % of the lane's time "
        f"(overhead_max {100 * settings.rollback.overhead_max:g} %), {1e3 * keeping_s / max(1, taken):.2f} ms each"
    )


def snapshots_taken(manager: SnapshotManager, before: int) -> int:
    """Returns the number of snapshots so far; `before` if none was taken since the last call."""
    changes = [event for event in manager.take_events() if isinstance(event, SnapshotsChanged)]
    return changes[-1].statistics.snapshots if changes else before


if __name__ == "__main__":
    main()
