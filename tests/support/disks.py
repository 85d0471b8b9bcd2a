"""Disks that fail, or stand, when a test tells them to."""

from __future__ import annotations

import threading

from tolaria.filesystem import Filesystem

WRITES = ["make_directory", "create", "write", "sync", "close", "sync_directory", "rename"]
"""Every kind of call that writing a checkpoint makes."""


class FailingDisk(Filesystem):
    """Fails the calls of one kind, once or until it is mended, after doing nothing; and reads only while `gate` is set.

    Used from the writer's thread and from reading ones; told by the test's.
    """

    def __init__(self) -> None:
        self._call, self._code, self._times = "", 0, 0
        self.failed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()

    def fail(self, call: str, code: int, *, times: int = 10**9) -> None:
        """From now on the next so many calls of that name fail with that errno."""
        self._call, self._code, self._times, self.failed = call, code, times, 0

    def mend(self) -> None:
        """There is space again."""
        self._times = 0

    def read_into(self, descriptor: int, buffer: memoryview) -> int:
        self.reading.set()
        assert self.gate.wait(20)
        return super().read_into(descriptor, buffer)

    def __getattribute__(self, name: str) -> object:
        if name in WRITES:
            Filesystem.__getattribute__(self, "_meet")(name)
        return super().__getattribute__(name)

    def _meet(self, name: str) -> None:
        if name == self._call and self._times > 0:
            self._times -= 1
            self.failed += 1
            raise OSError(self._code, "made to fail")
