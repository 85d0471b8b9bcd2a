"""Migrations, backups and restorations at whose n-th call the power fails: what was not flushed is lost.

    LD_PRELOAD=.../syscalls.so python tests/faults/power_loss.py ACTION RUNS

Runs an action of `interrupted` once, with each call recorded that changes files. Then replays every beginning of that
record: for each of several ways in which a file system may lose what was not flushed, it makes the directory that a
disk has then, and looks at it as the next user does. RUNS of these (0: all) that differ are looked at, spread evenly,
with the last one, after which nothing that was reported done may be missing. Prints the numbers of calls and of
directories, and one line for each problem.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.interrupted import ACTIONS, IN_MEMORY, ROWS, Action, rows_of, unpack, whole_backups
from tolaria.checkpoint.directory import JOURNAL
from tolaria.errors import TolariaError
from tolaria.journal.reader import schema_of
from tolaria.journal.rows import SCHEMA_VERSION

WAYS = {"nothing": (True, True), "names only": (False, True), "contents only": (True, False)}
"""What of the rest the disk has: (only names that were flushed, only contents that were flushed)."""

NOT_KEPT = "-shm"
"""Files whose mapped memory is written without calls: SQLite makes them anew."""


@dataclass(eq=False)
class File:
    """A file: its bytes, and those that have been flushed."""

    content: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


@dataclass(eq=False)
class Directory:
    """A directory: its entries by name, and those that have been flushed."""

    entries: dict[str, File | Directory] = field(default_factory=dict)
    flushed: dict[str, File | Directory] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call that has changed files."""

    name: str
    inode: int
    at: int
    path: str
    other: str
    content: bytes


class Disk:
    """The files below a directory, all of them flushed at first, and what calls make of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._inodes: dict[int, File | Directory] = {}
        self.top = self._read(root)
        self._moves: list[tuple[File | Directory, Directory, str, Directory, str]] = []

    def _read(self, place: Path) -> Directory:
        found = Directory()
        self._inodes[place.stat().st_ino] = found
        for path in place.iterdir():
            node = self._read(path) if path.is_dir() else File(bytearray(content := path.read_bytes()), content)
            found.entries[path.name] = self._inodes[path.stat().st_ino] = node
        found.flushed = dict(found.entries)
        return found

    def _parent(self, path: str) -> tuple[Directory, str]:
        *parents, name = Path(path).relative_to(self._root).parts
        node = self.top
        for parent in parents:
            below = node.entries[parent]
            assert isinstance(below, Directory)
            node = below
        return node, name

    def apply(self, call: Call) -> None:
        """Changes what the system shows; what the disk has changes with a flush."""
        match call.name:
            case "open" | "mkdir":
                parent, name = self._parent(call.path)
                if name not in parent.entries:
                    parent.entries[name] = File() if call.name == "open" else Directory()
                self._inodes[call.inode] = parent.entries[name]
            case "rename":
                (old, old_name), (new, new_name) = self._parent(call.path), self._parent(call.other)
                new.entries[new_name] = node = old.entries.pop(old_name)
                if old is not new:
                    self._moves.append((node, old, old_name, new, new_name))
            case "unlink":
                parent, name = self._parent(call.path)
                del parent.entries[name]
            case "write" | "truncate" if call.inode in self._inodes:
                self._write(self._inodes[call.inode], call)
            case "sync" if call.inode in self._inodes:
                node = self._inodes[call.inode]
                node.flushed = bytes(node.content) if isinstance(node, File) else dict(node.entries)
                self._complete_moves(node)

    def _complete_moves(self, flushed: File | Directory) -> None:
        """Flushes a move between two directories as a whole with either of them: that is one entry of a log."""
        for node, old, old_name, new, new_name in [move for move in self._moves if flushed in (move[1], move[3])]:
            if old.flushed.get(old_name) is node:
                del old.flushed[old_name]
            if new.entries.get(new_name) is node:
                new.flushed[new_name] = node
            self._moves.remove((node, old, old_name, new, new_name))

    def _write(self, node: File | Directory, call: Call) -> None:
        assert isinstance(node, File)
        if call.name == "truncate":
            del node.content[call.at :]
            node.content.extend(bytes(call.at - len(node.content)))
        else:
            node.content.extend(bytes(max(0, call.at - len(node.content))))
            node.content[call.at : call.at + len(call.content)] = call.content

    def image(self, *, flushed_names: bool, flushed_contents: bool) -> dict[str, bytes | None]:
        """Returns the bytes of all files by path, None for directories."""
        found: dict[str, bytes | None] = {}
        waiting: list[tuple[str, Directory]] = [("", self.top)]
        while waiting:
            prefix, directory = waiting.pop()
            for name, node in (directory.flushed if flushed_names else directory.entries).items():
                if isinstance(node, Directory):
                    found[prefix + name] = None
                    waiting.append((f"{prefix}{name}/", node))
                else:
                    found[prefix + name] = node.flushed if flushed_contents else bytes(node.content)
        return found


def recorded(action: Action, place: Path, record: Path) -> list[Call]:
    """Runs the action in a child process, which must succeed; returns its calls that have changed files."""
    library = ctypes.CDLL(None)
    child = os.fork()
    if child == 0:
        code = 2
        try:
            library.syscalls_record(os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            action.run(place)
            code = 0
        finally:
            library.syscalls_record(-1)
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return [call for call in _calls(record.read_bytes()) if not call.path or call.path.startswith(f"{place}/")]


def _calls(text: bytes) -> Iterator[Call]:
    position = 0
    while position < len(text):
        end = text.index(b"\n", position)
        name, *numbers = text[position:end].decode().split()
        inode, at, *lengths = map(int, numbers)
        parts, position = [], end + 1
        for length in lengths:
            parts.append(text[position : position + length])
            position += length
        yield Call(name, inode, at, parts[0].decode(), parts[1].decode(), parts[2])


def write(place: Path, image: dict[str, bytes | None]) -> None:
    """Makes a directory with these files."""
    place.mkdir()
    for path, content in sorted(image.items()):
        if content is None:
            (place / path).mkdir(mode=0o700)
        elif not path.endswith(NOT_KEPT):
            (place / path).write_bytes(content)


def is_done(name: str, place: Path) -> bool:
    """Whether an action that has been reported as done has lasted."""
    if name.startswith("backup"):
        return (place / "copy").exists() or (place / "copy.tar").exists()
    wanted = SCHEMA_VERSION if name == "upgrade" else 1
    backed_up = {"upgrade": 1, "downgrade": 2}.get(name, 0)
    return schema_of(place / "state" / JOURNAL) == wanted and len(whole_backups(place / "state")) >= backed_up


def directories_after(disk: Disk, calls: Sequence[Call]) -> list[tuple[str, dict[str, bytes | None]]]:
    """Returns what a disk may have after a loss of power, each once, with where and how it came to be.

    The last one is what it has after the last call.
    """
    found, seen = [], set[int]()
    for number in range(len(calls) + 1):
        if number:
            disk.apply(calls[number - 1])
        for way, (names, contents) in WAYS.items():
            image = disk.image(flushed_names=names, flushed_contents=contents)
            key = hash(tuple(sorted(image.items(), key=lambda item: item[0])))
            if key not in seen or (number == len(calls) and way == "nothing"):
                seen.add(key)
                found.append((f"{way} of the rest, after call {number}", image))
    last = next(each for each in found if each[0] == f"nothing of the rest, after call {len(calls)}")
    return [*(each for each in found if each is not last), last]


def shown_otherwise(disk: Disk, place: Path) -> list[str]:
    """Whether the record lacks calls: the files as the system shows them are those that it leads to."""
    image = disk.image(flushed_names=False, flushed_contents=False)
    real = {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in place.rglob("*")}
    return sorted(n for n in image.keys() | real.keys() if image.get(n) != real.get(n) and not n.endswith(NOT_KEPT))


def problems_of(name: str, action: Action, place: Path, image: dict[str, bytes | None], *, last: bool) -> list[str]:
    """Makes the directory, and returns what the next user finds wrong."""
    write(place, image)
    try:
        found = ["what was reported as done is lost"] if last and not is_done(name, place) else []
        return found + action.problems(place)
    except (TolariaError, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        shutil.rmtree(place)


def main(name: str, runs: int) -> int:
    """Lets the power fail at each call of the action; prints the numbers and the problems."""
    action = ACTIONS[name]
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        place = Path(folder) / "place"
        place.mkdir()
        unpack(place)
        ROWS.extend(rows_of(place / "state"))
        shutil.rmtree(place / "state")
        action.prepare(place)
        disk = Disk(place)
        calls = recorded(action, place, Path(folder) / "record")
        found = directories_after(disk, calls)
        problems = [f"the record lacks calls: {path}" for path in shown_otherwise(disk, place)]
        shutil.rmtree(place)
        every = max(1, len(found) // runs) if runs else 1
        for how, image in [*found[:-1:every], found[-1]]:
            last = image is found[-1][1]
            problems += [f"{how}: {problem}" for problem in problems_of(name, action, place, image, last=last)]
    sys.stdout.write("\n".join([f"{len(calls)} calls, {len(found)} directories", *problems]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
