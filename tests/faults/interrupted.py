"""Migrations, backups and restorations that are killed, or whose system calls fail, at every step.

    LD_PRELOAD=.../syscalls.so python tests/faults/interrupted.py ACTION RUNS MODE...

Runs ACTION in a forked process RUNS times (0: once for each call that changes files); a call kills the process
(`kill`), fails (`fail`), or begins to fail for good (`fail-for-good`). Then looks at what is left, as the next user
does. Prints the number of calls and one line for each problem.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tolaria.checkpoint.archive import PARTIAL, open_backup
from tolaria.checkpoint.backup import make_backup
from tolaria.checkpoint.directory import BACKUPS, JOURNAL, locked_directory
from tolaria.checkpoint.inspection import Condition, inspect_storage
from tolaria.checkpoint.restoration import refuse_unfinished_restore, restore_backup
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.checkpoint.upgrade import downgrade_state, upgrade_state
from tolaria.errors import StateRefusedError, TolariaError
from tolaria.journal.reader import read_journal, schema_of
from tolaria.journal.rows import ROW_TYPES, SCHEMA_VERSION, Row, VersionRow

FIXTURE = Path(__file__).parents[1] / "fixtures" / "state-0.1.0.tar.gz"
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
MODES = {"count": 0, "kill": 1, "fail": 2, "fail-for-good": 3}
CALLS_MAX = 5000


@dataclass(frozen=True)
class Action:
    """What is interrupted in a directory `place`, and the problems of what an interruption has left there."""

    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    problems: Callable[[Path], list[str]]


def unpack(place: Path) -> None:
    """Puts a state of version 0.1.0, with three checkpoints, into place/state."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(place, filter="data")


def rows_of(directory: Path) -> list[Row]:
    """All rows but those of versions."""
    return [row for kind in ROW_TYPES if kind is not VersionRow for row in read_journal(directory / JOURNAL, kind)]


def state_problems(directory: Path, rows: list[Row], schemas: set[int]) -> list[str]:
    """A state directory must have one of these schemas, exactly these rows, and whole checkpoints."""
    found = []
    if (schema := schema_of(directory / JOURNAL)) not in schemas:
        found.append(f"schema {schema}")
    if rows_of(directory) != rows:
        found.append("rows differ")
    bad = [finding for finding in inspect_storage(directory) if finding.condition != Condition.WHOLE]
    return found + [f"{finding.name}: {finding.condition}, {finding.detail}" for finding in bad]


def whole_backups(directory: Path) -> list[Path]:
    """Those in the state directory, each verified; the names of others end in .partial."""
    found = [path for path in (directory / BACKUPS).glob("*") if path.suffix != PARTIAL and path.name[0] != "."]
    for path in found:
        with open_backup(path) as backup:
            backup.verify()
    return found


def upgrade(place: Path) -> None:
    """Upgrades as a start of the service does."""
    with locked_directory(place / "state"):
        upgrade_state(place / "state")


def upgrade_problems(place: Path) -> list[str]:
    """The old schema or the new one, nothing lost; the next start completes it, with the old state in a backup."""
    state = place / "state"
    found = state_problems(state, ROWS, {1, SCHEMA_VERSION})
    if schema_of(state / JOURNAL) == SCHEMA_VERSION and len(whole_backups(state)) != 1:
        found.append("upgraded without a backup")
    storage = open_storage(state, run_id="r", retention=Retention(last=3, best="highest"))
    with storage.journal:
        if storage.journal_damage or any((storage.repairs.adopted, storage.repairs.missing)):
            found.append(f"the next start repairs: {storage.journal_damage} {storage.repairs}")
    found += state_problems(state, ROWS, {SCHEMA_VERSION})
    (backup,) = whole_backups(state)
    if rows_of(backup) != ROWS or schema_of(backup / JOURNAL) != 1:
        found.append("the backup is not the old state")
    if left := [p.name for p in (state / BACKUPS).iterdir() if p != backup and p.suffix != PARTIAL]:
        found.append(f"left over: {left}")
    return found


def prepare_downgrade(place: Path) -> None:
    """Upgrades the state first."""
    unpack(place)
    upgrade(place)


def downgrade(place: Path) -> None:
    """Downgrades as the command does."""
    with locked_directory(place / "state"):
        downgrade_state(place / "state", 1)


def downgrade_problems(place: Path) -> list[str]:
    """The new schema or the old one, nothing lost; repeating the command completes it."""
    state = place / "state"
    found = state_problems(state, ROWS, {1, SCHEMA_VERSION})
    if schema_of(state / JOURNAL) == SCHEMA_VERSION:
        downgrade(place)
    found += state_problems(state, ROWS, {1})
    if {schema_of(path / JOURNAL) for path in whole_backups(state)} != {1, SCHEMA_VERSION}:
        found.append("downgraded without a backup")
    return found


def backup(place: Path) -> None:
    """Makes a backup that is a directory."""
    make_backup(place / "state", place / "copy")


def backup_file(place: Path) -> None:
    """Makes a backup that is one file."""
    make_backup(place / "state", place / "copy.tar")


def backup_problems(place: Path) -> list[str]:
    """What has the name is whole. The state is as before, and the command can be repeated."""
    found = state_problems(place / "state", ROWS, {1})
    for to in (place / "copy", place / "copy.tar"):
        if to.exists():
            found += restored_problems(to, place / f"new-{to.name}")
        else:
            make_backup(place / "state", to)
            found += restored_problems(to, place / f"again-{to.name}")
    if left := sorted({p.name for p in place.iterdir() if p.suffix == PARTIAL or "scratch" in p.name}):
        found.append(f"left over: {left}")
    return found


def restored_problems(source: Path, directory: Path) -> list[str]:
    """Problems of a backup once it is restored."""
    directory.mkdir()
    restore_backup(source, directory, replace=False)
    return state_problems(directory, ROWS, {1})


def prepare_restore(place: Path) -> None:
    """Makes a backup of the old state, and a directory with another one, in use until a crash."""
    unpack(place)
    make_backup(place / "state", place / "copy")
    (place / "state").rename(place / "old")
    shutil.copytree(place / "old", place / "state")
    upgrade(place)
    (place / "state" / f"{JOURNAL}-wal").write_bytes(b"a log that must not meet another journal")


def restore(place: Path) -> None:
    """Replaces the other state, and says so."""
    with locked_directory(place / "state"):
        restore_backup(place / "copy", place / "state", replace=True)
    (place / "said").touch()


def restore_problems(place: Path) -> list[str]:
    """As before, refused, or restored; repeating the command restores it. The replaced state is kept."""
    state, found = place / "state", []
    refused = False
    try:
        refuse_unfinished_restore(state)
    except StateRefusedError:
        refused = True
    if not refused:
        log = state / f"{JOURNAL}-wal"
        if log.exists():
            log.unlink()
        found += state_problems(state, ROWS, {1, SCHEMA_VERSION})
        if (place / "said").exists() and schema_of(state / JOURNAL) != 1:
            found.append("reported, and not restored")
    if refused or schema_of(state / JOURNAL) != 1:
        restore(place)
    found += state_problems(state, ROWS, {1})
    replaced = list(state.glob("replaced-*"))
    if len(replaced) != 1 or (replaced[0] / "checkpoints").is_dir() is False:
        found.append(f"replaced: {replaced}")
    elif (log := replaced[0] / f"{JOURNAL}-wal").exists():
        log.unlink()
    found += [f"replaced: {problem}" for place in replaced for problem in state_problems(place, ROWS, {SCHEMA_VERSION})]
    return found


ACTIONS = {
    "upgrade": Action(unpack, upgrade, upgrade_problems),
    "downgrade": Action(prepare_downgrade, downgrade, downgrade_problems),
    "backup": Action(unpack, backup, backup_problems),
    "backup-file": Action(unpack, backup_file, backup_problems),
    "restore": Action(prepare_restore, restore, restore_problems),
}
ROWS: list[Row] = []


def forked(action: Action, place: Path, number: int, mode: str) -> tuple[int, int]:
    """Runs the action in a child process whose call of this number is interrupted.

    Returns:
        How the child ended (0: done, 1: an expected error, 2: another one, else minus the signal), and its calls.
    """
    library = ctypes.CDLL(None)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            library.syscalls_arm(ctypes.c_long(number), MODES[mode])
            action.run(place)
            code = 0
        except (TolariaError, OSError):
            code = 1
        finally:
            os.write(writing, str(library.syscalls_counted()).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as counted:
        calls = int(counted.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls


def interrupt(action: Action, made: Path, number: int, mode: str) -> list[str]:
    """Interrupts the action at one call, in a copy of the prepared directory; returns the problems."""
    place = made.with_name("place")
    shutil.copytree(made, place)
    try:
        code, _ = forked(action, place, number, mode)
        expected = {-signal.SIGKILL} if mode == "kill" else {0, 1}
        found = [] if code in expected else [f"ended with {code}"]
        return found + action.problems(place)
    except (TolariaError, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        shutil.rmtree(place)


def main(name: str, runs: int, modes: Sequence[str]) -> int:
    """Interrupts the action in each of these ways; prints the number of calls and the problems.

    `runs` is the number of interruptions of each kind, spread over all calls; 0: one before each call.
    """
    action = ACTIONS[name]
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        unpack(made)
        ROWS.extend(rows_of(made / "state"))
        shutil.rmtree(made / "state")
        action.prepare(made)
        counting = Path(folder) / "counting"
        shutil.copytree(made, counting)
        code, calls = forked(action, counting, 0, "count")
        problems = [f"uninterrupted: ended with {code}"] if code else action.problems(counting)
        for turn, mode in enumerate(modes):
            every = max(1, calls // runs) if runs else 1
            for number in range(1 + turn * every // len(modes), calls + 1, every):
                problems += [f"{mode}, call {number}: {problem}" for problem in interrupt(action, made, number, mode)]
    sys.stdout.write("\n".join([f"{calls} calls", *problems]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
