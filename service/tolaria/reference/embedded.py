"""The reference peers as child processes of this one: started, watched, and gone when the block ends.

Owns the processes and their pipes. Must not know what the peers serve.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

from tolaria.config import Address
from tolaria.errors import PeerUnavailableError
from tolaria.reference.serve import Peer

BOTH: tuple[Peer, ...] = ("tamiyo", "kasmina")
_ANNOUNCEMENT_BYTES_MAX = 4096
_LAST_WORDS_CHARACTERS = 2000
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """Where the peers listen, as host:port; empty for one that was not asked for. `pids` are their processes."""

    tamiyo: str
    kasmina: str
    pids: tuple[int, ...]


@dataclass(slots=True)
class _Child:
    peer: Peer
    process: Process
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    said_all: anyio.Event = field(default_factory=anyio.Event)
    stopping: bool = False

    def obituary(self) -> str:
        """How it ended and the last that it wrote to standard error."""
        words = "".join(self.last_words).strip()[-_LAST_WORDS_CHARACTERS:]
        return f"ended with code {self.process.returncode}" + (f": {words}" if words else "")


@asynccontextmanager
async def embedded_pair(
    environment: Mapping[str, str],
    peers: Sequence[Peer] = BOTH,
    *,
    command: Sequence[str] = (sys.executable, "-m", "tolaria"),
    board: Path | None = None,
    start_timeout_s: float = 30.0,
    stop_timeout_s: float = 3.0,
) -> AsyncIterator[EmbeddedPair]:
    """Run `command peer NAME --listen 127.0.0.1:0 --while-stdin` for each of `peers` while the block runs.

    With a `board` they attend it too.

    A child's first line on standard output is {"listening": "host:port"}. It ends with its standard input, so that it
    outlives this process in no case. One that dies within the block is logged, and calls to it fail. At the end each
    has `stop_timeout_s` to go by itself and as long again after SIGTERM, then it is killed; cancellation does not skip
    that.

    Raises:
        PeerUnavailableError: when a child cannot be started, dies, or is silent for `start_timeout_s`.
    """
    children: list[_Child] = []
    try:
        async with anyio.create_task_group() as watchers:
            try:
                for peer in peers:
                    children.append(await _spawn(peer, command, environment, board))
                    watchers.start_soon(_collect, children[-1])
                targets = await _targets(children, start_timeout_s)
                for child in children:
                    watchers.start_soon(_watch, child)
                pids = tuple(child.process.pid for child in children)
                yield EmbeddedPair(targets.get("tamiyo", ""), targets.get("kasmina", ""), pids)
            finally:
                await _stop(children, stop_timeout_s)
                watchers.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Watchers raise nothing: the one error inside is the block's own, and its caller knows it by its own type.
        if len(group.exceptions) != 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
    finally:
        with anyio.CancelScope(shield=True):
            for child in children:
                await child.process.aclose()


async def _spawn(peer: Peer, command: Sequence[str], environment: Mapping[str, str], board: Path | None) -> _Child:
    arguments = [*command, "peer", peer, "--listen", "127.0.0.1:0", "--while-stdin"]
    arguments += [] if board is None else [f"--board={board}"]
    # Shielded, since a process that is half started belongs to nobody who could end it.
    with anyio.CancelScope(shield=True):
        try:
            # A session of its own: Ctrl-C in a terminal is for Tolaria, which drains before its peers may go.
            process = await anyio.open_process(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerUnavailableError(peer, f"cannot be started: {error}") from error
    return _Child(peer, process)


async def _targets(children: Sequence[_Child], timeout_s: float) -> dict[Peer, str]:
    """Every child's announced target. They start side by side; the time is for all of them together."""
    targets: dict[Peer, str] = {}
    with anyio.move_on_after(timeout_s):
        for child in children:
            targets[child.peer] = await _announced(child)
    for child in children:
        if child.peer not in targets:
            words = "".join(child.last_words).strip()[-_LAST_WORDS_CHARACTERS:]
            detail = f"has not announced where it listens within {timeout_s:g} s"
            raise PeerUnavailableError(child.peer, f"{detail}: {words}" if words else detail)
    return targets


async def _announced(child: _Child) -> str:
    try:
        line = await BufferedByteReceiveStream(_pipe(child.process.stdout)).receive_until(
            b"\n", _ANNOUNCEMENT_BYTES_MAX
        )
    except (anyio.IncompleteRead, anyio.BrokenResourceError):
        await child.process.wait()
        await child.said_all.wait()
        raise PeerUnavailableError(child.peer, child.obituary()) from None
    except anyio.DelimiterNotFound:
        raise PeerUnavailableError(child.peer, "announced itself with a line that has no end") from None
    try:
        return str(Address.parse(json.loads(line)["listening"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PeerUnavailableError(child.peer, f"announced itself with {line[:200]!r}") from None


async def _collect(child: _Child) -> None:
    """Keep the last that a child wrote to standard error; read on, so that it never waits for a reader."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for text in TextReceiveStream(_pipe(child.process.stderr), errors="replace"):
            child.last_words.append(text[-_LAST_WORDS_CHARACTERS:])
            _log.debug("peer wrote", peer=child.peer, text=text.rstrip())
    child.said_all.set()


async def _watch(child: _Child) -> None:
    """Tell of a death that nobody asked for. Its calls fail from then on, which the training lives with."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async for _ in _pipe(child.process.stdout):
            pass
    await child.process.wait()
    if not child.stopping:
        _log.warning("embedded peer died", peer=child.peer, detail=child.obituary())


async def _stop(children: Sequence[_Child], timeout_s: float) -> None:
    """End every child: by the end of its input, by SIGTERM, by SIGKILL, whichever it obeys first."""
    with anyio.CancelScope(shield=True):
        for child in children:
            child.stopping = True
            if child.process.stdin is not None:
                await child.process.stdin.aclose()
        for request in (None, signal.SIGTERM, signal.SIGKILL):
            left = [child for child in children if child.process.returncode is None]
            for child in left:
                if request is not None:
                    _log.warning("embedded peer does not stop", peer=child.peer, then=request.name)
                    with suppress(ProcessLookupError):
                        child.process.send_signal(request)
            with anyio.move_on_after(timeout_s):
                for child in left:
                    await child.process.wait()


def _pipe(stream: ByteReceiveStream | None) -> ByteReceiveStream:
    if stream is None:
        raise RuntimeError("the process was started without this pipe")
    return stream
