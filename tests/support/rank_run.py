"""Runs scenarios on several ranks, each a process of its group.

The ranks are forks of one process that has imported torch before, so that a test does not wait for that on each rank.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TEMPLATE = [sys.executable, "-m", "support.rank_run"]
"""The command of the process from which the ranks are forked."""

_NUMBERS = itertools.count(1)
_TEMPLATES: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def run_on_ranks(world: int, scenarios: Sequence[tuple[str, dict[str, Any]]], timeout_s: float = 500) -> list[Any]:
    """Returns, for each scenario, the results of all ranks; a scenario is `package.module:function` with options.

    A rank that raises gives a text with the error; later scenarios are not run then.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, str(rank)) for rank in range(world)]
        forked(
            {
                "environments": _environments(world),
                "results": [str(path) for path in results],
                "scenarios": scenarios,
                "timeout_s": timeout_s,
            }
        )
        found = [[json.loads(line) for line in path.read_text().splitlines()] for path in results]
    return [
        [each[number] if number < len(each) else "did not run" for each in found] for number in range(len(scenarios))
    ]


def _environments(world: int) -> list[dict[str, str]]:
    """The variables of each rank, as torch's elastic agent sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_WORLD_SIZE": str(world),
        "TOLARIA_LANE_AGENT": "0:",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def forked(request: Mapping[str, Any], command: Sequence[str] = TEMPLATE) -> None:
    """Has the ranks forked, and waits until they have ended. What answers an earlier request is passed over."""
    template, number = _template(tuple(command)), next(_NUMBERS)
    assert template.stdin is not None
    assert template.stdout is not None
    with suppress(BrokenPipeError):  # it answers nothing then
        template.stdin.write(json.dumps({**request, "number": number}) + "\n")
        template.stdin.flush()
    while (line := template.stdout.readline()) != f"ended {number}\n":
        if not line:
            _close(_TEMPLATES.pop(tuple(command)))
            raise AssertionError("the process from which ranks are forked has ended")


def _template(command: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process from which the ranks are forked, started anew if it has ended; it ends with this one."""
    found = _TEMPLATES.get(command)
    if found is not None and found.poll() is not None:
        _close(found)
        found = None
    if found is None:
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "service")])
        found = _TEMPLATES[command] = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    return found


def _close(template: subprocess.Popen[str]) -> None:
    """Frees what is left of a process that answers no more."""
    template.kill()
    for pipe in (template.stdin, template.stdout):
        with suppress(BrokenPipeError):
            assert pipe is not None
            pipe.close()
    template.wait()


def main() -> None:
    """Forks ranks for each request on standard input."""
    for module in ("tolaria.lane.hosting", "support.rank_scenarios", "torch.distributed.fsdp"):
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        ranks = [
            _fork(environment, result, request["scenarios"])
            for environment, result in zip(request["environments"], request["results"], strict=True)
        ]
        signal.signal(signal.SIGALRM, partial(_kill, ranks))
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        for rank in ranks:
            os.waitpid(rank, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(f"ended {request['number']}\n")
        sys.stdout.flush()


def _kill(pids: Sequence[int], _number: int, _frame: object) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fork(environment: Mapping[str, str], result: str, scenarios: Sequence[tuple[str, dict[str, Any]]]) -> int:
    """Forks a rank, which writes its results to a file; returns its process id."""
    output = os.open(result, os.O_WRONLY | os.O_CREAT)
    if pid := os.fork():
        os.close(output)
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.environ.update(environment)
    _run(scenarios)
    os._exit(0)  # without waiting for ranks that have not come as far


def _run(scenarios: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from tolaria.lane.hosting import join_group

    try:
        group = join_group()
        for name, options in scenarios:
            module, _, function = name.partition(":")
            result = getattr(importlib.import_module(module), function)(group, **options)
            os.write(1, json.dumps(result).encode() + b"\n")
    except Exception as error:  # noqa: BLE001 - the result of this rank
        os.write(1, json.dumps(f"{type(error).__name__}: {error}").encode() + b"\n")
        os.write(2, traceback.format_exc().encode())


if __name__ == "__main__":
    main()
