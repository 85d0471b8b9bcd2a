from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled C reader of boards."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on this machine")
    program = tmp_path_factory.mktemp("reader") / "signals_reader"
    subprocess.run([compiler, "-std=gnu11", "-O2", HERE / "signals_reader.c", "-o", program], check=True)
    return program
