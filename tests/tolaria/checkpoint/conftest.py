from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "state-0.1.0.tar.gz"


@pytest.fixture
def old_state(tmp_path: Path) -> Path:
    """A state directory that version 0.1.0 wrote until it was killed with SIGKILL."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "state"
