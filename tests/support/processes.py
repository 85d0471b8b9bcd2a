"""The real `tolaria serve` as a child process, and its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from support.waiting import wait_for

START_TIMEOUT_S = 240.0
TESTS = Path(__file__).parents[1]


class Serve:
    """One service process. Its log is read continuously, so that it never blocks on a full pipe."""

    def __init__(self, arguments: Sequence[str], cwd: Path, code: Path | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TOLARIA_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tolaria", "serve", "--set", "logging.format=json", *_overrides(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment | {"PYTHONPATH": python_path(code)},
        )
        self.lines: list[str] = []
        self._parsed = 0
        self._events = list[dict[str, Any]]()
        self._serving = threading.Event()
        self._serving_event: dict[str, Any] = {}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if '"serving"' in line:
                self._serving_event = json.loads(line)
                self._serving.set()
        self._serving.set()

    def addresses(self) -> tuple[str, str]:
        """Waits until it serves; returns the addresses of gRPC and of the metrics."""
        assert self._serving.wait(START_TIMEOUT_S), (self.lines, self._waiting_for())
        assert self._serving_event, self.lines
        return self._serving_event["grpc"], self._serving_event["metrics"]

    def _waiting_for(self) -> str:
        """What the process does: its state, its CPU seconds, and what it waits for in the kernel."""
        process = Path(f"/proc/{self.process.pid}")
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return f"state {fields[0]}, {cpu_s:.1f} s of CPU, in {(process / 'wchan').read_text() or '?'}"

    def events(self) -> list[dict[str, Any]]:
        """The events that it has logged so far."""
        unread = self.lines[self._parsed :]
        self._events += [json.loads(line) for line in unread if line.startswith("{")]
        self._parsed += len(unread)
        return list(self._events)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 300.0) -> int:
        """Waits for the end; returns the exit code, once the whole log has been read."""
        code = self.process.wait(timeout_s)
        self.reader.join(5)
        return code

    def children(self) -> list[int]:
        """Ids of its running child processes."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []


@contextmanager
def serve(
    *overrides: str, cwd: Path, ports: bool = True, reference_peers: bool = False, code: Path | None = None
) -> Iterator[Serve]:
    """Runs a service with these `--set` values, on free ports; kills it at the end if it is still running.

    Without targets of peers it runs without a controller, which takes a second less, unless the reference peers are
    wanted. `code` is the directory of another version of Tolaria.
    """
    before = ["server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0"] if ports else []
    if code is None:
        before.append("lane.spare_after_s=0")  # a second process of the lane only where a test is about it
    targets = any(value.startswith(("tamiyo.target=", "kasmina.target=")) for value in overrides)
    if not (targets or reference_peers):
        before.append("control.enabled=false")
    service = Serve([*before, *overrides], cwd, code)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait(10)
        service.reader.join(5)
        for stream in (service.process.stdout, service.process.stderr):
            if stream is not None:
                stream.close()


def python_path(code: Path | None = None) -> str:
    """PYTHONPATH for child processes: another version's code, if any, the tests, and this process's own."""
    paths = ("" if code is None else str(code), str(TESTS), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(path for path in paths if path)


def _overrides(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def is_alive(pid: int) -> bool:
    """Whether a process is running; zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def stub_of(service: Serve) -> Iterator[TolariaAdminServiceStub]:
    """A stub of a service that has built its job: waits for that."""
    with grpc.insecure_channel(service.addresses()[0]) as channel:
        stub = TolariaAdminServiceStub(channel)

        def is_built() -> bool:
            return service.process.poll() is not None or status(stub).state != admin.RUN_STATE_STARTING

        wait_for(is_built, START_TIMEOUT_S)
        yield stub


def status(stub: TolariaAdminServiceStub) -> admin.GetStatusResponse:
    """Returns the current status."""
    answer: admin.GetStatusResponse = stub.GetStatus(admin.GetStatusRequest(), timeout=180)
    return answer


def wait_for_steps(stub: TolariaAdminServiceStub, more_than: int = 0) -> admin.GetStatusResponse:
    """Waits for a status with more global steps than `more_than`."""
    seen = list[admin.GetStatusResponse]()

    def has_stepped() -> bool:
        seen[:] = [status(stub)]
        return seen[0].global_step > more_than

    wait_for(has_stepped, START_TIMEOUT_S)
    return seen[0]


def cpu_s(pid: int) -> float:
    """Returns the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
