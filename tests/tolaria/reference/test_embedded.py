"""Real processes: the embedded peers, how they start, how they end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from leyline.v1.kasmina_service_pb2 import ExportSeedStatesRequest
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tolaria.errors import PeerUnavailableError
from tolaria.reference.embedded import EmbeddedPair, Restarts, embedded_pair

pytestmark = pytest.mark.anyio

ENVIRONMENT = dict(os.environ)
PATIENCE_S = 60.0

# What `tolaria peer` does, and nothing else of the command line.
PEER = """
import functools, json, sys
import anyio
from tolaria.config import LeylineSettings
from tolaria.reference.server import serve_peer

def announce(address):
    print(json.dumps({"listening": str(address)}), flush=True)

assert sys.argv[1:2] + sys.argv[3:4] + sys.argv[5:] == ["peer", "--listen", "--while-stdin"]
anyio.run(functools.partial(
    serve_peer, sys.argv[2], sys.argv[4], LeylineSettings(), announce=announce, while_stdin=True
))
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"listening": "127.0.0.1:1"}', flush=True)
while True:
    time.sleep(60)
"""
ONCE = """
import pathlib, sys
was = pathlib.Path(sys.argv[1])
if was.exists():
    sys.exit("the port is taken")
was.touch()
print('{"listening": "127.0.0.1:1"}', flush=True)
"""
ONCE_THEN_SILENT = """
import pathlib, sys, time
was = pathlib.Path(sys.argv[1])
if was.exists():
    time.sleep(600)
was.touch()
print('{"listening": "127.0.0.1:1"}', flush=True)
"""
PARENT = """
import os, sys
import anyio
from tolaria.reference.embedded import embedded_pair

async def main():
    async with embedded_pair(dict(os.environ), command=(sys.executable, sys.argv[1])) as pair:
        print(*pair.pids, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def script(folder: Path, text: str) -> tuple[str, str]:
    """A command that runs `text`."""
    path = folder / f"script_{len(list(folder.iterdir()))}.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return sys.executable, str(path)


def assert_ended(pid: int) -> None:
    """The process has ended, or does within the patience."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE_S)[0], f"process {pid} still runs"
    finally:
        os.close(descriptor)


def assert_reaped(pair: EmbeddedPair) -> None:
    """No process of the pair is left, not even as a zombie."""
    for pid in pair.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_both_peers_serve_and_are_gone_afterwards(tmp_path: Path) -> None:
    """Both children answer over gRPC; after the block neither a process nor a descriptor is left."""
    before = pipes()
    with capture_logs() as logs:
        async with embedded_pair(ENVIRONMENT, command=script(tmp_path, PEER)) as pair:
            state = SystemStatePacket(version=1)
            async with grpc.aio.insecure_channel(pair.tamiyo) as channel:
                await TamiyoServiceStub(channel).EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=PATIENCE_S)
            async with grpc.aio.insecure_channel(pair.kasmina) as channel:
                stub = KasminaServiceStub(channel)
                await stub.ExportSeedStates(ExportSeedStatesRequest(state=state), timeout=PATIENCE_S)
    assert_reaped(pair)
    assert not [entry for entry in logs if entry["log_level"] == "warning"]
    assert pipes() <= before


def pipes() -> set[str]:
    """The pipes and socket pairs that this process holds open."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.add(str(descriptor.readlink()))
    return {link for link in links if link.startswith("pipe:")}


async def test_one_peer_alone(tmp_path: Path) -> None:
    """Only the peers asked for are started; the other's target is empty."""
    async with embedded_pair(ENVIRONMENT, ["kasmina"], command=script(tmp_path, PEER)) as pair:
        assert (pair.tamiyo, len(pair.pids)) == ("", 1)
        assert pair.kasmina.startswith("127.0.0.1:")
    assert_reaped(pair)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import sys; sys.exit('no such thing')", "tamiyo: ended with code 1: no such thing"),
        ("print('hello', flush=True)\nimport time; time.sleep(600)", "announced itself with b'hello'"),
        ("print('[1]', flush=True)\nimport time; time.sleep(600)", "announced itself with"),
        ("print('x' * 5000, end='', flush=True)\nimport time; time.sleep(600)", "a line that has no end"),
    ],
)
async def test_a_child_that_does_not_start_right(tmp_path: Path, text: str, why: str) -> None:
    """A child that dies or talks nonsense ends the start with its name and its last words."""
    with pytest.raises(PeerUnavailableError) as caught:
        async with embedded_pair(ENVIRONMENT, command=script(tmp_path, text), stop_timeout_s=0.2):
            pytest.fail("the block must not run")
    assert why in str(caught.value)


async def test_a_child_that_stays_silent(tmp_path: Path) -> None:
    """A child that never announces itself ends the start when its time is over."""
    silent = script(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(PeerUnavailableError, match=r"tamiyo: has not announced where it listens within 0\.3 s"):
        async with embedded_pair(ENVIRONMENT, command=silent, start_timeout_s=0.3, stop_timeout_s=0.2):
            pytest.fail("the block must not run")


async def test_a_command_that_does_not_exist() -> None:
    """A command that cannot be run is an unavailable peer, not an OSError."""
    with pytest.raises(PeerUnavailableError, match="cannot be started"):
        async with embedded_pair(ENVIRONMENT, command=("/nonexistent/python",)):
            pytest.fail("the block must not run")


async def test_a_stubborn_child_is_killed(tmp_path: Path) -> None:
    """A child that heeds neither the end of its input nor SIGTERM is killed."""
    async with embedded_pair(ENVIRONMENT, command=script(tmp_path, STUBBORN), stop_timeout_s=0.2) as pair:
        pass
    assert_reaped(pair)


async def test_cancellation_leaves_no_process(tmp_path: Path) -> None:
    """A block that is cancelled ends its children all the same."""
    with anyio.CancelScope() as scope:
        async with embedded_pair(ENVIRONMENT, command=script(tmp_path, PEER)) as pair:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert_reaped(pair)


async def test_an_error_of_the_block_keeps_its_type(tmp_path: Path) -> None:
    """What the block raises comes out as it is, with its cause, and the children are gone."""
    cause = KeyError("cause")
    with pytest.raises(ZeroDivisionError) as caught:
        async with embedded_pair(ENVIRONMENT, ["tamiyo"], command=script(tmp_path, PEER)) as pair:
            raise ZeroDivisionError from cause
    assert caught.value.__cause__ is cause
    assert_reaped(pair)


AT_ONCE = Restarts(in_a_row_max=3, pause_s=0.001)


async def until_logged(logs: list[MutableMapping[str, Any]], event: str, times: int = 1) -> MutableMapping[str, Any]:
    """The entry of `event` that was logged as the `times`th."""
    with anyio.fail_after(PATIENCE_S):
        while len(found := [entry for entry in logs if entry["event"] == event]) < times:
            await anyio.wait_all_tasks_blocked()
    return found[times - 1]


async def test_a_peer_that_dies_is_started_again_where_it_was(tmp_path: Path) -> None:
    """The death is logged with its code; the same channel finds the next process, and nothing of either is left."""
    state, before = SystemStatePacket(version=1), pipes()
    with capture_logs() as logs:
        async with (
            embedded_pair(ENVIRONMENT, ["tamiyo"], command=script(tmp_path, PEER), restarts=AT_ONCE) as pair,
            grpc.aio.insecure_channel(pair.tamiyo) as channel,
        ):
            stub = TamiyoServiceStub(channel)
            await stub.EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=PATIENCE_S)
            first = pair.pids
            os.kill(first[0], signal.SIGKILL)
            death = await until_logged(logs, "embedded peer died")
            again = await until_logged(logs, "embedded peer started again")
            await stub.EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=PATIENCE_S, wait_for_ready=True)
            assert pair.pids != first
    assert (death["peer"], death["detail"], death["log_level"]) == ("tamiyo", "ended with code -9", "warning")
    assert again["listening"] == pair.tamiyo
    assert_reaped(pair)
    assert pipes() <= before


async def test_a_peer_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    """Each pause is twice the one before; after the last start in vain that is logged as an error, with the reason."""
    once = script(tmp_path, ONCE)
    with capture_logs() as logs:
        async with embedded_pair(ENVIRONMENT, ["kasmina"], command=(*once, str(tmp_path / "was")), restarts=AT_ONCE):
            end = await until_logged(logs, "embedded peer given up")
    pauses = [entry["starts_again_in_s"] for entry in logs if entry["event"] == "embedded peer died"]
    assert pauses == [0.001, 0.002, 0.004]
    assert (end["deaths_in_a_row"], end["log_level"]) == (4, "error")
    assert "the port is taken" in end["detail"]


async def test_a_long_life_ends_the_row_of_deaths(tmp_path: Path) -> None:
    """A peer that dies now and then is started again each time, after the shortest pause."""
    now_and_then = Restarts(in_a_row_max=1, pause_s=0.001, lived_s=0.0)
    dying = script(tmp_path, 'print(\'{"listening": "127.0.0.1:1"}\', flush=True)')
    with capture_logs() as logs:
        async with embedded_pair(ENVIRONMENT, ["tamiyo"], command=dying, restarts=now_and_then):
            third = await until_logged(logs, "embedded peer died", 3)
    assert third["starts_again_in_s"] == 0.001


@pytest.mark.parametrize("pause_s", [600.0, 0.0])
async def test_the_end_may_come_during_a_restart(tmp_path: Path, pause_s: float) -> None:
    """Whether a peer waits for its start or is being started: at the end nothing runs, and nothing is held open."""
    before, was = pipes(), tmp_path / "was"
    restarts = Restarts(pause_s=pause_s)
    command = (*script(tmp_path, ONCE_THEN_SILENT), str(was))
    with capture_logs() as logs:
        async with embedded_pair(
            ENVIRONMENT, ["tamiyo"], command=command, restarts=restarts, stop_timeout_s=0.2
        ) as pair:
            await until_logged(logs, "embedded peer died")
    assert_reaped(pair)
    assert pipes() <= before


async def test_a_start_that_the_end_overtakes_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that comes to be while the block is already ending is ended too."""
    open_process, begun, started = anyio.open_process, anyio.Event(), list[anyio.abc.Process]()

    async def slowly(*arguments: Any, **options: Any) -> anyio.abc.Process:
        if started:
            begun.set()
            await anyio.wait_all_tasks_blocked()
        started.append(await open_process(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(anyio, "open_process", slowly)
    command = (*script(tmp_path, ONCE_THEN_SILENT), str(tmp_path / "was"))
    restarts = Restarts(pause_s=0.0)
    async with embedded_pair(ENVIRONMENT, ["tamiyo"], command=command, restarts=restarts, stop_timeout_s=0.2):
        with anyio.fail_after(PATIENCE_S):
            await begun.wait()
    assert len(started) == 2
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


async def test_peers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the process that started them ends both peers: their standard input ends."""
    peer, parent = script(tmp_path, PEER), script(tmp_path, PARENT)
    process = subprocess.Popen([*parent, peer[1]], stdout=subprocess.PIPE, env=ENVIRONMENT)  # noqa: ASYNC220
    with process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        process.kill()
    for pid in pids:
        assert_ended(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_a_peer(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end a peer with exit code 0."""
    command = [*script(tmp_path, PEER), "peer", "kasmina", "--listen", "127.0.0.1:0", "--while-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["listening"].startswith("127.0.0.1:")
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0


async def test_standard_input_that_is_no_pipe_ends_at_once(tmp_path: Path) -> None:
    """With /dev/null for standard input the peer ends by itself, with exit code 0."""
    command = [*script(tmp_path, PEER), "peer", "tamiyo", "--listen", "127.0.0.1:0", "--while-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=PATIENCE_S, check=False)  # noqa: ASYNC221
    assert done.returncode == 0


def test_no_torch() -> None:
    """Importing every module of the room imports no torch."""
    code = """
        import importlib, pkgutil, sys
        import tolaria.reference
        for module in pkgutil.iter_modules(tolaria.reference.__path__):
            importlib.import_module(f"tolaria.reference.{module.name}")
        assert "tolaria.reference.embedded" in sys.modules
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=PATIENCE_S)
