"""From the death of the lane's process to its first good step, against a plain script that is restarted.

    python tests/benchmarks/bench_lane_recovery.py [--rounds N] [--width N]

By turns. Tolaria: the lane of a service is killed, and restored from the snapshots in memory, or, where the ring has no
room, from the newest checkpoint; or from memory by a process that was ready before (`lane.spare_after_s`). The script:
a bare loop over the same model and data that has saved with torch.save; its time is that of a new process until its
first step, without a supervisor that would have to notice the death.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.processes import Serve, cpu_s, python_path, serve, status, stub_of

SCRIPT = """
import sys, time, torch
from torch.nn import functional as F
sys.argv = sys.argv[1:]
from support.user_jobs import Line
from tolaria.jobs import JobContext

job = Line(JobContext(0, torch.device("cpu"), {"width": int(sys.argv[1]), "samples": 4096}))
model = job.build_model()
optimizer = torch.optim.Adam(model.parameters())
path = sys.argv[2]
if len(sys.argv) > 3:
    F.mse_loss(model(job.x[:8]), job.y[:8]).backward(); optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
else:
    saved = torch.load(path)
    model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
    optimizer.zero_grad(); F.mse_loss(model(job.x[:8]), job.y[:8]).backward(); optimizer.step()
    print(time.monotonic())
"""


def times_of(service: Serve, event: str) -> list[float]:
    """Returns when that event was logged, in Unix seconds."""
    found = [line["timestamp"] for line in service.events() if line["event"] == event]
    return [datetime.fromisoformat(text).timestamp() for text in found]


def killed(service: Serve, deaths: int, *, spare: bool) -> dict[str, float]:
    """Kills the lane, which has died that often before; returns the parts of the gap in seconds.

    If there is to be a spare process, waits until it has imported torch.
    """
    while spare and not is_ready(service, deaths + 1):
        time.sleep(0.1)
    with stub_of(service) as stub:
        pid = status(stub).ranks[0].pid
        at_s = time.time()
        os.kill(pid, signal.SIGKILL)
        while min(len(times_of(service, event)) for event in ("lane_restored", "tolaria.lane_recovered")) <= deaths:
            time.sleep(0.005)
        step = next(e["step"] for e in reversed(service.events()) if e["event"] == "tolaria.lane_recovered")
        while status(stub).global_step <= step:
            time.sleep(0.002)
        over_s = time.time()
    lost, started, restored = (times_of(service, event)[-1] for event in ("lane_lost", "lane_started", "lane_restored"))
    return {
        "detect": lost - at_s,
        "start": started - lost,
        "import, build, restore": restored - started,
        "first step": over_s - restored,
        "whole": over_s - at_s,
    }


def is_ready(service: Serve, count: int) -> bool:
    """Whether so many spare processes have been started, and the last one waits: it has used no CPU for a second."""
    found = [line["pid"] for line in service.events() if line["event"] == "spare_lane_started"]
    if len(found) < count:
        return False
    before_s = cpu_s(found[-1])
    time.sleep(1)
    return cpu_s(found[-1]) == before_s > 1


def script_s(folder: Path, width: int, *, saves: bool = False) -> float:
    """Runs the script; returns the seconds from its start to its first step."""
    started_s = time.monotonic()
    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        "script",
        str(width),
        str(folder / "saved.pt"),
        *(["save"] if saves else []),
    ]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": python_path()}
    )
    return 0.0 if saves else float(done.stdout) - started_s


def main() -> None:
    """Prints the medians of the parts, and of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    job = ["training.job=support.user_jobs:Line", "training.options.samples=4096", "training.epochs=100000000"]
    job += [f"training.options.width={options.width}", "training.options.lr=0.0001", "lane.restarts_max=1000"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        places = {name: Path(folder, name) for name in ("memory", "disk", "spare", "script")}
        for place in places.values():
            place.mkdir()
        disk = ["rollback.memory_mb=1", "rollback.every_steps=1000000", "checkpoint.every_steps=500"]
        services = {
            "memory": stack.enter_context(serve(*job, reference_peers=True, cwd=places["memory"])),
            "disk": stack.enter_context(serve(*job, *disk, reference_peers=True, cwd=places["disk"])),
            "spare": stack.enter_context(
                serve(*job, "lane.spare_after_s=0.5", reference_peers=True, cwd=places["spare"])
            ),
        }
        script_s(places["script"], options.width, saves=True)
        time.sleep(5)
        gaps: dict[str, list[dict[str, float]]] = {name: [] for name in services}
        scripts = []
        for number in range(options.rounds):
            for name, service in services.items():
                gaps[name].append(killed(service, number, spare=name == "spare"))
            scripts.append(script_s(places["script"], options.width))
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, width {options.width}, {options.rounds} rounds")
    print("| from | " + " | ".join(gaps["memory"][0]) + " |")
    print("| --- |" + " --- |" * len(gaps["memory"][0]))
    for name, found in gaps.items():
        print(
            f"| {name} | "
            + " | ".join(f"{statistics.median(g[part] for g in found):.2f} s" for part in found[0])
            + " |"
        )
    print(f"| a script restarted from torch.save | | | | | {statistics.median(scripts):.2f} s |")


if __name__ == "__main__":
    main()
