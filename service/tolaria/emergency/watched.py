"""The service's side of being watched: heartbeats, the sentinel's process, and the file that stacks are dumped to.

Owns how the settings become a sentinel's post, and when boards of dead runs are removed. Must not know what a run
is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from tolaria.config import Settings
from tolaria.emergency.guard import Post, keep_sentinel
from tolaria.emergency.heartbeats import Heartbeats
from tolaria.emergency.stacks import register_stack_dump
from tolaria.errors import ConfigurationError
from tolaria.signals import SignalBoard, remove_stale_boards

_BEAT_S_MAX = 1.0
_BEATS_PER_TIMEOUT = 4
_log = structlog.get_logger(__name__)


@contextmanager
def stacks_on_request(settings: Settings) -> Iterator[None]:
    """While the block runs, SIGUSR1 dumps the stacks of all threads to a file in state.dir. For the main thread.

    Raises:
        ConfigurationError: when that file cannot be had.
    """
    path = _stacks(settings)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(register_stack_dump(path))
        except OSError as error:
            raise ConfigurationError([f"state.dir: {error}"]) from None
        yield


async def stay_watched(settings: Settings, board: SignalBoard, hearts: Heartbeats) -> None:
    """A task: beat, and have a sentinel watch this process where the settings ask for one, until cancelled.

    At its start it removes the boards that crashed runs have left beside this one.
    """
    emergency = settings.emergency
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hearts.beat, min(_BEAT_S_MAX, emergency.heartbeat_timeout_s / _BEATS_PER_TIMEOUT))
        tasks.start_soon(_remove_stale_boards, board.path)
        if emergency.sentinel:
            post = Post(
                board=board.path,
                run_id=board.run_id,
                stacks=_stacks(settings),
                heartbeat_timeout_s=emergency.heartbeat_timeout_s,
                startup_s=emergency.startup_allowance_s,
                grace_s=emergency.grace_s,
                drain_s=emergency.drain_s,
            )
            await keep_sentinel(post, on_lost=lambda why: _log.error("sentinel_lost", detail=why))


async def _remove_stale_boards(beside: Path) -> None:
    for path in await anyio.to_thread.run_sync(remove_stale_boards, beside):
        _log.info("stale_board_removed", board=str(path))


def _stacks(settings: Settings) -> Path:
    return Path(settings.state.dir) / "stacks.txt"
