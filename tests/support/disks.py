"""A filesystem that fails or blocks on request."""

from __future__ import annotations

import threading

from tolaria.filesystem import Filesystem

WRITES = ["make_directory", "create", "write", "sync", "close", "sync_directory", "rename"]
"""The calls that writing a checkpoint makes."""


class FailingDisk(Filesystem):
    """Fails the calls of one kind a number of times, without effect, and reads only while `gate` is set.

    Controlled by the test's thread, and used by the writer's and by reading threads.
    """

    def __init__(self) -> None:
        self._call, self._code, self._times = "", 0, 0
        self.failed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()

    def fail(self, call: str, code: int, *, times: int = 10**9) -> None:
        """Makes the next `times` calls of this name fail with this errno."""
        self._call, self._code, self._times, self.failed = call, code, times, 0

    def repair(self) -> None:
        """Makes all calls succeed again."""
        self._times = 0

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        self.reading.set()
        assert self.gate.wait(180)
        return super().read_into(descriptor, buffer)

    def __getattribute__(self, name: str) -> object:
        if name in WRITES:
            Filesystem.__getattribute__(self, "_fail_if_chosen")(name)
        return super().__getattribute__(name)

    def _fail_if_chosen(self, name: str) -> None:
        if name == self._call and self._times > 0:
            self._times -= 1
            self.failed += 1
            raise OSError(self._code, "made to fail")
