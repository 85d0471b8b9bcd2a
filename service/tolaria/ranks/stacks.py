"""The Python stacks of the service and of the lane: each process dumps its own into memory, for others to read.

A thread makes the dump, which holds the GIL meanwhile, so that no other thread changes its stack. A process that holds
its GIL does not answer like that: a handler in C makes the dump then, without the GIL. Where threads run, it would now
and then read a stack that changes, and end the process by SIGSEGV.

A dump leaves nothing on the disk of the machine, unless `append_stacks` writes it to `STACKS_FILE`, in the state
directory of the service. All texts are bounded.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from tolaria.filesystem import open_to_append
from tolaria.ranks.local_ranks import state_of

CHARACTERS_MAX: Final = 12_000
"""Characters of one process's stacks: about 150 frames."""

STACKS_FILE: Final = "stacks.txt"

STACKS_SIGNAL: Final = signal.SIGUSR1
"""Has a process dump the stacks of its threads without its GIL."""

_DUMP_CHARACTERS: Final = 2**20
_STACKS_CHARACTERS_MIN: Final = 400
_FILE_BYTES_MAX: Final = 4 * 2**20
_MEMORY: Final = "tolaria-stacks"
_REQUEST, _END = b"?", b"."
_DONE: Final = b"\n-- end --\n"
"""Follows a dump that a thread has made."""

_THREAD_ANSWERS_S: Final = 2.0
"""How long a process is given before its stacks are dumped without its GIL: it may only be slow."""

_ANSWER_S: Final = 3.0
_QUIET_S: Final = 0.05
"""A dump of the handler in C has no end mark: it is over when nothing has been added for so long."""

_POLL_S: Final = 0.01
_NO_MAIN: Final = "the main thread is not shown"
_PLACES_MAX: Final = 8
_RANKS_SHOWN: Final = 6
_THREADS: Final = re.compile(r"^(?=Thread |Current thread )", re.MULTILINE)
_THREAD: Final = re.compile(r"(?:Thread|Current thread) (0x[0-9a-f]+)")
_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$', re.MULTILINE)


def dump_on_request() -> Callable[[], None]:
    """Has the stacks of all threads of this process dumped when `stacks_of` asks for them, into memory that it reads.

    The name of that memory file ends with the number of the pipe's end by which a thread is asked for a dump, and the
    id of the main thread. Returns a function that ends this. The main thread calls this and that function.
    """
    requests, asking = os.pipe()
    name = f"{_MEMORY}-{asking}-{threading.main_thread().ident or 0:x}"
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # a reader empties it
    # Unregistering restores this: a late request must not end the process, the default action of the signal.
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, descriptor, all_threads=True, chain=False)
    answering = threading.Thread(
        target=_answer_requests, args=(requests, descriptor), name="tolaria-stacks", daemon=True
    )
    answering.start()

    def end() -> None:
        faulthandler.unregister(STACKS_SIGNAL)
        os.write(asking, _END)
        answering.join()
        for each in (descriptor, asking, requests):  # first that which names the pipe
            os.close(each)

    return end


def _answer_requests(requests: int, descriptor: int) -> None:
    while os.read(requests, 1) == _REQUEST:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        os.write(descriptor, _DONE)


def stacks_of(pids: Mapping[int, int]) -> dict[int, str]:
    """Returns the stacks of other processes, by rank as `pids` are; that of the main thread is first.

    In place of the stacks of a process that gives none, the text says why. Blocks for up to 3 seconds.
    """
    found, asked = dict[int, str](), dict[int, _Asked]()
    for rank, pid in pids.items():
        try:
            asked[rank] = _Asked(pid)
        except OSError as error:
            found[rank] = f"no stacks of process {pid}: {error.strerror or error}"
    began_s, has_signalled = time.monotonic(), False
    while (waited_s := time.monotonic() - began_s) < _ANSWER_S and not all(
        each.has_answered() for each in asked.values()
    ):
        if waited_s > _THREAD_ANSWERS_S and not has_signalled:
            for each in asked.values():
                each.signal()
            has_signalled = True
        time.sleep(_POLL_S)
    for rank, each in asked.items():
        found[rank] = each.take() or f"no stacks of process {each.pid} within {_ANSWER_S:g} s"
    return dict(sorted(found.items()))


def own_stacks() -> str:
    """Returns the stacks of this process; the main thread's is first. Raises OSError without memory for them."""
    has_memory = hasattr(os, "memfd_create")
    with os.fdopen(os.memfd_create("tolaria-own-stacks"), "w+b") if has_memory else tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file.fileno(), all_threads=True)
        return _shown(os.pread(file.fileno(), 100 * CHARACTERS_MAX, 0), threading.main_thread().ident or 0)


def summary(stacks: Mapping[int, str]) -> str:
    """Returns in one line where the main threads of the ranks are; ranks at the same place are named together."""
    if len(stacks) == 1:
        return _place(*stacks.values())
    places = dict[str, list[int]]()
    for rank, text in stacks.items():
        places.setdefault(_place(text), []).append(rank)
    said = [f"{_ranks(ranks)}: {place}" for place, ranks in places.items()]
    return "; ".join([*said[:_PLACES_MAX], *(["..."] if len(said) > _PLACES_MAX else [])])


def append_stacks(path: Path, why: str, stacks: Mapping[str, str], *, bytes_max: int = _FILE_BYTES_MAX) -> None:
    """Appends stacks, by what they are of, to a file; once that is larger than `bytes_max`, its newer half is kept.

    Raises OSError. Blocks, as long as the disk does.
    """
    most = max(_STACKS_CHARACTERS_MIN, min(CHARACTERS_MAX, _DUMP_CHARACTERS // max(1, len(stacks))))
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "".join(f"{name}:\n{each[:most]}\n" for name, each in stacks.items())
    descriptor = open_to_append(path)
    try:
        if os.fstat(descriptor).st_size > bytes_max:  # others append to it too, so that it is no other file
            with suppress(BlockingIOError):  # another one does this
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kept = path.read_bytes()[-bytes_max // 2 :]
                os.ftruncate(descriptor, 0)
                os.write(descriptor, kept)
        os.write(descriptor, f"{moment} {why}\n{text}\n".encode(errors="replace"))
    finally:
        os.close(descriptor)


class _Asked:
    """A process that has been asked for its stacks. Raises OSError if it cannot be asked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._memory, self._main = _request(pid)
        self._signalled = False
        self._size, self._changed_s = 0, 0.0

    def has_answered(self) -> bool:
        """Looks at its memory; returns whether the dump is complete."""
        now_s, size = time.monotonic(), os.fstat(self._memory).st_size
        if size != self._size:
            self._size, self._changed_s = size, now_s
        if size >= len(_DONE) and os.pread(self._memory, len(_DONE), size - len(_DONE)) == _DONE:
            return True
        return self._signalled and size > 0 and now_s - self._changed_s > _QUIET_S

    def signal(self) -> None:
        """Has it dump its stacks without its GIL if its thread has not begun to."""
        if not self._size:
            with suppress(OSError):  # it has ended
                if _catches(self.pid):  # else another process has its id by now, and the signal would end that one
                    os.kill(self.pid, STACKS_SIGNAL)
                    self._signalled = True

    def take(self) -> str:
        """Returns its stacks, bounded, and empties the memory, which is not used afterwards."""
        try:
            content = os.pread(self._memory, 100 * CHARACTERS_MAX, 0)
            os.ftruncate(self._memory, 0)
        finally:
            os.close(self._memory)
        return _shown(content, self._main)


def _request(pid: int) -> tuple[int, int]:
    """Has a process dump its stacks.

    Returns a descriptor of the memory with them, and the id of the main thread. Raises OSError if it cannot.
    """
    if not _catches(pid):  # the signal would end it
        raise OSError("it has just begun, or is none of this service's")
    folder = Path(f"/proc/{pid}/fd")
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a descriptor that has been closed meanwhile
            if (memory := path.readlink().name.partition(" ")[0]).startswith(f"memfd:{_MEMORY}-"):
                if (state := state_of(pid)) in {"T", "t"}:
                    raise OSError(f"it is stopped (state {state})")
                _, pipe, main = memory.rsplit("-", 2)
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.ftruncate(descriptor, 0)
                    _ask(folder / pipe)
                except OSError:
                    os.close(descriptor)
                    raise
                return descriptor, int(main, 16)
    raise OSError("it has no memory for them")


def _ask(pipe: Path) -> None:
    """Asks the thread that reads a pipe. Raises OSError."""
    if not stat.S_ISFIFO(pipe.stat().st_mode):  # its number is that of another file by now
        raise OSError("its pipe for requests is closed")
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, _REQUEST)
    finally:
        os.close(descriptor)


def _catches(pid: int) -> bool:
    """Whether a process has a handler of the signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _shown(content: bytes, main: int) -> str:
    """Returns what a dump says, bounded; the stack of the thread with the id `main` is first."""
    dump = dict[int, str]()  # the first one, if both the thread and the handler have made one
    for text in _THREADS.split(content.removesuffix(_DONE).decode("ascii", errors="replace")):
        if (thread := _THREAD.match(text)) is not None:
            dump.setdefault(int(thread[1], 16), text.strip())
    if not dump:
        return ""
    first = _THREAD.sub(r"Main thread \1", dump.pop(main, _NO_MAIN))
    others = [text for text in dump.values() if f" in {_answer_requests.__name__}" not in text]
    text = "\n".join([first, *others])
    return text if len(text) <= CHARACTERS_MAX else f"{text[:CHARACTERS_MAX]}\n..."


def _place(stacks: str) -> str:
    if (frame := _FRAME.search(stacks)) is None or stacks.startswith(_NO_MAIN):
        return stacks.partition("\n")[0]
    return f"{frame['name']} ({Path(frame['file']).name}:{frame['line']})"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [*ranks]
    more = f" and {len(numbers) - _RANKS_SHOWN} more" if len(numbers) > _RANKS_SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_RANKS_SHOWN]))}{more}"
