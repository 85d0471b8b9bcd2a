"""A controller on a board in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.emergency import Stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A controller with the default policy."""
    stage = Stage(tmp_path / "board")
    yield stage
    stage.close()
