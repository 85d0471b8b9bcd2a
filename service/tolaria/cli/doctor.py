"""`tolaria doctor`: whether a service with these settings would run well on this machine, and what to do if not.

It changes nothing: what it writes to measure a disk is removed, and addresses are released at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from leyline.v1 import admin_service_pb2 as admin
from tolaria import cgroups
from tolaria.checkpoint.directory import JOURNAL
from tolaria.checkpoint.restoration import refuse_unfinished_restore
from tolaria.cli.render import one_line, size
from tolaria.config import Address, Settings, require_protection
from tolaria.errors import (
    BindError,
    ConfigurationError,
    JournalDamagedError,
    JournalNewerError,
    JournalUnavailableError,
    StateRefusedError,
)
from tolaria.journal.reader import schema_of
from tolaria.journal.rows import SCHEMA_VERSION
from tolaria.probe import probe
from tolaria.security.certificates import now_utc
from tolaria.service.credentials import credential_findings, names_credentials
from tolaria.service.listeners import open_sockets

_ADMIN: Final = admin.DESCRIPTOR.services_by_name["TolariaAdminService"].full_name
_MIB: Final = 2**20
_DISK_FREE_MIN, _DISK_FREE_LOW = 256 * _MIB, 2048 * _MIB
_SHARED_FREE_LOW: Final = 64 * _MIB
_WRITTEN: Final = 16 * _MIB
_SPEED_LOW: Final = 20 * _MIB
_SYNC_SLOW_S: Final = 0.25
_DESCRIPTORS_LOW: Final = 1024
_TORCH_TIMEOUT_S: Final = 120.0
_MESSAGE_MAX: Final = 500
_SHARED: Final = Path("/dev/shm")  # noqa: S108 - looked at, and one file is made with a random name

_LOOK_AT_TORCH: Final = """
import json, sys
import torch
found = {"version": torch.__version__, "mps": torch.backends.mps.is_available()}
found["cuda"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
try:
    from tolaria.errors import JobError
    from tolaria.jobs.job import load_factory
    load_factory(sys.argv[1])
    found["job_error"] = ""
except Exception as error:
    found["job_error"] = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Verdict(StrEnum):
    """How a diagnosis is to be taken: fine, worth knowing, or in the way of a start."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check has found, and what to do about it; no advice if nothing is to be done."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Diagnosis]:
    """Yields the diagnoses of all checks, in the order in which a service would meet the problems."""
    checks: tuple[Callable[[Settings], Iterator[Diagnosis]], ...] = (
        *(_addresses, _credentials, _state_directory, _shared_memory, _limits, _clock, _torch_and_job, _peers),
    )
    for check in checks:
        yield from check(settings)


def _addresses(settings: Settings) -> Iterator[Diagnosis]:
    for name, listen in (("server.listen", settings.server.listen), ("metrics.listen", settings.metrics.listen)):
        try:
            for bound in open_sockets(name, listen):
                bound.close()
        except BindError as error:
            if not probe(settings.server.listen, _ADMIN):
                yield Diagnosis(name, Verdict.OK, f"a service answers at {settings.server.listen} already")
            else:
                yield Diagnosis(name, Verdict.FAILED, one_line(str(error)), f"end what uses it, or set {name}")
            continue
        open_to = "" if Address.parse(listen).is_loopback else ", and reachable from other machines"
        advice = "let only operators reach it: its clients can stop the run" if open_to and name[0] == "s" else ""
        yield Diagnosis(name, Verdict.WARNING if advice else Verdict.OK, f"{listen} is free{open_to}", advice)


def _credentials(settings: Settings) -> Iterator[Diagnosis]:
    try:
        require_protection(settings)
    except ConfigurationError as error:
        detail, _, advice = str(error).partition(": ")
        yield Diagnosis("protection", Verdict.FAILED, one_line(detail), one_line(advice, length_max=500))
    if not names_credentials(settings):
        return
    found = list(credential_findings(settings, now_utc()))
    for finding in found:
        verdict = Verdict.FAILED if finding.fatal else Verdict.WARNING
        advice = finding.advice or f"mend the file, or set {finding.setting.partition(':')[0]}"
        yield Diagnosis(finding.setting, verdict, one_line(finding.detail), advice)
    if not found:
        yield Diagnosis("credentials", Verdict.OK, "certificates, keys, tokens and passwords can be used")


def _state_directory(settings: Settings) -> Iterator[Diagnosis]:
    directory = Path(settings.state.dir).absolute()
    place = next(path for path in (directory, *directory.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        advice = f"chown it to user {os.getuid()}, or set state.dir"
        yield Diagnosis("state.dir", Verdict.FAILED, f"{place} cannot be written by this user", advice)
        return
    if place == directory and (mode := stat.S_IMODE(place.stat().st_mode)) & 0o022:
        advice = f"chmod go-w {place}: others could replace checkpoints"
        yield Diagnosis("state.dir", Verdict.WARNING, f"{place} can be written by others (mode {mode:o})", advice)
    free = shutil.disk_usage(place).free
    verdict = Verdict.OK if free >= _DISK_FREE_LOW else Verdict.WARNING
    if free < _DISK_FREE_MIN:
        verdict = Verdict.FAILED
    advice = "" if verdict is Verdict.OK else "free space, or set state.dir: a run keeps about six checkpoints"
    yield Diagnosis("disk space", verdict, f"{size(free)} are free for {directory}", advice)
    yield _disk_speed(place)
    yield from _state_schema(directory)


def _state_schema(directory: Path) -> Iterator[Diagnosis]:
    """Whether this version can use the state that the directory holds."""
    if not directory.is_dir():
        return
    try:
        refuse_unfinished_restore(directory)
        schema = schema_of(directory / JOURNAL) if (directory / JOURNAL).is_file() else SCHEMA_VERSION
    except (StateRefusedError, JournalNewerError, JournalUnavailableError) as error:
        yield Diagnosis("state schema", Verdict.FAILED, one_line(str(error), length_max=_MESSAGE_MAX))
    except JournalDamagedError as error:
        advice = "the next start moves it to the quarantine, and rebuilds it from the checkpoints"
        yield Diagnosis("state schema", Verdict.WARNING, one_line(str(error), length_max=_MESSAGE_MAX), advice)
    else:
        older = f"; the next start upgrades it to {SCHEMA_VERSION}, after a copy" if schema < SCHEMA_VERSION else ""
        yield Diagnosis("state schema", Verdict.OK, f"{schema}{older}")


def _disk_speed(place: Path) -> Diagnosis:
    """Writes a file of a checkpoint's kind and removes it."""
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began_s = time.perf_counter()
            file.write(os.urandom(_MIB) * (_WRITTEN // _MIB))
            file.flush()
            os.fsync(file.fileno())
            took_s = time.perf_counter() - began_s
            file.seek(0)
            file.write(b"x")
            file.flush()
            began_s = time.perf_counter()
            os.fsync(file.fileno())
            sync_s = time.perf_counter() - began_s
    except OSError as error:
        return Diagnosis(
            "disk speed", Verdict.FAILED, f"{place}: {error.strerror or error}", "mend the disk or the mount"
        )
    speed = _WRITTEN / max(took_s, 1e-9)
    detail = f"{size(int(speed))}/s, {sync_s * 1000:.1f} ms for a small write to be durable"
    if speed < _SPEED_LOW or sync_s > _SYNC_SLOW_S:
        return Diagnosis("disk speed", Verdict.WARNING, detail, "use a local disk: full rollbacks and checkpoints wait")
    return Diagnosis("disk speed", Verdict.OK, detail)


def _shared_memory(settings: Settings) -> Iterator[Diagnosis]:
    place = settings.signals.board("any").parent
    name = "shared memory"
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        advice = f"mount a tmpfs at {_SHARED} that user {os.getuid()} can write, or set signals.path"
        yield Diagnosis(name, Verdict.FAILED, f"{place}: {error.strerror or error}", advice)
        return
    if free < _SHARED_FREE_LOW and settings.lane.mode != "thread":
        advice = "give the container more (--shm-size, an emptyDir in memory): workers of a DataLoader use it"
        yield Diagnosis(name, Verdict.WARNING, f"{size(free)} are free in {place}", advice)
    elif not hasattr(os, "memfd_create"):
        yield Diagnosis(
            name, Verdict.WARNING, "this system has no memfd_create", "the lane runs as a thread: use Linux"
        )
    else:
        yield Diagnosis(name, Verdict.OK, f"{size(free)} are free in {place}")


def _limits(settings: Settings) -> Iterator[Diagnosis]:
    cores = min(cgroups.cpu_quota() or float("inf"), len(os.sched_getaffinity(0)))
    detail = f"{cores:g} for the service and its lane"
    if cores < 2:
        yield Diagnosis("cores", Verdict.WARNING, detail, "two keep epoch boundaries within their budget")
    else:
        yield Diagnosis("cores", Verdict.OK, detail)
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = descriptors == resource.RLIM_INFINITY
    low = not unlimited and descriptors < _DESCRIPTORS_LOW
    advice = f"raise it (ulimit -n, LimitNOFILE) to {_DESCRIPTORS_LOW} at least" if low else ""
    shown = "no limit" if unlimited else f"{descriptors} at most"
    yield Diagnosis("descriptors", Verdict.WARNING if low else Verdict.OK, shown, advice)
    file = Path("tolaria.toml")
    if settings.leyline.secret.get_secret_value() and file.exists() and file.stat().st_mode & 0o044:
        advice = f"chmod go-r {file}, or set the secret in the environment"
        yield Diagnosis("secrets", Verdict.WARNING, f"{file} can be read by others", advice)


class _Timex(ctypes.Structure):
    """Linux's `struct timex`, whose first field says what is to be changed: nothing."""

    _fields_ = (("modes", ctypes.c_uint), ("_rest", ctypes.c_byte * 512))


def _clock(settings: Settings) -> Iterator[Diagnosis]:
    unsynchronised = -1
    with suppress(OSError, AttributeError):
        unsynchronised = ctypes.CDLL(None).adjtimex(ctypes.byref(_Timex()))
    if unsynchronised == 5:  # TIME_ERROR
        advice = (
            f"run chrony or another NTP client: commands that differ by {settings.leyline.freshness_s:g} s are refused"
        )
        yield Diagnosis("clock", Verdict.WARNING, "the system does not call it synchronised", advice)
    elif unsynchronised >= 0:
        yield Diagnosis("clock", Verdict.OK, "synchronised")


@dataclass(frozen=True, slots=True)
class TorchFound:
    """What torch has on this machine, and why the job is not found; an empty text if it is."""

    version: str
    cuda: int
    mps: bool
    job_error: str

    def has(self, device: str) -> bool:
        """Whether training.device can be used."""
        if device.startswith("cuda"):
            return int(device.partition(":")[2] or 0) < self.cuda
        return device != "mps" or self.mps


def look_at_torch(job: str) -> TorchFound | None:
    """Looks in a child process, since the command does without torch; returns None if it cannot be imported."""
    command = [sys.executable, "-c", _LOOK_AT_TORCH, job]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False
        )
        return TorchFound(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def _torch_and_job(settings: Settings) -> Iterator[Diagnosis]:
    name, wanted = settings.training.job, settings.training.device
    found = look_at_torch(name)
    if found is None:
        yield Diagnosis(
            "torch", Verdict.FAILED, "it cannot be imported", f"{sys.executable} -c 'import torch' says why"
        )
        return
    devices = ["the CPU", *([f"{found.cuda} of CUDA"] if found.cuda else []), *(["MPS"] if found.mps else [])]
    detail = f"{found.version}, with {', '.join(devices)}"
    if found.has(wanted):
        yield Diagnosis("torch", Verdict.OK, detail)
    else:
        advice = "set training.device, or install the driver or a build of torch for it"
        yield Diagnosis("torch", Verdict.FAILED, f"{detail}; training.device is {wanted}", advice)
    if found.job_error:
        yield Diagnosis("training.job", Verdict.FAILED, one_line(found.job_error), "set training.job, or PYTHONPATH")
    else:
        yield Diagnosis("training.job", Verdict.OK, f"{name} is found; it is built when the service starts")


def _peers(settings: Settings) -> Iterator[Diagnosis]:
    for name, target in (("tamiyo", settings.tamiyo.target), ("kasmina", settings.kasmina.target)):
        if not settings.control.enabled:
            yield Diagnosis(name, Verdict.OK, "not needed: control.enabled is false")
        elif not target:
            yield Diagnosis(name, Verdict.OK, "no target: the reference peer is started with the service")
        elif problem := probe(target, ""):
            advice = f"start it, or set {name}.target; training goes on without it"
            yield Diagnosis(name, Verdict.WARNING, problem, advice)
        else:
            yield Diagnosis(name, Verdict.OK, f"serves at {target}")
