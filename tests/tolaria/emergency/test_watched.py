from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tolaria.config import Settings, load_settings
from tolaria.emergency.heartbeats import Heartbeats
from tolaria.emergency.watched import stay_watched
from tolaria.signals import SignalBoard
from tolaria.signals import stale as stale_module

pytestmark = pytest.mark.anyio
PATIENCE_S = 30.0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Without a sentinel, which would watch the tests."""
    monkeypatch.chdir(tmp_path)
    return load_settings(None, ["emergency.sentinel=false"])


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an earlier boot left beside the board."""
    path = tmp_path / "tolaria-run-1"
    SignalBoard.create(path, "run-1").close()
    monkeypatch.setattr(stale_module, "boot_id", lambda: bytes(16))
    return path


@pytest.fixture
def board(tmp_path: Path) -> Iterator[SignalBoard]:
    """The board of the run that starts."""
    with SignalBoard.create(tmp_path / "tolaria-run-2", "run-2") as board:
        yield board


async def test_watched_boards_of_dead_runs_are_removed_at_the_start(
    settings: Settings, left: Path, board: SignalBoard
) -> None:
    """While the hearts begin to beat; the run's own stays."""
    hearts = Heartbeats(board.claim("tolaria"))
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stay_watched, settings, board, hearts)
            while await anyio.Path(left).exists() or not board.read("tolaria").lane_heartbeat_ns:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert board.current
