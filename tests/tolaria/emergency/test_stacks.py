from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tolaria.emergency.stacks import DUMP_SIGNAL, handles_dump, mark, register_stack_dump


def test_the_signal_appends_all_stacks(tmp_path: Path) -> None:
    """Each dump comes behind what the file holds; nobody else may read it."""
    path = tmp_path / "stacks"
    mark(path, "first")
    with register_stack_dump(path):
        assert handles_dump(os.getpid())
        os.kill(os.getpid(), DUMP_SIGNAL)
        mark(path, "second")
        os.kill(os.getpid(), DUMP_SIGNAL)
    text = path.read_text()
    assert text.index("first") < text.index("test_the_signal_appends_all_stacks") < text.index("second")
    assert text.count("test_the_signal_appends_all_stacks") == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_late_request_is_harmless(tmp_path: Path) -> None:
    """After the block the signal is ignored: by default it would end the process."""
    path = tmp_path / "stacks"
    with register_stack_dump(path):
        pass
    assert not handles_dump(os.getpid())
    os.kill(os.getpid(), DUMP_SIGNAL)
    assert path.read_text() == ""
    signal.signal(DUMP_SIGNAL, signal.SIG_DFL)


def test_a_process_without_a_handler_is_told_apart() -> None:
    """Such a process must not be asked; nor one that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not handles_dump(child.pid)
    child.communicate(b"\n")
    assert not handles_dump(child.pid)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Somebody else's file cannot be made to grow."""
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="link"), register_stack_dump(tmp_path / "link"):
        pass
