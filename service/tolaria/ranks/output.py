"""`OutputThread`: writes to a stream of this process from a thread: a reader who stops does not stop the writer.

`tolaria lane join` writes what its ranks write, on the event loop that sends its heartbeats: with a full pipe that
loop would stand still, and the service would declare a sound machine lost.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType
from typing import Final, Self

_CHARACTERS_MAX: Final = 1 << 20
_FLUSH_TIMEOUT_S: Final = 1.0


class OutputThread:
    """Writes text to a descriptor in a daemon thread that runs while the context is open.

    Text is dropped while a mebibyte of it waits, and then its length is written instead. The exit waits until all is
    written, at most a second if the stream is blocked.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._texts: deque[str] = deque()
        self._waiting = self._dropped = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"tolaria-output-{descriptor}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_FLUSH_TIMEOUT_S)

    def line(self, text: str) -> None:
        """Queues a line without blocking."""
        self.write(f"{text}\n")

    def write(self, text: str) -> None:
        """Queues text without blocking."""
        with self._changed:
            if self._waiting + len(text) > _CHARACTERS_MAX:
                self._dropped += len(text)
                return
            self._texts.append(text)
            self._waiting += len(text)
            self._changed.notify()

    def _run(self) -> None:
        while text := self._take():
            data = memoryview(text.encode(errors="replace"))
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # a broken pipe: there is no reader, now or later
                continue

    def _take(self) -> str:
        """Waits for text; returns all of it, or nothing once closing and all is written."""
        with self._changed:
            while not self._texts:
                if self._closing:
                    return ""
                self._changed.wait()
            text, dropped = "".join(self._texts), self._dropped
            self._texts.clear()
            self._waiting = self._dropped = 0
        return text + (f"\n({dropped} characters were dropped, since this was not read)\n" if dropped else "")
