from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tolaria.config import Settings, as_toml, load_settings


def test_rendered_settings_read_back_without_secrets(tmp_path: Path) -> None:
    """The output is a valid configuration file; of a secret it shows only whether it is set."""
    settings = load_settings(
        None,
        [
            "leyline.secret=hush-hush",
            "leyline.previous_secret=hush-before",
            'training.options={"a": [1, "b"], "c": {}}',
            "training.epochs=7",
        ],
    )
    text = as_toml(settings)
    assert "hush" not in text
    assert "\n# secret is set, not shown\n" in text
    assert "\n# previous_secret is set, not shown\n" in text
    assert tomllib.loads(text)["training"]["options"] == {"a": [1, "b"], "c": {}}
    shown = tmp_path / "shown.toml"
    shown.write_text(text)
    again = load_settings(shown)
    assert again.training == settings.training
    assert again.leyline == Settings().leyline
    assert '\nsecret = ""\n' in as_toml(again)


def test_each_value_follows_its_description() -> None:
    """A section begins with its summary, and each line of a description is a comment above the value."""
    text = as_toml(Settings())
    assert text.startswith("# The service process.\n[service]\n# Time after SIGTERM to finish the step")
    assert "after 20 ms, 40 ms and so on.\n# 1: a lost connection is back by then" in text


def test_method_timeouts_read_back_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timeouts_s is a table in the file, JSON in the environment, a dotted name on the command line."""
    (tmp_path / "tolaria.toml").write_text("[tamiyo.timeouts_s]\nEvaluateEpoch = 1.5\n")
    monkeypatch.setenv("TOLARIA_KASMINA__TIMEOUTS_S", '{"ApplyCommand": 0.25}')
    settings = load_settings(None, ["tamiyo.timeouts_s.EvaluateStep=0.5"])
    assert settings.tamiyo.timeouts_s == {"EvaluateEpoch": 1.5, "EvaluateStep": 0.5}
    assert settings.kasmina.timeouts_s == {"ApplyCommand": 0.25}
    monkeypatch.delenv("TOLARIA_KASMINA__TIMEOUTS_S")
    (tmp_path / "shown.toml").write_text(as_toml(settings))
    again = load_settings(tmp_path / "shown.toml")
    assert (again.tamiyo, again.kasmina) == (settings.tamiyo, settings.kasmina)
