"""Runs scenarios on several ranks, each a process of its group: `run_on_ranks`, or `python -m support.rank_run`."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_on_ranks(world: int, scenarios: Sequence[tuple[str, dict[str, Any]]], timeout_s: float = 500) -> list[Any]:
    """Returns, for each scenario, the results of all ranks; a scenario is `package.module:function` with options.

    A rank that raises gives a text with the error; later scenarios are not run then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "service")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "TOLARIA_LANE_AGENT": "0:",
    }
    command = [sys.executable, "-m", "support.rank_run", json.dumps(scenarios)]
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = [[json.loads(line) for line in lines.splitlines()] for lines in said]
    return [
        [each[number] if number < len(each) else "did not run" for each in found] for number in range(len(scenarios))
    ]


def main() -> None:
    """Runs the scenarios of the command line on this rank."""
    from tolaria.lane.hosting import join_group

    group = join_group()
    for name, options in json.loads(sys.argv[1]):
        module, _, function = name.partition(":")
        try:
            result = getattr(importlib.import_module(module), function)(group, **options)
        except Exception as error:  # noqa: BLE001 - the result of this rank
            sys.stdout.write(json.dumps(f"{type(error).__name__}: {error}") + "\n")
            sys.stderr.write(traceback.format_exc())
            break
        sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # without waiting for ranks that have not come as far


if __name__ == "__main__":
    main()
