"""The process of one tracker: reads the log of metrics, and ends with the service after what is left."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tolaria.trackers.feed import TRACKERS_DIR, TrackerFeed, progress_path
from tolaria.trackers.records import METRICS_DIR
from tolaria.trackers.tracker import tracker_class

_POLL_S: Final = 0.5
_NICENESS: Final = 10


def main(arguments: Sequence[str]) -> int:
    """Feeds a tracker until standard input ends and the log has been read to its end; returns the exit code.

    Errors of the tracker end the process; the last line on standard error says which.
    """
    parser = argparse.ArgumentParser(prog="python -m tolaria.trackers", description="The process of a tracker.")
    parser.add_argument("tracker")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--close-s", type=float, default=10.0, help="seconds for what is left after the service's end")
    given = parser.parse_args(arguments)
    os.nice(_NICENESS)  # training and the service come first
    sys.stdout.write(json.dumps({"tracker": given.tracker}) + "\n")
    sys.stdout.flush()
    closing = threading.Event()
    threading.Thread(target=_watch_service, args=(closing, given.close_s), daemon=True).start()
    sys.path.insert(0, str(Path.cwd()))  # trackers may be beside the job
    tracker, progress = tracker_class(given.tracker)(given.options), progress_path(given.state_dir, given.tracker)
    progress.parent.mkdir(parents=True, exist_ok=True)
    with progress.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a service that was killed may still be at its end
        files = given.state_dir / TRACKERS_DIR / given.tracker
        feed = TrackerFeed(tracker, files, given.state_dir / METRICS_DIR, progress)
        while feed.advance() or not closing.is_set():
            closing.wait(_POLL_S)
        while feed.advance():  # what was written just before the end
            pass
        feed.close()
    return 0


def _watch_service(closing: threading.Event, close_s: float) -> None:
    """Waits for the end of standard input, then gives the tracker `close_s` before the process ends in any case."""
    while os.read(0, 4096):
        pass
    closing.set()
    threading.Event().wait(close_s)
    os._exit(3)
