"""The file of stacks of the lane: a disk that hangs does not keep a silent lane from being ended."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from tolaria.ranks.stacks import STACKS_FILE
from tolaria.transport.lane_stacks import LaneStacks

pytestmark = pytest.mark.anyio


async def test_a_disk_that_hangs_is_given_up(tmp_path: Path) -> None:
    """Within five seconds; where the lane was is in the log all the same."""
    path = tmp_path / STACKS_FILE
    os.mkfifo(path)  # nobody reads it: opening it blocks
    with capture_logs() as lines:
        try:
            with anyio.fail_after(60):
                where = await LaneStacks(str(tmp_path), None).dump(2**22 + 1, "no heartbeat")
        finally:
            os.close(await anyio.to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_NONBLOCK))  # ends the wait
    assert where.startswith("no stacks of process")
    assert [line["event"] for line in lines] == ["stacks_not_written", "lane_stacks"]
    assert lines[0]["detail"] == "not written within 5 s"
