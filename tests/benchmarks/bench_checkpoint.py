"""What a durable checkpoint costs training while it is written, and beside torch's own ways of writing one.

    python tests/benchmarks/bench_checkpoint.py [--rounds 6] [--layers 30]

The lane's part is done here by hand, with its own rig, keeper, ring, writer and store, in one thread: steps of a model
with 0.36 GB of state, at a fence an image for a checkpoint, and steps on while the writer's thread writes and syncs it.
Beside that, on the same disk and the same bytes: torch.save with a sync, torch.distributed.checkpoint's save and
async_save (gloo, one process). Blocked is what training waits for; durable is until the caller may rely on it.
Takes a minute and a half, 4 GB of memory and 2 GB of disk under the working directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch.distributed.checkpoint.state_dict_saver import async_save, save

sys.path.insert(0, str(Path(__file__).parents[1]))
from tolaria.training.recovery.keeper import SnapshotKeeper
from tolaria.training.rig import Rig, build_rig
from tolaria.training.step import train_step

from benchmarks.side_by_side import machine, p99, show, timed
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import FastPathSettings, RollbackSettings, Settings, TrainingSettings
from tolaria.journal.rows import CheckpointRow


class Lane:
    """The lane's work by hand: a rig, its keeper, and the storage that checkpoints go to."""

    def __init__(self, layers: int, storage: Storage, writer: CheckpointWriter) -> None:
        options: dict[str, JsonValue] = {"layers": layers, "batch": 8, "steps": 100_000 // layers}
        training = TrainingSettings(
            job="benchmarks.side_by_side:WideJob", options=options, device="cpu", threads=1, epochs=1
        )
        self.rig: Rig = build_rig(Settings(training=training, fastpaths=FastPathSettings(fused="auto")))
        self.rig.begin_epoch()
        # Snapshots by themselves are another matter: `bench_snapshot.py` has it.
        self.keeper = SnapshotKeeper(self.rig, RollbackSettings(memory_mb=4000, snapshots_max=3, every_steps=10**9))
        self.keeper.epoch_begins()
        self.storage, self.writer = storage, writer
        self.alone: list[float] = []
        self._bytes = b""

    def step(self) -> float:
        """One update; seconds."""
        return timed(lambda: train_step(self.rig, lambda: True))

    def snapshot(self) -> float:
        """A snapshot into the ring, as cadence would have it; seconds."""
        started_s = time.perf_counter()
        kept = self.keeper.keep()
        seconds = time.perf_counter() - started_s
        kept.lease.release()
        return seconds

    def bytes_of(self, size: int) -> memoryview:
        """So many, the same ones each time."""
        if len(self._bytes) != size:
            self._bytes = os.urandom(size)
        return memoryview(self._bytes)

    def checkpoint(self) -> tuple[float, Future[CheckpointRow]]:
        """What the fence does for a checkpoint: how long the lane stands, and the writing that goes on."""
        started_s = time.perf_counter()
        kept = self.keeper.keep()
        future = self.writer.write(kept.lease, metric=None)
        stalled_s = time.perf_counter() - started_s
        if future is None:
            raise RuntimeError("the writer is busy")
        return stalled_s, future


class Writing:
    """Something that writes in a thread of its own, and the lane's steps meanwhile."""

    def __init__(self) -> None:
        self.written: list[float] = []
        self.steps: list[float] = []
        self.ratios: list[float] = []

    def accompany(self, lane: Lane, over: Callable[[], bool]) -> None:
        """Step until it is over, and as often undisturbed; the ratio is this round's."""
        started_s = time.perf_counter()
        beside = []
        while not over():
            beside.append(lane.step())
        self.written.append(time.perf_counter() - started_s)
        self.steps += beside
        alone = [lane.step() for _ in range(max(4, len(beside)))]
        lane.alone += alone
        self.ratios.append(statistics.median(beside) / statistics.median(alone))

    def tell(self, name: str) -> None:
        """One row."""
        median_ms, worst_ms = 1e3 * statistics.median(self.steps), 1e3 * p99(self.steps)
        written_ms = 1e3 * statistics.median(self.written)
        ratio = statistics.median(self.ratios)
        print(f"| {name} | {len(self.steps)} | {median_ms:.1f} | {worst_ms:.1f} | {ratio:.2f} | {written_ms:.0f} |")


def stalls(lane: Lane, folder: Path, rounds: int) -> None:
    """How long the lane stands for a checkpoint, beside a snapshot, and how its steps fare meanwhile."""
    found: dict[str, list[float]] = {"snapshot": [], "stall": []}
    ours, plain = Writing(), Writing()
    row: CheckpointRow | None = None
    warm_up(lane)
    for _ in range(rounds):
        lane.step()
        found["snapshot"].append(lane.snapshot())
        lane.step()
        stalled_s, future = lane.checkpoint()
        found["stall"].append(stalled_s)
        ours.accompany(lane, future.done)
        row = future.result()
        with ThreadPoolExecutor(1) as pool:  # what a disk costs whoever writes to it
            control = pool.submit(write_plainly, lane.bytes_of(row.size_bytes), folder)
            plain.accompany(lane, control.done)
    words = {"snapshot": "snapshot into the ring, digest included", "stall": "the lane's stall for a checkpoint"}
    size_gb = row.size_bytes / 1e9 if row else 0.0
    show(f"checkpoint of {size_gb:.2f} GB while training goes on; {machine()}", "snapshot", found, words)
    print("\n| steps | samples | median ms | p99 ms | ratio to undisturbed ones | written in ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    median_ms, worst_ms = 1e3 * statistics.median(lane.alone), 1e3 * p99(lane.alone)
    print(f"| undisturbed | {len(lane.alone)} | {median_ms:.1f} | {worst_ms:.1f} | 1.00 | |")
    ours.tell("while a checkpoint is written")
    plain.tell("while a thread writes as many bytes plainly and syncs them")


def warm_up(lane: Lane) -> None:
    """Everything once, so that the ring has its memory."""
    lane.step()
    lane.snapshot()
    _, future = lane.checkpoint()
    lane.step()
    lane.snapshot()
    future.result()


def write_plainly(content: memoryview, folder: Path) -> None:
    """One file, synced, and removed again."""
    path = folder / "plain"
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), 4 * 2**20):
            file.write(content[start : start + 4 * 2**20])
        os.fsync(file.fileno())
    path.unlink()


class Rivals:
    """The same model and optimizer, written by others into one folder, which is emptied before each."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig = rig
        self._folder = folder

    def torch_save(self) -> tuple[float, float]:
        """Blocked, durable: the same for what is written in the calling thread."""

        def write() -> None:
            with (self._emptied() / "state.pt").open("wb") as file:
                torch.save(self._state(), file)
                file.flush()
                os.fsync(file.fileno())

        return self._both(write)

    def dcp_save(self) -> tuple[float, float]:
        """torch.distributed.checkpoint, which syncs its files."""
        return self._both(lambda: save(self._state(), checkpoint_id=self._emptied()))

    def dcp_async_save(self) -> tuple[float, float]:
        """The same in the background, after the state has been copied aside."""
        target, started_s = self._emptied(), time.perf_counter()
        future = async_save(self._state(), checkpoint_id=target)
        blocked_s = time.perf_counter() - started_s
        waited: Future[object] = future  # type: ignore[assignment] # a response object only with another stager
        waited.result()
        return blocked_s, time.perf_counter() - started_s

    def _both(self, write: Callable[[], object]) -> tuple[float, float]:
        seconds = timed(write)
        return seconds, seconds

    def _state(self) -> dict[str, object]:
        return {"model": self._rig.model.state_dict(), "optimizer": self._rig.optimizer.state_dict()}

    def _emptied(self) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        return self._folder


def side_by_side(lane: Lane, folder: Path, rounds: int) -> None:
    """Ours and the rivals, in turn, nothing else going on."""
    rivals = Rivals(lane.rig, folder)

    def ours() -> tuple[float, float]:
        started_s = time.perf_counter()
        stalled_s, future = lane.checkpoint()
        future.result()
        return stalled_s, time.perf_counter() - started_s

    contenders = {
        "ours": ours,
        "torch_save": rivals.torch_save,
        "dcp_save": rivals.dcp_save,
        "dcp_async_save": rivals.dcp_async_save,
    }
    blocked: dict[str, list[float]] = {name: [] for name in contenders}
    durable: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, write in contenders.items():
            blocked_s, durable_s = write()
            if turn:
                blocked[name].append(blocked_s)
                durable[name].append(durable_s)
    words = {
        "ours": "Tolaria",
        "torch_save": "torch.save and fsync",
        "dcp_save": "torch.distributed.checkpoint save",
        "dcp_async_save": "torch.distributed.checkpoint async_save",
    }
    show(f"training is blocked, of the same bytes; {machine()}", "ours", blocked, words)
    show("until durable", "ours", durable, words)


@contextmanager
def alone_in_a_group() -> Iterator[None]:
    """The process group that async_save wants, of this process only."""
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch.distributed")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
        storage = open_storage(Path(name) / "ours", run_id="bench", retention=Retention(last=1, best="highest"))
        with storage.journal, CheckpointWriter(storage.checkpoints) as writer, alone_in_a_group():
            lane = Lane(arguments.layers, storage, writer)
            stalls(lane, Path(name), arguments.rounds)
            side_by_side(lane, Path(name) / "theirs", arguments.rounds)


if __name__ == "__main__":
    main()
