"""The dashboards as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.overview import overview
from dashboards.seeds import seeds

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"


def texts() -> dict[str, str]:
    """Returns the content of the files by their name."""
    boards = {"overview.json": overview(), "seeds.json": seeds()}
    return {
        name: json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(board.build())), indent=1, sort_keys=True) + "\n"
        for name, board in boards.items()
    }
