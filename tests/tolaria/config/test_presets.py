from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.config import Settings, load_settings
from tolaria.config.presets import PRESETS
from tolaria.errors import ConfigurationError


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without a settings file."""
    monkeypatch.chdir(tmp_path)


def test_plain_trains_without_a_controller() -> None:
    """No peers, no seeds, bad batches are skipped; all else is as by default."""
    settings = load_settings(overrides=["preset=plain"])
    assert (settings.control.enabled, settings.seeds.enabled, settings.health.policy) == (False, False, "skip")
    changed = {"control", "seeds", "health"}
    assert settings.model_dump(exclude=changed) == Settings().model_dump(exclude=changed)


def test_each_source_chooses_a_preset_and_the_last_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, the environment, the command line, in this order; `full` is the default."""
    file = tmp_path / "my.toml"
    file.write_text('preset = "plain"\n[training]\nepochs = 3\n')
    settings = load_settings(file)
    assert (settings.control.enabled, settings.training.epochs) == (False, 3)
    monkeypatch.setenv("TOLARIA_PRESET", "full")
    assert load_settings(file).control.enabled
    assert not load_settings(file, ["preset=plain"]).control.enabled


def test_every_setting_overrides_a_preset(tmp_path: Path) -> None:
    """Also one of the file, which is read before the command line that chooses the preset."""
    file = tmp_path / "my.toml"
    file.write_text('[health]\npolicy = "watch"\n')
    settings = load_settings(file, ["preset=plain", "control.enabled=true"])
    assert (settings.control.enabled, settings.health.policy, settings.seeds.enabled) == (True, "watch", False)


@pytest.mark.parametrize(("given", "hint"), [("plan", "did you mean plain?"), ("x", "known are full, plain")])
def test_an_unknown_preset_is_refused(given: str, hint: str) -> None:
    """With its source, and what it may have meant; other mistakes are reported at the same time."""
    with pytest.raises(ConfigurationError) as raised:
        load_settings(overrides=[f"preset={given}", "training.epoch=3"])
    assert [hint in problem for problem in raised.value.problems].count(True) == 1
    assert len(raised.value.problems) == 2


def test_a_preset_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A table of this name in the file."""
    file = tmp_path / "my.toml"
    file.write_text("[preset]\nname = 1\n")
    with pytest.raises(ConfigurationError, match="there is no preset"):
        load_settings(file)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_consist_of_valid_settings(name: str) -> None:
    """Each is a valid configuration."""
    assert load_settings(overrides=[f"preset={name}"]).notices == ()
