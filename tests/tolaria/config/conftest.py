from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs each test in an empty directory and without TOLARIA_ variables."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("TOLARIA_"):
            monkeypatch.delenv(name)
