"""The console script as a process: early signals, and streams that are full or closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_admin import fake_admin, serving, status_of

TOLARIA = (sys.executable, "-m", "tolaria")
PROGRAM = """
import sys, types
module = types.ModuleType("tolaria.service")
{body}
sys.modules["tolaria.service"] = module
from tolaria.cli.main import main
sys.argv[1:] = ["serve"]
main()
"""
SLEEPING_RUN = """
import time
def run(settings, reread):
    print("up", flush=True)
    time.sleep(600)
module.run = run
"""
EVENT_LOOP = """
import anyio
async def wait():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        try:
            print("up", flush=True)
            await anyio.sleep_forever()
        finally:
            print("cleaned up", flush=True)
module.run = lambda settings, reread: anyio.run(wait)
"""
RAISES_OTHER_ERROR = """
import time
def run(settings, reread):
    print("up", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        raise RecursionError from None
module.run = run
"""
RAISES_FAILURE = RAISES_OTHER_ERROR.replace("RecursionError", "UnknownJobError('broken off')").replace(
    "import time", "import time\nfrom tolaria.errors import UnknownJobError"
)
SLOW_IMPORT = """
import builtins, time
real = builtins.__import__
def slow(name, *rest):
    if name == "tolaria.config":
        print("up", flush=True)
        time.sleep(600)
    return real(name, *rest)
builtins.__import__ = slow
"""


@pytest.mark.parametrize(
    "body",
    [SLEEPING_RUN, EVENT_LOOP, RAISES_OTHER_ERROR, RAISES_FAILURE, SLOW_IMPORT],
    ids=["run", "loop", "other", "failure", "import"],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_start_exits_with_its_code_and_no_output(body: str, number: signal.Signals, code: int) -> None:
    """At any point of the start, and also if the process inherits an ignored SIGINT."""
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (code, "")
    assert body != EVENT_LOOP or out == "cleaned up\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["status"], ["--help"], ["config", "show"]])
def test_full_disk_is_reported_on_one_line(arguments: list[str], unbuffered: str) -> None:
    """Output that cannot be written is reported without a traceback, with exit code 1."""
    with serving(fake_admin([status_of(2)])) as address, Path("/dev/full").open("wb") as full:
        asked = [*arguments, *(["--address", address] if arguments == ["status"] else [])]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run([*TOLARIA, *asked], stdout=full, stderr=-1, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (1, "tolaria: standard output: No space left on device\n")


def test_closed_pipe_is_not_reported() -> None:
    """`| head` ends the command without a message."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([*TOLARIA, "config", "show"], stdout=write_end, stderr=-1, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("redirection", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_exit_code_without_standard_streams(redirection: str) -> None:
    """The exit code is set although the message cannot be written."""
    asked = f"config check --set training.epochs=none {redirection}"
    done = subprocess.run(["sh", "-c", f'exec "$0" -m tolaria {asked}', sys.executable], stdout=-1, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_descriptors_of_closed_streams_are_not_reused() -> None:
    """The null device takes their place, so that a file opened later does not become standard error."""
    code = (
        "from tolaria.cli.main import open_standard_streams\nopen_standard_streams()\n"
        "import os, sys\nassert sys.stdin.read() == ''\nsys.stderr.write('nowhere')\n"
        "print([os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)])\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, code]
    done = subprocess.run(command, stdout=-1, text=True, check=True)
    assert done.stdout == "['/dev/null', '/dev/null']\n"


def test_module_runs_the_command() -> None:
    """`python -m tolaria` works where the script is not on the path."""
    done = subprocess.run([*TOLARIA, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tolaria ")


@pytest.mark.parametrize("body", [SLOW_IMPORT, SLEEPING_RUN], ids=["import", "run"])
def test_a_hangup_during_start_does_nothing(body: str) -> None:
    """A manager that reloads a service which is just starting does not end it: its settings are being read."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        process.communicate(timeout=180)
    assert process.returncode == 143


def test_the_help_of_all_commands_imports_nothing_slow() -> None:
    """`tolaria --help` reads no settings, and opens no connection: pydantic and gRPC are half of what it would take."""
    code = (
        "import sys\nfrom tolaria.cli.main import main\nsys.argv[1:] = ['--help']\n"
        "try:\n    main()\n"
        "finally:\n    print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "restore-points" in done.stdout
    slow = {
        "pydantic",
        "tolaria.config",
        "grpc",
        "asyncio",
        "anyio",
        "sqlite3",
        "numpy",
        "torch",
        "structlog",
        "xxhash",
    }
    assert slow & set(done.stderr.split()) == set()


def test_grpc_is_quiet_in_every_command() -> None:
    """Its C core reads its level when it is imported, and would write between the lines of the log."""
    code = (
        "import builtins, os, sys\nreal = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name == 'grpc' and 'grpc' not in sys.modules:\n        print(os.environ.get('GRPC_VERBOSITY'))\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = watched\n"
        "from tolaria.cli.main import main\nsys.argv[1:] = ['status', '--address', '127.0.0.1:1']\nmain()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[:1] == ["NONE"]
