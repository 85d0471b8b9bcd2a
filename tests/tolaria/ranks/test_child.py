"""How the processes of a group begin."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.processes import python_path

FAKES = """
import gc, sys, types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Fakes(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self) if name in {"tolaria.lane.hosting", "tolaria.ranks.elastic"} else None

    def exec_module(self, module):
        print("imported, collects:", gc.isenabled(), flush=True)
        module.follow = module.Ranks = run

def run(*_, **__):
    print("runs, collects:", gc.isenabled(), "leaves out:", gc.get_freeze_count() > len(gc.get_objects()), flush=True)
    return ended

sys.meta_path.insert(0, Fakes())
"""
RANK = f"""{FAKES}
from tolaria.lane.rank import main
ended = 0
sys.exit(main())
"""
AGENT = f"""{FAKES}
from tolaria.config.ranks import NodePlace
from tolaria.ranks import agent
from tolaria.ranks.child import begin
from tolaria.signals.lane_page import LanePage
ended = types.SimpleNamespace(run=dict, world=1)
begin({os.getpid()})
agent._run(1, NodePlace(), LanePage.create())
"""


@pytest.mark.parametrize("program", [RANK, AGENT], ids=["rank", "agent"])
def test_the_collector_is_off_while_torch_is_imported_and_no_longer(program: str) -> None:
    """It is on for what follows, and leaves out what has been imported."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place["TOLARIA_LANE_AGENT"] = f"{os.getpid()}:"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | place | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["imported, collects: False", "runs, collects: True leaves out: True"]
