from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tolaria.cli.commands import app
from tolaria.errors import JoinRefusedError
from tolaria.ranks import node


@pytest.mark.parametrize(("given", "limits"), [([], (math.inf, 30.0)), (["--wait", "7"], (7.0, 7.0))])
def test_the_wait_is_also_for_a_place_in_a_full_group(
    given: list[str], limits: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, a full group is waited for as long as a lost machine keeps its place."""
    made: list[dict[str, Any]] = []

    class FullNode:
        def __init__(self, *_positional: object, **limits: Any) -> None:
            made.append(limits)

        async def run(self) -> None:
            raise JoinRefusedError("full", "lane.nodes is 2:2")

    monkeypatch.setattr(node, "Node", FullNode)
    (tmp_path / "secret").write_text("0123456789abcdef")
    done = CliRunner().invoke(app, ["lane", "join", "--secret-file", str(tmp_path / "secret"), *given])
    assert done.exit_code == 1
    assert "lane.nodes is 2:2" in done.stderr
    assert [(one["wait_s"], one["full_s"]) for one in made] == [limits]
