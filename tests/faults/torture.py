"""Crash and corruption tests of the state directory: `python tests/faults/torture.py [--full] [--seed N]`.

Each test is a function that returns the problems it found, as sentences.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from faults.small_training import Training, new_training
from tolaria.checkpoint.inspection import inspect_storage
from tolaria.checkpoint.storage import Storage, open_storage
from tolaria.checkpoint.store import Retention
from tolaria.journal.rows import ROW_TYPES, CheckpointRow, CommandRow, RunRow
from tolaria.values.training import Position

BLOCK = 4096

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
"""Small syncs are fast there; the effects of SIGKILL and flipped bits are the same."""


@contextmanager
def opened(directory: Path) -> Iterator[Storage]:
    """Opens the state directory as a start does."""
    storage = open_storage(directory, run_id="torture", retention=Retention(last=3, best="highest"))
    with storage.journal:
        yield storage


def broad_training() -> Training:
    """Returns a run with checkpoints of some hundred kilobytes."""
    training = new_training()
    training.model.register_buffer("broad", torch.arange(30_000, dtype=torch.float32))
    training.train(1)
    return training


def checkpointed(directory: Path, steps: int) -> list[CheckpointRow]:
    """Creates a state directory with a number of checkpoints and some history."""
    training = broad_training()
    with opened(directory) as storage:
        storage.journal.put(RunRow("torture", 1, "none"))
        rows = []
        for step in range(1, steps + 1):
            storage.journal.put(CommandRow(f"command-{step}", step, "torture", "SEED", step, "applied", "x" * 300))
            training.position = Position(step, 1)
            rows.append(storage.checkpoints.write(training.state().copy(), metric=1.0 / step))
    return rows


def harm_checkpoints(seed: int, flips: int, *, every: int) -> list[str]:
    """Flips single bits of the newest checkpoint, and cuts each of its files at multiples of `every` bytes."""
    return _harmed(2, lambda made, rows: _harm_newest(made, rows[-1], random.Random(seed), flips, every))


def harm_journal(seed: int, flips: int, *, every: int, with_log: bool) -> list[str]:
    """Flips single bits of the journal, or of its write-ahead log as a crash leaves it, and cuts it at multiples."""
    generator = random.Random(seed)
    return _harmed(3, lambda made, rows: _harm_journal(made, rows, generator, flips, every, with_log=with_log))


def kill_while_writing(seed: int, times: int) -> list[str]:
    """Repeatedly kills a process that writes checkpoints, at random moments, and opens what it left."""
    generator = random.Random(seed)
    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        directory = Path(name)
        for turn in range(times):
            reported = _killed_child(directory, generator.uniform(0.0, 0.06))
            wrong += [f"kill {turn}: {problem}" for problem in _after_kill(directory, reported)]
    return wrong


def _harmed(steps: int, harm: Callable[[Path, list[CheckpointRow]], list[str]]) -> list[str]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        made = Path(name) / "made"
        return harm(made, checkpointed(made, steps))


def _harm_newest(made: Path, newest: CheckpointRow, generator: random.Random, flips: int, every: int) -> list[str]:
    files = sorted((made / "checkpoints" / newest.checkpoint_id).iterdir())
    harms = [*_flips(files, generator, flips), *_cuts(files, every)]
    wrong = []
    for what, path, content in harms:
        with _copied(made) as copy:
            (copy / path.relative_to(made)).write_bytes(content)
            with opened(copy) as storage:
                loaded = storage.checkpoints.load_newest()
                loaded.image.verify()
                quarantined = [damage.checkpoint_id for damage in loaded.damaged if damage.quarantined]
                if loaded.row.global_step != 1 or quarantined != [newest.checkpoint_id]:
                    wrong.append(f"{what}: loaded step {loaded.row.global_step}, quarantined {quarantined}")
    return wrong


def _harm_journal(
    made: Path, rows: list[CheckpointRow], generator: random.Random, flips: int, every: int, *, with_log: bool
) -> list[str]:
    if with_log:
        _leave_log(made)
    written = _all_rows(made)
    path = made / ("journal.sqlite3-wal" if with_log else "journal.sqlite3")
    harms = [*_flips([path], generator, flips), *_cuts([path], every)]
    return [problem for harm in harms for problem in _after_journal_harm(made, rows, written, *harm)]


def _after_journal_harm(
    made: Path, rows: list[CheckpointRow], written: set[tuple[object, ...]], *harm: object
) -> list[str]:
    """Expects only written rows, all of them unless the journal was rebuilt, and every checkpoint."""
    what, path, content = harm
    assert isinstance(path, Path)
    assert isinstance(content, bytes)
    log = path.name.endswith("-wal")
    problems = []
    with _copied(made) as copy:
        (copy / path.relative_to(made)).write_bytes(content)
        with opened(copy) as storage:
            found = {(kind.table, *astuple(row)) for kind in ROW_TYPES for row in storage.journal.rows(kind)}
            points = storage.checkpoints.restore_points()
            loaded = storage.checkpoints.load_newest()
            if storage.journal_damage is None and (found - written or (written - found and not log)):
                problems.append(f"{what}: rows changed without being detected")
        if list(points) != rows or loaded.damaged or loaded.row != rows[-1]:
            problems.append(f"{what}: checkpoints {[row.global_step for row in points]} are left")
    return problems


def _leave_log(made: Path) -> None:
    """Leaves the last rows in the log only, as after a crash."""
    with _copied(made) as copy, opened(copy) as storage:
        for step in range(10, 20):
            storage.journal.put(CommandRow(f"logged-{step}", step, "torture", "SEED", step, "applied", "y" * 300))
        for ending in ("", "-wal"):
            shutil.copy(copy / f"journal.sqlite3{ending}", made / f"journal.sqlite3{ending}")


def _all_rows(made: Path) -> set[tuple[object, ...]]:
    with _copied(made) as copy, opened(copy) as storage:
        return {(kind.table, *astuple(row)) for kind in ROW_TYPES for row in storage.journal.rows(kind)}


def _flips(files: list[Path], generator: random.Random, count: int) -> Iterator[tuple[str, Path, bytes]]:
    for _ in range(count):
        path = generator.choice(files)
        content = bytearray(path.read_bytes())
        spot, bit = generator.randrange(len(content)), generator.randrange(8)
        content[spot] ^= 1 << bit
        yield f"bit {bit} of byte {spot} of {path.name} flipped", path, bytes(content)


def _cuts(files: list[Path], every: int) -> Iterator[tuple[str, Path, bytes]]:
    for path in files:
        content = path.read_bytes()
        for length in range(0, len(content), every):
            yield f"{path.name} cut to {length} bytes", path, content[:length]


@contextmanager
def _copied(made: Path) -> Iterator[Path]:
    copy = made.with_name("copy")
    shutil.copytree(made, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def _killed_child(directory: Path, after_s: float) -> dict[int, str]:
    """Forks a writer and kills it after a time; returns the steps and digests that it reported as committed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _write_for_ever(directory, writing)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(after_s)  # the kill happens at a random moment
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = [line.split() for line in [first, *lines] if line.endswith("\n")]
    return {int(step): digest for step, digest in whole if step != "ready"}


def _write_for_ever(directory: Path, report: int) -> None:
    """Resumes in the child, writes checkpoints and reports each once it is committed."""
    try:
        os.write(report, b"ready 0\n")
        training = broad_training()
        with opened(directory) as storage:
            step = max([0, *(row.global_step for row in storage.checkpoints.restore_points())])
            while True:
                step += 1
                training.position = Position(step, 1)
                row = storage.checkpoints.write(training.state().copy())
                os.write(report, f"{step} {row.digest}\n".encode())
    finally:
        os._exit(1)


def _after_kill(directory: Path, reported: dict[int, str]) -> list[str]:
    problems = []
    with opened(directory) as storage:
        points = storage.checkpoints.restore_points()
        newest = max(reported, default=0)
        if storage.journal_damage is not None:
            problems.append(f"the journal was called damaged: {storage.journal_damage}")
        if reported and (not points or points[-1].global_step < newest):
            problems.append(f"step {newest} was reported as committed and is not there")
        problems += [f"{finding.name}: {finding.detail}" for finding in inspect_storage(directory) if finding.bad]
        problems += [
            f"step {r.global_step} has another digest"
            for r in points
            if reported.get(r.global_step, r.digest) != r.digest
        ]
        expected = {step for step in reported if step > newest - 2}
        problems += [f"step {step} is lost" for step in expected - {row.global_step for row in points}]
        if any(name.name.startswith(".") for name in (directory / "checkpoints").iterdir()):
            problems.append("something partial is left")
    return problems


def main() -> int:
    """Runs all tests and prints the problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="2,000 flips and 500 kills instead of 200 and 15")
    parser.add_argument("--kills-only", action="store_true")
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flips, kills, seed = (2000, 500, arguments.seed) if arguments.full else (200, 15, arguments.seed)
    tortures: dict[str, Callable[[], list[str]]] = {
        f"{flips} flips and cuts in a checkpoint": lambda: harm_checkpoints(seed, flips, every=BLOCK),
        f"{flips} flips and cuts in the journal": lambda: harm_journal(seed, flips, every=BLOCK, with_log=False),
        f"{flips} flips and cuts in its log": lambda: harm_journal(seed, flips, every=BLOCK, with_log=True),
        f"{kills} kills": lambda: kill_while_writing(seed, kills),
    }
    found = 0
    for name, torture in list(tortures.items())[-1 if arguments.kills_only else 0 :]:
        started_s = time.monotonic()
        wrong = torture()
        found += len(wrong)
        lines = [f"{name}: {len(wrong)} wrong, {time.monotonic() - started_s:.1f} s", *wrong[:20]]
        sys.stdout.write("\n  ".join(lines) + "\n")
        sys.stdout.flush()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
