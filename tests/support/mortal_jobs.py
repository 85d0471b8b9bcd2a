"""Jobs that end their process, as user code does: by a crash, an exit, an exception, or by never returning."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

from support.user_jobs import Line


class Mortal(Line):
    """Dies at a call of `losses` in its process.

    Options: `at` (number of the call), `how` (segv, exit, raise, hang, gil, memory), `always` (else only once, noted by a file
    in the working directory), `poison` (place of a sample: every batch with it ends the process), `says` (printed),
    `starts` (a program that runs on), `on` (the only rank that dies; else all of them).
    """

    def losses(self, model, batch):
        self.die_if_due(batch)
        return super().losses(model, batch)

    def die_if_due(self, batch):
        poison = self.options.get("poison")
        if poison is not None and (batch.payload[0] == self.x[int(poison)]).all(1).any():
            os._exit(7)
        if self.calls == 0 and self.options.get("starts"):
            subprocess.Popen(["sleep", "1000"])
        if self.calls == 0 and (says := self.options.get("says")):
            print(says)
        if self.calls + 1 != self.options.get("at"):
            return
        if str(self.options.get("on", "")) not in {"", os.environ.get("RANK", "0")}:
            return
        marker = Path("died")
        if not self.options.get("always") and marker.exists():
            return
        marker.touch()
        self.die(self.options["how"])

    def die(self, how):
        match how:
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "raise":
                raise OSError("the file server does not answer")
            case "hang":
                time.sleep(3600)
            case "gil":
                while True:
                    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL, keeps the GIL; a signal ends it
            case "memory":
                taken = []
                while True:
                    taken.append(b"1" * 10_000_000)


def exiting_factory(_context):
    """A factory that ends the process."""
    os._exit(5)
