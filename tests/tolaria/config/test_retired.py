from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.config import as_toml, load_settings
from tolaria.errors import ConfigurationError

NAMES = [
    "control.max_void_steps",
    "rollback.loss_factor",
    "rollback.norm_factor",
    "rollback.warmup_steps",
    "rollback.halt_on_deadline",
    "emergency.rollback",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["file", "environment", "--set", "all"])
def test_a_retired_setting_is_accepted_with_one_warning(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From each source, and once if it is in all of them; it names the setting."""
    section, field = name.split(".")
    overrides = [f"{name}=7"] if source in {"--set", "all"} else []
    if source in {"environment", "all"}:
        monkeypatch.setenv(f"TOLARIA_{section}__{field}".upper(), "7")
    if source in {"file", "all"}:
        (tmp_path / "tolaria.toml").write_text(f"[{section}]\n{field} = 7\n")
    (notice,) = load_settings(None, overrides).notices
    assert notice.startswith(f"{name} is retired")
    assert ("health.skips_max" if field == "max_void_steps" else "has no effect") in notice


def test_other_settings_give_no_notice() -> None:
    """A setting of the same name in another section is not retired."""
    assert load_settings(None, ["optimizer.warmup_steps=5"]).notices == ()


def test_the_replacement_takes_the_value_unless_it_is_set(tmp_path: Path) -> None:
    """Also by a source of lower priority: the new name is the better evidence of what is wanted."""
    assert load_settings(None, ["control.max_void_steps=3"]).health.skips_max == 3
    assert load_settings(None, ["control.max_void_steps=3", "health.skips_max=5"]).health.skips_max == 5
    (tmp_path / "tolaria.toml").write_text("[health]\nskips_max = 6\n")
    assert load_settings(None, ["control.max_void_steps=3"]).health.skips_max == 6


def test_an_invalid_value_of_a_replaced_setting_is_a_problem() -> None:
    """It would be used, so it has to be valid."""
    with pytest.raises(ConfigurationError, match=r"health\.skips_max"):
        load_settings(None, ["control.max_void_steps=0"])


def test_a_misspelled_retired_setting_is_unknown() -> None:
    """Only exact names are accepted."""
    with pytest.raises(ConfigurationError, match="unknown field"):
        load_settings(None, ["rollback.loss_factors=7"])


def test_config_show_lists_no_retired_setting() -> None:
    """What it prints is a file without notices."""
    shown = as_toml(load_settings(None, [f"{name}=7" for name in NAMES]))
    sections = {block.split("]")[0].split("[")[-1]: block for block in shown.split("\n\n")}
    for section, field in (name.split(".") for name in NAMES):
        assert f"\n{field} = " not in sections[section]
    assert "\nskips_max = 7" in sections["health"]
