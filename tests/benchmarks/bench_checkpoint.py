"""The cost of a durable checkpoint for training, and compared with torch's own ways of writing one.

    python tests/benchmarks/bench_checkpoint.py [--rounds 6] [--layers 30]

The lane's work is done here in one thread with its own module, snapshots, writer and store: steps of a model with 0.36
GB of state, at a step boundary an image for a checkpoint, and further steps while the writer's thread writes and syncs
it. For comparison, on the same disk with the same bytes: torch.save with a sync, and save and async_save of
torch.distributed.checkpoint (gloo, one process). "Blocked" is the time that training waits; "durable" is the time until
the caller may rely on the checkpoint.
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

from benchmarks.side_by_side import machine, p99, show, timed
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.writer import CheckpointWriter
from tolaria.config import FastPathSettings, RollbackSettings, Settings, TrainingSettings
from tolaria.journal.rows import CheckpointRow
from tolaria.lane.build import build
from tolaria.lane.step import train_step
from tolaria.lane.train_module import TrainModule


class Lane:
    """The work of a lane: a module, its snapshots, and the storage of its checkpoints."""

    def __init__(self, layers: int, storage: Storage, writer: CheckpointWriter) -> None:
        options: dict[str, JsonValue] = {"layers": layers, "batch": 8, "steps": 100_000 // layers}
        training = TrainingSettings(
            job="benchmarks.side_by_side:WideJob", options=options, device="cpu", threads=1, epochs=1
        )
        settings = Settings(
            training=training,
            fastpaths=FastPathSettings(fused="auto"),
            # `bench_snapshot.py` measures periodic snapshots.
            rollback=RollbackSettings(memory_mb=4000, snapshots_max=3, every_steps=10**9),
        )
        built = build(settings)
        self.module, self.snapshots = built.module, built.snapshots
        self.module.begin_epoch()
        self.snapshots.epoch_begins()
        self.storage, self.writer = storage, writer
        self.alone: list[float] = []
        self._bytes = b""

    def step(self) -> float:
        """Does one step; returns seconds."""
        return timed(lambda: train_step(self.module, lambda: True))

    def snapshot(self) -> float:
        """Captures an image in the ring; returns seconds."""
        started_s = time.perf_counter()
        lease = self.snapshots.capture_image()
        seconds = time.perf_counter() - started_s
        lease.release()
        return seconds

    def bytes_of(self, size: int) -> memoryview:
        """Returns random bytes, the same ones for the same size."""
        if len(self._bytes) != size:
            self._bytes = os.urandom(size)
        return memoryview(self._bytes)

    def checkpoint(self) -> tuple[float, Future[CheckpointRow]]:
        """Begins a checkpoint; returns for how long the lane was blocked, and the future of the write."""
        started_s = time.perf_counter()
        lease = self.snapshots.capture_image()
        future = self.writer.write(lease, metric=None)
        stalled_s = time.perf_counter() - started_s
        if future is None:
            raise RuntimeError("the writer is busy")
        return stalled_s, future


class Writing:
    """A write in another thread, and the lane's steps meanwhile."""

    def __init__(self) -> None:
        self.written: list[float] = []
        self.steps: list[float] = []
        self.ratios: list[float] = []

    def accompany(self, lane: Lane, over: Callable[[], bool]) -> None:
        """Measures steps until the write is over, and as many undisturbed ones; adds the ratio of this round."""
        started_s = time.perf_counter()
        beside = []
        while not over():
            beside.append(lane.step())
        self.written.append(time.perf_counter() - started_s)
        self.steps += beside
        alone = [lane.step() for _ in range(max(4, len(beside)))]
        lane.alone += alone
        self.ratios.append(statistics.median(beside) / statistics.median(alone))

    def show(self, name: str) -> None:
        """Prints one row."""
        median_ms, worst_ms = 1e3 * statistics.median(self.steps), 1e3 * p99(self.steps)
        written_ms = 1e3 * statistics.median(self.written)
        ratio = statistics.median(self.ratios)
        print(f"| {name} | {len(self.steps)} | {median_ms:.1f} | {worst_ms:.1f} | {ratio:.2f} | {written_ms:.0f} |")


def stalls(lane: Lane, folder: Path, rounds: int) -> None:
    """Measures how long a checkpoint and a snapshot block the lane, and its steps during the write."""
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
        with ThreadPoolExecutor(1) as pool:  # the cost of any write to this disk
            control = pool.submit(write_plainly, lane.bytes_of(row.size_bytes), folder)
            plain.accompany(lane, control.done)
    words = {"snapshot": "snapshot into the ring, digest included", "stall": "the lane's stall for a checkpoint"}
    size_gb = row.size_bytes / 1e9 if row else 0.0
    show(f"checkpoint of {size_gb:.2f} GB while training goes on; {machine()}", "snapshot", found, words)
    print("\n| steps | samples | median ms | p99 ms | ratio to undisturbed ones | written in ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    median_ms, worst_ms = 1e3 * statistics.median(lane.alone), 1e3 * p99(lane.alone)
    print(f"| undisturbed | {len(lane.alone)} | {median_ms:.1f} | {worst_ms:.1f} | 1.00 | |")
    ours.show("while a checkpoint is written")
    plain.show("while a thread writes as many bytes plainly and syncs them")


def warm_up(lane: Lane) -> None:
    """Does everything once, so that the ring has its memory."""
    lane.step()
    lane.snapshot()
    _, future = lane.checkpoint()
    lane.step()
    lane.snapshot()
    future.result()


def write_plainly(content: memoryview, folder: Path) -> None:
    """Writes one file, syncs it and removes it."""
    path = folder / "plain"
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), 4 * 2**20):
            file.write(content[start : start + 4 * 2**20])
        os.fsync(file.fileno())
    path.unlink()


class Rivals:
    """Writes the same model and optimizer with torch, into one folder that is emptied before each write."""

    def __init__(self, module: TrainModule, folder: Path) -> None:
        self._module = module
        self._folder = folder

    def torch_save(self) -> tuple[float, float]:
        """Returns the seconds of both, which are equal for a write in the calling thread."""

        def write() -> None:
            with (self._emptied() / "state.pt").open("wb") as file:
                torch.save(self._state(), file)
                file.flush()
                os.fsync(file.fileno())

        return self._both(write)

    def dcp_save(self) -> tuple[float, float]:
        """Uses torch.distributed.checkpoint, which syncs its files."""
        return self._both(lambda: save(self._state(), checkpoint_id=self._emptied()))

    def dcp_async_save(self) -> tuple[float, float]:
        """Uses the same in the background, after a copy of the state."""
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
        return {"model": self._module.model.state_dict(), "optimizer": self._module.optimizer.state_dict()}

    def _emptied(self) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        return self._folder


def side_by_side(lane: Lane, folder: Path, rounds: int) -> None:
    """Measures Tolaria and torch in turn, without training meanwhile."""
    rivals = Rivals(lane.module, folder)

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
    """Creates the process group that async_save requires, of this process only."""
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def main() -> None:
    """Prints the tables."""
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
