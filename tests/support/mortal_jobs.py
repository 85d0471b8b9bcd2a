"""Jobs that end their process, as user code does: by a crash, an exit, an exception, or by never returning."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import traceback
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, get_worker_info

from support.user_jobs import Line
from tolaria.jobs import LoaderCursor


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


class MortalAt(Mortal):
    """Dies once at the moment, on the rank and in the way that a file `order` in the working directory says.

    Moments: step, evaluation, checkpoint and snapshot (of the leader), rollback, build, worker (a process of the
    DataLoader).
    """

    def meet(self, moment):
        try:
            wanted, rank, how = Path("order").read_text().split()
            if (wanted, rank) != (moment, os.environ.get("RANK", "0")):
                return
            Path("order").rename("order-done")  # of several processes only one succeeds
        except (FileNotFoundError, ValueError):
            return
        match how:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise OSError(f"no answer at {time.time_ns()}")
            case _:
                self.die(how)

    def build_model(self):
        self.meet("build")
        return super().build_model()

    def training_data(self):
        loader = DataLoader(MortalRows(self), batch_size=8, shuffle=True, num_workers=1)
        return LoaderCursor(loader, seed=self.seed)

    def losses(self, model, batch):
        self.meet("step")
        return super().losses(model, batch)

    def evaluate(self, model, batch):
        self.meet("evaluation")
        return super().evaluate(model, batch)

    def state_dict(self):
        callers = {frame.name for frame in traceback.extract_stack()}
        if "capture_image" in callers:
            self.meet("checkpoint")
        elif "step_done" in callers:
            self.meet("snapshot")
        return {"kept": 1}

    def load_state_dict(self, state):
        if self.calls:  # not when a process begins
            self.meet("rollback")


class MortalRows(Dataset):
    def __init__(self, job):
        self.job = job

    def __len__(self):
        return len(self.job.x)

    def __getitem__(self, index):
        if get_worker_info() is not None:
            self.job.meet("worker")
        return self.job.x[index], self.job.y[index]


def exiting_factory(_context):
    """A factory that ends the process."""
    os._exit(5)
