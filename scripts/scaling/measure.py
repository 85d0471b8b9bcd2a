"""Measures the costs of `Costs` on this machine."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
import xxhash

from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from scaling.costs import Costs
from scaling.formulas import PIECE_BYTES
from support.processes import Serve, serve, status, stub_of
from tolaria.config.ranks import RankEnvironment
from tolaria.ranks.group import Group

_ROOT: Final = Path(__file__).parents[2]
_NUMBERS: Final = 9
"""Numbers that a step sums: losses, samples, the step and its square, wishes."""

_JOB: Final = ("training.job=support.mortal_jobs:Mortal", "training.device=cpu", "training.threads=1")
_ENDLESS: Final = ("training.epochs=100000000", "training.options.step_s=0.001", "training.options.lr=0.001")
_DEATHS: Final = 5


def measured() -> Costs:
    """Measures everything, which takes some minutes."""
    sums = {world: _on_ranks(world) for world in (1, 2, 3, 4)}
    pieces = sums[2]
    parts = _restarts()
    return Costs(
        machine=f"{os.cpu_count()} cores without a GPU, torch {torch.__version__.partition('+')[0]}",
        **{f"all_reduce_{world}_s": found["sum"] for world, found in sums.items()},
        all_reduce_piece_s=pieces["piece"],
        broadcast_piece_s=max(0.0, pieces["broadcast"] - pieces["sum"]),
        store_get_s=_store_get_s(),
        copy_gb_s=_copy_gb_s(),
        hash_gb_s=_hash_gb_s(),
        write_gb_s=_write_gb_s(),
        import_s=_import_s(),
        **parts,
    )


def quartile_s(action: Callable[[], object], rounds: int) -> float:
    """Returns the lower quartile of the times of an action, after one that does not count."""
    action()
    times = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_s)
    return statistics.quantiles(times, n=4)[0]


# -- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> None:
    """Measures the collectives on one rank of the group that the environment names; the leader prints them."""
    torch.set_num_threads(1)
    group = Group.join(RankEnvironment.read(), cuda=False)
    numbers, piece, content = [1.0] * _NUMBERS, torch.zeros(PIECE_BYTES // 4), memoryview(bytearray(PIECE_BYTES))

    def broadcast() -> None:
        group.broadcast_buffer(content)
        group.all_reduce(numbers)  # which ends once every rank has the content

    found = {
        "sum": quartile_s(lambda: group.all_reduce(numbers), 2000),
        "piece": quartile_s(lambda: group.all_reduce_tensor(piece), 20),
        "broadcast": quartile_s(broadcast, 20),
    }
    if group.leads:
        sys.stdout.write(json.dumps(found))
        sys.stdout.flush()
    group.all_reduce(numbers)


def _on_ranks(world: int) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "TOLARIA_LANE_AGENT": "0:",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(_ROOT / each) for each in ("scripts", "service", "tests")),
    }
    program = [sys.executable, "-c", "from scaling.measure import rank; rank()"]
    ranks = [
        subprocess.Popen(
            program, env=environment | {"RANK": str(n), "LOCAL_RANK": str(n)}, stdout=subprocess.PIPE, text=True
        )
        for n in range(world)
    ]
    try:
        found: dict[str, float] = json.loads(next(iter([each.communicate(timeout=120)[0] for each in ranks])))
    finally:
        for each in ranks:
            each.kill()
    return found


def _store_get_s() -> float:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    client = dist.TCPStore("127.0.0.1", server.port)  # type: ignore[attr-defined]
    client.set("key", "x" * 100)
    return quartile_s(lambda: client.get("key"), 5000)


# -- memory, disk, processes -----------------------------------------------------------------------------------------


def _copy_gb_s(size: int = 2**28) -> float:
    source, target = bytearray(size), bytearray(size)
    to, start = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (target, source))
    return size / 1e9 / quartile_s(lambda: ctypes.memmove(to, start, size), 9)


def _hash_gb_s(size: int = 2**28) -> float:
    content = bytearray(size)
    return size / 1e9 / quartile_s(lambda: xxhash.xxh3_128_digest(content), 9)


def _write_gb_s(size: int = 2**30) -> float:
    content = os.urandom(PIECE_BYTES)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for _ in range(size // len(content)):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory(dir=_ROOT) as folder:
        return size / 1e9 / quartile_s(lambda: write(Path(folder, "written")), 3)


def _import_s() -> float:
    environment = os.environ | {"PYTHONPATH": str(_ROOT / "service")}
    program = [sys.executable, "-c", "import tolaria.lane.hosting"]
    return quartile_s(lambda: subprocess.run(program, env=environment, check=True), 3)


def _restarts() -> dict[str, float]:
    """Returns the parts of the time from the death of a rank to the next step, of a service with 2 ranks."""
    settings = (*_JOB, *_ENDLESS, "lane.mode=torchrun", "lane.processes=2", "lane.restarts_max=1000")
    with tempfile.TemporaryDirectory() as folder, serve(*settings, cwd=Path(folder)) as service:
        with stub_of(service) as stub:
            found = []
            for number in range(_DEATHS):
                time.sleep(3)
                found.append(_killed(service, stub, number))
        service.terminate()
        service.wait()
    return {part: statistics.quantiles([each[part] for each in found], n=4)[0] for part in found[0]}


def _killed(service: Serve, stub: TolariaAdminServiceStub, deaths: int) -> dict[str, float]:
    """Kills a rank that does not lead, of a group that has lost `deaths` before; returns the parts in seconds."""
    at_s = time.time()
    os.kill(_ranks_of(service.children())[-1], signal.SIGKILL)
    while len(_times_of(service.events(), "lane_restored")) <= deaths:
        time.sleep(0.005)
    step = next(e["step"] for e in reversed(service.events()) if e["event"] == "lane_restored")
    while status(stub).global_step <= step:
        time.sleep(0.002)
    over_s = time.time()
    events = ("lane_lost", "lane_started", "lane_restored")
    lost, started, restored = (_times_of(service.events(), event)[-1] for event in events)
    return {
        "notice_s": lost - at_s,
        "start_s": started - lost,
        "ready_s": restored - started,
        "first_step_s": max(0.0, over_s - restored),
    }


def _ranks_of(pids: Iterable[int]) -> list[int]:
    """Returns the ids of the ranks' processes below those of the service, in the order of their start."""
    found = list[int]()
    for pid in pids:
        if b"tolaria.ranks.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    ranks = list[int]()
    for pid in found:
        with suppress(OSError):
            if b"tolaria.lane.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ranks.append(pid)
    return sorted(ranks)


def _times_of(events: Iterable[dict[str, object]], event: str) -> list[float]:
    """Returns when that event was logged, in Unix seconds."""
    return [datetime.fromisoformat(str(line["timestamp"])).timestamp() for line in events if line["event"] == event]
