"""What passes between an agent and its ranks; groups that die are in tests/system/test_rank_deaths.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch does not list it

from tolaria.config.ranks import RankEnvironment, prepare_ranks
from tolaria.ranks import agent
from tolaria.ranks.group import Group

ASK = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect(chr(0) + sys.argv[1])
    data, descriptors, _, _ = socket.recv_fds(asking, 1, 2)
print(len(descriptors))
"""


def test_only_ranks_of_this_agent_get_its_connection(tmp_path: Path) -> None:
    """Any process of the machine sees the name of an abstract socket; another one is hung up on, and a rank comes."""
    given = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("connection", "page")]
    address = agent.serve_leader(Namespace(connection=given[0], page=given[1]))
    with socket.socket(socket.AF_UNIX) as stranger:  # this process is no child of itself
        stranger.connect("\0" + address)
        assert stranger.recv(1) == b""
    done = subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.strip() == "2"


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's variables count only beside Tolaria's own; what another launcher has left makes no group."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TOLARIA_LANE_AGENT", raising=False)
    assert RankEnvironment.read() == RankEnvironment()
    for name in ("TOLARIA_LANE_AGENT", "TORCHELASTIC_SIGNALS_TO_HANDLE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    monkeypatch.delenv("GROUP_RANK", raising=False)
    prepare_ranks("somewhere", "lo")
    assert RankEnvironment.read() == RankEnvironment(3, 8, 1, 2, 0, os.getpid(), "somewhere", "node0", 29500)
    monkeypatch.setenv("GROUP_RANK", "1")
    assert RankEnvironment.read().node == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert RankEnvironment.read() == RankEnvironment()


def test_a_rank_waits_for_its_leader_before_it_joins() -> None:
    """Ranks that are started long before, to be ready, have nothing on a device; without an agent none waits."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [RankEnvironment(rank, 2, agent=1, store_host="127.0.0.1", store_port=store.port) for rank in (0, 1)]
    follower = threading.Thread(target=Group.await_leader, args=(places[1],), daemon=True)
    follower.start()
    follower.join(0.5)
    assert follower.is_alive()
    Group.await_leader(places[0])
    follower.join(180)
    assert not follower.is_alive()
    Group.await_leader(RankEnvironment(1, 2))
