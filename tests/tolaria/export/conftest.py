"""A trained model that the tests of one module share."""

from __future__ import annotations

import pytest

from support.exported import Trained, trained


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A transformer with tied weights and a grown seed."""
    place = tmp_path_factory.mktemp("gpt")
    return trained(place / "state", "support.export_jobs:TokensJob", [("lora", "tokens")])
