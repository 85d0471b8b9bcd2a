"""One reference peer as a child process: started, heard, ended. Owns its pipes, not when it is started."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream

from tolaria.config import Address
from tolaria.errors import PeerUnavailableError
from tolaria.peers.connect import Peer

_ANNOUNCEMENT_BYTES_MAX = 4096
_LAST_WORDS_CHARACTERS = 2000
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class PeerProcess:
    """A running child. Somebody must run `collect`; `stop` and `close` end it."""

    peer: Peer
    process: Process
    said_all: anyio.Event = field(default_factory=anyio.Event)
    _last_words: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    def last_words(self) -> str:
        """The last that it wrote to standard error."""
        return "".join(self._last_words).strip()[-_LAST_WORDS_CHARACTERS:]

    def obituary(self) -> str:
        """How it ended, and its last words."""
        words = self.last_words()
        return f"ended with code {self.process.returncode}" + (f": {words}" if words else "")

    async def announced(self) -> str:
        """Where it listens, as host:port: its first line on standard output, {"listening": "host:port"}.

        Raises:
            PeerUnavailableError: when it dies first, or says something else.
        """
        try:
            line = await BufferedByteReceiveStream(_pipe(self.process.stdout)).receive_until(
                b"\n", _ANNOUNCEMENT_BYTES_MAX
            )
        except (anyio.IncompleteRead, anyio.BrokenResourceError):
            await self.process.wait()
            await self.said_all.wait()
            raise PeerUnavailableError(self.peer, self.obituary()) from None
        except anyio.DelimiterNotFound:
            raise PeerUnavailableError(self.peer, "announced itself with a line that has no end") from None
        try:
            return str(Address.parse(json.loads(line)["listening"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PeerUnavailableError(self.peer, f"announced itself with {line[:200]!r}") from None

    async def collect(self) -> None:
        """Keep the last that it writes to standard error; read on, so that it never waits for a reader."""
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for text in TextReceiveStream(_pipe(self.process.stderr), errors="replace"):
                self._last_words.append(text[-_LAST_WORDS_CHARACTERS:])
                _log.debug("peer wrote", peer=self.peer, text=text.rstrip())
        self.said_all.set()

    async def died(self) -> None:
        """Return once it has ended. What it writes to standard output meanwhile is nobody's."""
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for _ in _pipe(self.process.stdout):
                pass
        await self.process.wait()

    async def discard(self) -> None:
        """End it at once, whatever it does, and give back its pipes; cancellation does not skip that."""
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.aclose()


async def spawn(
    peer: Peer, command: Sequence[str], environment: Mapping[str, str], listen: str, options: Sequence[str] = ()
) -> PeerProcess:
    """Run `command peer NAME --listen LISTEN --while-stdin` with `options`.

    Once it runs its handle is returned, cancelled or not.

    Raises:
        PeerUnavailableError: when there is no such command.
    """
    arguments = [*command, "peer", peer, "--listen", listen, "--while-stdin", *options]
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
    return PeerProcess(peer, process)


async def stop(children: Sequence[PeerProcess], timeout_s: float) -> None:
    """End all, side by side: by the end of their input, by SIGTERM, by SIGKILL, each after `timeout_s` in vain."""
    with anyio.CancelScope(shield=True):
        for child in children:
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
