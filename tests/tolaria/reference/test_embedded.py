"""The embedded peers as real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import grpc.aio
import pytest
from structlog.testing import capture_logs

from leyline.v1.kasmina_service_pb2 import ExportSeedStatesRequest
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from leyline.v1.state_pb2 import SystemStatePacket
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochRequest
from leyline.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tolaria.errors import PeerUnavailableError
from tolaria.peers.connect import Peer
from tolaria.processes import RestartPolicy
from tolaria.reference.embedded import EmbeddedPeer, embedded_peers

pytestmark = pytest.mark.anyio

ENVIRONMENT = dict(os.environ)
TIMEOUT_S = 180.0

# `tolaria peer` without the rest of the command line.
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
started = pathlib.Path(sys.argv[1])
if started.exists():
    sys.exit("the port is taken")
started.touch()
print('{"listening": "127.0.0.1:1"}', flush=True)
"""
PARENT = """
import os, sys
import anyio
from tolaria.reference.embedded import embedded_peers

async def main():
    async with embedded_peers(dict(os.environ), command=(sys.executable, sys.argv[1])) as pair:
        print(*(peer.pid for peer in pair.values()), flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def script(folder: Path, text: str) -> tuple[str, str]:
    """A command that runs `text`."""
    path = folder / f"script_{len(list(folder.iterdir()))}.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return sys.executable, str(path)


def assert_ended(pid: int) -> None:
    """The process ends within the timeout."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], TIMEOUT_S)[0], f"process {pid} still runs"
    finally:
        os.close(descriptor)


def pids(pair: Mapping[Peer, EmbeddedPeer]) -> list[int]:
    """The latest process of each peer."""
    return [peer.pid for peer in pair.values()]


def assert_reaped(pair: Mapping[Peer, EmbeddedPeer]) -> None:
    """No process of the pair is left, not even as a zombie."""
    for pid in pids(pair):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_both_peers_serve_while_the_block_runs(tmp_path: Path) -> None:
    """Both peers answer over gRPC; after the block neither a process nor a descriptor is left."""
    before = pipes()
    with capture_logs() as logs:
        async with embedded_peers(ENVIRONMENT, command=script(tmp_path, PEER)) as pair:
            state = SystemStatePacket(version=1)
            async with grpc.aio.insecure_channel(pair["tamiyo"].target) as channel:
                await TamiyoServiceStub(channel).EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=TIMEOUT_S)
            async with grpc.aio.insecure_channel(pair["kasmina"].target) as channel:
                stub = KasminaServiceStub(channel)
                await stub.ExportSeedStates(ExportSeedStatesRequest(state=state), timeout=TIMEOUT_S)
    assert_reaped(pair)
    assert not [entry for entry in logs if entry["log_level"] == "warning"]
    assert pipes() <= before


def pipes() -> set[str]:
    """The pipes that this process holds open."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.add(str(descriptor.readlink()))
    return {link for link in links if link.startswith("pipe:")}


async def test_one_peer_without_the_other(tmp_path: Path) -> None:
    """Only the requested peer starts."""
    async with embedded_peers(ENVIRONMENT, ["kasmina"], command=script(tmp_path, PEER)) as pair:
        assert list(pair) == ["kasmina"]
        assert pair["kasmina"].target.startswith("127.0.0.1:")
    assert_reaped(pair)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("import sys; sys.exit('no such thing')", "tamiyo: ended with code 1: no such thing"),
        ("print('hello', flush=True)\nimport time; time.sleep(600)", "tamiyo: announced itself with b'hello'"),
        ("print('{\"watching\": 1}', flush=True)\nimport time; time.sleep(600)", "tamiyo: announced itself with"),
        ("print('{\"listening\": 1}', flush=True)\nimport time; time.sleep(600)", "tamiyo: announced itself with"),
    ],
)
async def test_a_peer_that_does_not_start_is_unavailable(tmp_path: Path, text: str, detail: str) -> None:
    """The error has the peer's name, what it did and the end of its standard error."""
    with pytest.raises(PeerUnavailableError) as caught:
        async with embedded_peers(ENVIRONMENT, ["tamiyo"], command=script(tmp_path, text), stop_timeout_s=0.2):
            pytest.fail("the block must not run")
    assert detail in str(caught.value)


async def test_a_silent_peer_is_unavailable(tmp_path: Path) -> None:
    """A peer that never announces its address fails the start at the deadline."""
    silent = script(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(PeerUnavailableError, match=r"(tamiyo|kasmina): has not announced itself within 0\.3 s"):
        async with embedded_peers(ENVIRONMENT, command=silent, start_timeout_s=0.3, stop_timeout_s=0.2):
            pytest.fail("the block must not run")


async def test_a_missing_command_is_an_unavailable_peer() -> None:
    """A command that cannot be run is no OSError."""
    with pytest.raises(PeerUnavailableError, match="cannot be started"):
        async with embedded_peers(ENVIRONMENT, command=("/nonexistent/python",)):
            pytest.fail("the block must not run")


async def test_a_peer_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    """That is logged for each peer."""
    with capture_logs() as logs:
        async with embedded_peers(ENVIRONMENT, command=script(tmp_path, STUBBORN), stop_timeout_s=0.2) as pair:
            pass
    assert_reaped(pair)
    killed = [(log["peer"], log["then"]) for log in logs if log["event"] == "embedded_peer_killed"]
    assert sorted(killed) == [("kasmina", "SIGKILL"), ("tamiyo", "SIGKILL")]


async def test_cancellation_leaves_no_process(tmp_path: Path) -> None:
    """A cancelled block stops its peers."""
    with anyio.CancelScope() as scope:
        async with embedded_peers(ENVIRONMENT, command=script(tmp_path, PEER)) as pair:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert_reaped(pair)


AT_ONCE = RestartPolicy(pause_s=0.001, restarts_max=3)


async def until_logged(logs: list[MutableMapping[str, Any]], event: str) -> MutableMapping[str, Any]:
    """Waits for the first log entry of `event`."""
    with anyio.fail_after(TIMEOUT_S):
        while not (found := [entry for entry in logs if entry["event"] == event]):
            await anyio.wait_all_tasks_blocked()
    return found[0]


async def test_a_dead_peer_is_restarted_on_its_port(tmp_path: Path) -> None:
    """The death is logged with its exit code, and the same channel reaches the next process."""
    state, before = SystemStatePacket(version=1), pipes()
    with capture_logs() as logs:
        async with (
            embedded_peers(ENVIRONMENT, ["tamiyo"], command=script(tmp_path, PEER), restarts=AT_ONCE) as pair,
            grpc.aio.insecure_channel(pair["tamiyo"].target) as channel,
        ):
            stub = TamiyoServiceStub(channel)
            await stub.EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=TIMEOUT_S)
            first, target = pids(pair), pair["tamiyo"].target
            os.kill(first[0], signal.SIGKILL)
            death = await until_logged(logs, "embedded_peer_died")
            again = await until_logged(logs, "embedded_peer_restarted")
            await stub.EvaluateEpoch(EvaluateEpochRequest(state=state), timeout=TIMEOUT_S, wait_for_ready=True)
            assert pids(pair) != first
    assert (death["peer"], death["detail"], death["log_level"]) == ("tamiyo", "ended with code -9", "warning")
    assert again["listening"] == pair["tamiyo"].target == target
    assert_reaped(pair)
    assert pipes() <= before


async def test_a_peer_whose_restarts_fail_is_given_up(tmp_path: Path) -> None:
    """Each pause doubles; after the last restart that is logged as an error, with the reason."""
    once = script(tmp_path, ONCE)
    command = (*once, str(tmp_path / "started"))
    with capture_logs() as logs:
        async with embedded_peers(ENVIRONMENT, ["kasmina"], command=command, restarts=AT_ONCE):
            end = await until_logged(logs, "embedded_peer_given_up")
    pauses = [entry["starts_again_in_s"] for entry in logs if entry["event"] == "embedded_peer_died"]
    assert pauses == [0.001, 0.002, 0.004]
    assert (end["deaths_in_a_row"], end["log_level"]) == (4, "error")
    assert "the port is taken" in end["detail"]


async def test_peers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Their standard input ends with it."""
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
        assert process.wait(TIMEOUT_S) == 0


async def test_a_peer_without_standard_input_ends_at_once(tmp_path: Path) -> None:
    """With /dev/null for standard input it ends with exit code 0."""
    command = [*script(tmp_path, PEER), "peer", "tamiyo", "--listen", "127.0.0.1:0", "--while-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=TIMEOUT_S, check=False)  # noqa: ASYNC221
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
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=TIMEOUT_S)
