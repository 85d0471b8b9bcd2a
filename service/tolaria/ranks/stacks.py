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
_ANSWER_S: Final = 1.5
_THREAD_ANSWERS_S: Final = 0.5
_QUIET_S: Final = 0.05
_POLL_S: Final = 0.01
_PLACES_MAX: Final = 8
_RANKS_SHOWN: Final = 6
_CURRENT: Final = "Current thread"
_THREADS: Final = re.compile(r"^(?=Thread |Current thread )", re.MULTILINE)
_THREAD: Final = re.compile(r"(?:Thread|Current thread) (0x[0-9a-f]+)")
_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$', re.MULTILINE)


def dump_on_request() -> Callable[[], None]:
    """Has the stacks of all threads of this process dumped when `stacks_of` asks for them, into memory that it reads.

    The name of the memory has the number of the descriptor to write a request to; `STACKS_SIGNAL` is another request.
    Returns a function that ends this. Both are for the main thread.
    """
    requests, asking = os.pipe()
    descriptor = os.memfd_create(f"{_MEMORY}-{asking}", os.MFD_CLOEXEC)
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
        for each in (asking, requests, descriptor):
            os.close(each)

    return end


def _answer_requests(requests: int, descriptor: int) -> None:
    while os.read(requests, 1) == _REQUEST:
        faulthandler.dump_traceback(descriptor, all_threads=True)


def stacks_of(pids: Mapping[int, int]) -> dict[int, str]:
    """Returns the stacks of processes, by rank as `pids` are; that of the main thread is first.

    In place of the stacks of a process that gives none, the text says why. Blocks for up to 1.5 seconds.
    """
    found, open_memory = dict[int, str](), dict[int, int]()
    for rank, pid in pids.items():
        try:
            open_memory[rank] = _request(pid)
        except OSError as error:
            found[rank] = f"no stacks of process {pid}: {error.strerror or error}"
    sizes, began_s, has_signalled = dict.fromkeys(open_memory, 0), time.monotonic(), False
    while open_memory and (waited_s := time.monotonic() - began_s) < _ANSWER_S:
        if waited_s > _THREAD_ANSWERS_S and not has_signalled:
            _signal([pids[rank] for rank, size in sizes.items() if not size])
            has_signalled = True
        time.sleep(_QUIET_S if all(sizes.values()) else _POLL_S)
        now = {rank: os.fstat(descriptor).st_size for rank, descriptor in open_memory.items()}
        if now == sizes and all(now.values()):
            break
        sizes = now
    for rank, descriptor in open_memory.items():
        found[rank] = _taken(descriptor) or f"no stacks of process {pids[rank]} within {_ANSWER_S:g} s"
    return dict(sorted(found.items()))


def summary(stacks: Mapping[int, str]) -> str:
    """Returns in one line where the main threads of the ranks are; ranks at the same place are named together."""
    if len(stacks) == 1:
        return _place(*stacks.values())
    places = dict[str, list[int]]()
    for rank, text in stacks.items():
        places.setdefault(_place(text), []).append(rank)
    said = [f"{_ranks(ranks)}: {place}" for place, ranks in places.items()]
    return "; ".join([*said[:_PLACES_MAX], *(["..."] if len(said) > _PLACES_MAX else [])])


def append_stacks(path: Path, why: str, stacks: Mapping[str, str]) -> None:
    """Appends stacks, by what they are of, to a file of which the newest part is kept. Raises OSError; blocks."""
    most = max(_STACKS_CHARACTERS_MIN, min(CHARACTERS_MAX, _DUMP_CHARACTERS // max(1, len(stacks))))
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "".join(f"{name}:\n{each[:most]}\n" for name, each in stacks.items())
    descriptor = open_to_append(path)
    try:
        if os.fstat(descriptor).st_size > _FILE_BYTES_MAX:  # others append to it too, so that it is no other file
            kept = path.read_bytes()[-_FILE_BYTES_MAX // 2 :]
            os.ftruncate(descriptor, 0)
            os.write(descriptor, kept)
        os.write(descriptor, f"{moment} {why}\n{text}\n".encode(errors="replace"))
    finally:
        os.close(descriptor)


def _request(pid: int) -> int:
    """Has a process dump its stacks; returns a descriptor of the memory with them. Raises OSError if it cannot."""
    if not _catches(pid):  # the signal would end it
        raise OSError("it has just begun, or is none of this service's")
    folder = Path(f"/proc/{pid}/fd")
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a descriptor that has been closed meanwhile
            if (memory := path.readlink().name.partition(" ")[0]).startswith(f"memfd:{_MEMORY}-"):
                if (state := state_of(pid)) in {"T", "t"}:
                    raise OSError(f"it is stopped (state {state})")
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.ftruncate(descriptor, 0)
                    _ask(folder / memory.rpartition("-")[2])
                except OSError:
                    os.close(descriptor)
                    raise
                return descriptor
    raise OSError("it has no memory for them")


def _ask(pipe: Path) -> None:
    """Asks the thread that reads a pipe. Raises OSError."""
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, _REQUEST)
    finally:
        os.close(descriptor)


def _signal(pids: Iterable[int]) -> None:
    """Has processes whose thread does not answer dump their stacks without their GIL."""
    for pid in pids:
        with suppress(OSError):  # it has ended
            if _catches(pid):  # else another process has its id by now, and the signal would end that one
                os.kill(pid, STACKS_SIGNAL)


def _catches(pid: int) -> bool:
    """Whether a process has a handler of the signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def _taken(descriptor: int) -> str:
    """Returns what lies in the memory, bounded, and empties it."""
    try:
        content = os.pread(descriptor, 100 * CHARACTERS_MAX, 0)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    dump = dict[str, str]()  # the first one, if both the thread and the handler have made one
    for text in _THREADS.split(content.decode("ascii", errors="replace")):
        if (thread := _THREAD.match(text)) is not None:
            dump.setdefault(thread[1], text.strip())
    threads = [text for text in dump.values() if f" in {_answer_requests.__name__}" not in text]
    # The main thread is the one that handled the signal; without one it is the oldest, which is listed last.
    main = next((text for text in threads if text.startswith(_CURRENT)), threads[-1] if threads else "")
    text = "\n".join([_THREAD.sub(r"Main thread \1", main), *(text for text in threads if text is not main)])
    return text if len(text) <= CHARACTERS_MAX else f"{text[:CHARACTERS_MAX]}\n..."


def _place(stacks: str) -> str:
    if (frame := _FRAME.search(stacks)) is None:
        return stacks.partition("\n")[0]
    return f"{frame['name']} ({Path(frame['file']).name}:{frame['line']})"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [*ranks]
    more = f" and {len(numbers) - _RANKS_SHOWN} more" if len(numbers) > _RANKS_SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_RANKS_SHOWN]))}{more}"
