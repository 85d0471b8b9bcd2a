"""A controller on a board in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.emergency import ControllerHarness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[ControllerHarness]:
    """A controller that may broadcast 60 signals a minute."""
    harness = ControllerHarness(tmp_path / "board")
    yield harness
    harness.close()
