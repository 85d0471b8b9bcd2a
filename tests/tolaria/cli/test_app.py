"""The console script as a process: signals that come early, streams that are full, closed or gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_admin import fake_admin, serving, status_of

TOLARIA = (sys.executable, "-m", "tolaria")
WAITS = """
import sys, types
module = types.ModuleType("tolaria.service")
{body}
sys.modules["tolaria.service"] = module
from tolaria.cli.app import main
sys.argv[1:] = ["serve"]
main()
"""
IN_THE_RUN = """
import time
def run(settings):
    print("up", flush=True)
    time.sleep(60)
module.run = run
"""
IN_A_LOOP = """
import anyio
async def wait():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        try:
            print("up", flush=True)
            await anyio.sleep_forever()
        finally:
            print("cleaned up", flush=True)
module.run = lambda settings: anyio.run(wait)
"""
MADE_ANOTHER = """
import time
def run(settings):
    print("up", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise RecursionError from None
module.run = run
"""
MADE_A_FAILURE = MADE_ANOTHER.replace("RecursionError", "UnknownJobError('broken off')").replace(
    "import time", "import time\nfrom tolaria.errors import UnknownJobError"
)
AT_IMPORT = """
import builtins, time
real = builtins.__import__
def slow(name, *rest):
    if name == "tolaria.config":
        print("up", flush=True)
        time.sleep(60)
    return real(name, *rest)
builtins.__import__ = slow
"""


@pytest.mark.parametrize(
    "body",
    [IN_THE_RUN, IN_A_LOOP, MADE_ANOTHER, MADE_A_FAILURE, AT_IMPORT],
    ids=["run", "loop", "other", "failure", "import"],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_start_is_a_quiet_end(body: str, number: signal.Signals, code: int) -> None:
    """Whatever is being done when it comes, and where the shell has had SIGINT ignored too."""
    command = [sys.executable, "-c", WAITS.format(body=body)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "")
    assert body != IN_A_LOOP or out == "cleaned up\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["status"], ["--help"], ["config", "show"]])
def test_a_full_disk_is_one_line(arguments: list[str], unbuffered: str) -> None:
    """Output that cannot be written is told without a traceback, exit code 1."""
    with serving(fake_admin([status_of(2)])) as address, Path("/dev/full").open("wb") as full:
        asked = [*arguments, *(["--address", address] if arguments == ["status"] else [])]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run([*TOLARIA, *asked], stdout=full, stderr=-1, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (1, "tolaria: standard output: No space left on device\n")


def test_a_reader_that_has_seen_enough_is_no_failure_to_tell() -> None:
    """`| head` ends the command without a word."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([*TOLARIA, "config", "show"], stdout=write_end, stderr=-1, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("redirection", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_exit_codes_do_not_need_streams(redirection: str) -> None:
    """What is wrong cannot be told, but the exit code can."""
    asked = f"config check --set training.epochs=none {redirection}"
    done = subprocess.run(["sh", "-c", f'exec "$0" -m tolaria {asked}', sys.executable], stdout=-1, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_stream_that_is_not_open_leaves_its_number_to_nobody() -> None:
    """A file that is opened later does not become standard error."""
    code = (
        "from tolaria.cli.starting import open_standard_streams\nopen_standard_streams()\n"
        "import os, sys\nassert sys.stdin.read() == ''\nsys.stderr.write('nowhere')\n"
        "print([os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)])\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, code]
    done = subprocess.run(command, stdout=-1, text=True, check=True)
    assert done.stdout == "['/dev/null', '/dev/null']\n"
