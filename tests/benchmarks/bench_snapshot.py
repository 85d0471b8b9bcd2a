"""What snapshots and restores cost beside moving the same bytes plainly: `python tests/benchmarks/bench_snapshot.py`.

0.6 GB of training state (parameters and Adam's two moments), medians of a few runs taken in turn, as ratios within one
run. Takes half a minute, at most 4 GB of memory and 0.7 GB of disk under the working directory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tolaria.rollback import (
    FastRollbackCache,
    Lease,
    Position,
    Retention,
    StateImage,
    TrainingState,
    never,
    open_storage,
    stage_restore,
)
from tolaria.rollback.digest import fingerprint

LAYERS, WIDTH = 50, 1000


@dataclass
class Live:
    """What is trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


def live_training() -> Live:
    """50 million parameters in 100 tensors, Adam's moments filled: 0.6 GB."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Live(model, optimizer, Position(1, 1))


def medians(repeats: int, **actions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each action, run in turn so that all see the same machine; the first round is left out."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            started_s = time.perf_counter()
            action()
            if turn:
                taken[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def held(lease: Lease | None) -> StateImage:
    """The image of a lease that must be there."""
    if lease is None:
        raise LookupError("the ring holds nothing")
    with lease as image:
        return image


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    live = live_training()
    state = TrainingState(live, {})
    in_memory(state, arguments.repeats)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
        on_disk(state, Path(name), max(3, arguments.repeats // 2))


def in_memory(state: TrainingState, repeats: int) -> None:
    """The fast tier against memcpy of the same bytes, in one piece, into memory that is there."""
    cache = FastRollbackCache(bytes_max=10**9, entries_max=1, seal=False)
    cache.capture(state)
    image = held(cache.lookup())
    size_bytes = image.size_bytes
    source, target = torch.ones(size_bytes, dtype=torch.uint8), torch.ones(size_bytes, dtype=torch.uint8)
    found = medians(
        repeats,
        memcpy=lambda: target.copy_(source),
        snapshot=lambda: cache.capture(state),
        seal=lambda: fingerprint(image.tensors, image.values),
        commit=lambda: restore_fast(state, cache, verify=False),
        proved=lambda: restore_fast(state, cache, verify=True),
    )
    print(f"in memory, {size_bytes / 1e9:.2f} GB, memcpy {size_bytes / found['memcpy'] / 1e9:.1f} GB/s")
    show(
        found,
        "memcpy",
        {
            "memcpy": "plain copy",
            "snapshot": "snapshot into the ring",
            "seal": "digest of a snapshot (any thread, GIL free)",
            "commit": "fast restore",
            "proved": "fast restore, image verified before and live state proved after",
        },
    )


def restore_fast(state: TrainingState, cache: FastRollbackCache, *, verify: bool) -> None:
    """The copy alone, or with both proofs."""
    stage_restore(state, held(cache.lookup()), verify=verify).commit()
    if verify:
        state.fingerprint()


def on_disk(state: TrainingState, directory: Path, repeats: int) -> None:
    """The full tier against reading the same file into memory, from the page cache."""
    storage = open_storage(directory, run_id="bench", retention=Retention(last=1))
    with storage.journal:
        row = storage.checkpoints.write(state.copy())
        path = directory / "checkpoints" / row.checkpoint_id / "tensors.safetensors"

        def restore(*, prove: bool) -> None:
            loaded = storage.checkpoints.load_newest(never)
            stage_restore(state, loaded.image, verify=False).commit()
            if prove:
                state.fingerprint()

        found = medians(
            repeats,
            read=path.read_bytes,
            load=lambda: storage.checkpoints.load_newest(never),
            restore=lambda: restore(prove=False),
            proved=lambda: restore(prove=True),
        )
        image = state.copy()
        written = medians(
            1,
            plain=lambda: write_plainly(image, directory / "plain"),
            checkpoint=lambda: storage.checkpoints.write(image),
        )
    print(f"on disk, reading {row.size_bytes / found['read'] / 1e9:.1f} GB/s from the page cache")
    show(
        found,
        "read",
        {
            "read": "reading the file into memory",
            "load": "checkpoint loaded, every digest verified",
            "restore": "full restore: loaded, verified, copied into the live state",
            "proved": "full restore, live state proved after",
        },
    )
    show(written, "plain", {"plain": "plain write and fsync", "checkpoint": "checkpoint written and committed"})


def write_plainly(image: StateImage, path: Path) -> None:
    """The image's bytes into one file, synced."""
    with path.open("wb") as file:
        for tensor in image.tensors.values():
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def show(found: dict[str, float], base: str, titles: dict[str, str]) -> None:
    """One table."""
    for name, title in titles.items():
        print(f"  {found[name] * 1e3:8.1f} ms  {found[name] / found[base]:5.2f} x  {title}")


if __name__ == "__main__":
    main()
