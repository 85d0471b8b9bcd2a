from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.config import (
    Difference,
    Settings,
    SettingsSources,
    as_toml,
    differences,
    is_live,
    load_settings,
    with_live,
)
from tolaria.errors import ConfigurationError

LIVE = {
    "service": {"exit_code_drained"},
    "server": {"calls_per_second", "bad_calls_per_second", "calls_in_flight_max", "streams_max"},
    "metrics": {"connections_max"},
    "logging": {"level"},
    "telemetry": {"queue_packets", "subscribers_max"},
    "tamiyo": {"timeout_s", "timeouts_s", "retries"},
    "kasmina": {"timeout_s", "timeouts_s", "retries"},
    "control": {
        *("boundary_budget_ms", "tamiyo_budget_ms", "hook_budget_ms", "step_interval", "boundary_slack_ms"),
    },
    "lane": {"restarts_max", "restarts_within_s"},
    "gradients": {"compact", "share_jump", "seed_conflict", "conflict"},
    "rollback": {
        *("fast_budget_s", "full_budget_s", "automatic", "accuracy_drop", "automatic_max", "per_steps"),
        *("lr_cut", "lr_cut_steps", "progress_rollbacks_max"),
    },
    "checkpoint": {
        *("every_epochs", "every_steps", "keep_last", "keep_superseded", "keep_superseded_s", "on_failure", "retry_s"),
    },
    "profiler": {"active_steps", "every_steps"},
    "leyline": {"secret", "previous_secret", "freshness_s"},
}
"""The settings that a reload changes, written out: each has a case in tests/tolaria/service/test_reload.py."""


def test_each_setting_says_whether_it_is_live() -> None:
    """By its metadata, and in what `tolaria config show` prints."""
    found = {
        name: live
        for name, section in Settings()
        if (live := {f for f in type(section).model_fields if is_live(type(section), f)})
    }
    assert found == LIVE
    text = as_toml(Settings())
    assert text.count("\n# (live)\n") == sum(map(len, LIVE.values()))
    assert "# (live)\nkeep_last = 3\n" in text
    assert "\n# (live)\nseed = " not in text


def test_differences_name_settings_and_both_values() -> None:
    """In the order of the sections; equal settings have none."""
    before = load_settings(None, ["checkpoint.keep_last=3"])
    after = load_settings(None, ["checkpoint.keep_last=7", 'training.options={"width": 8}'])
    assert differences(before, before) == []
    assert differences(before, after) == [
        Difference("training.options", "{}", '{"width": 8}', live=False),
        Difference("checkpoint.keep_last", "3", "7", live=True),
    ]


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [("", "hush", ("not set", "set")), ("hush", "", ("set", "not set")), ("hush", "hash", ("set", "another one"))],
)
def test_differences_of_secrets_do_not_show_them(before: str, after: str, texts: tuple[str, str]) -> None:
    """Only whether there is one, and that it is another one."""
    old, new = (load_settings(None, [f"leyline.secret={secret}"]) for secret in (before, after))
    (found,) = differences(old, new)
    assert (found.before, found.after) == tuple(f'"{text}"' for text in texts)


def test_only_live_settings_are_taken() -> None:
    """The others keep the values in force."""
    in_force = load_settings(None, ["training.epochs=5"])
    wanted = load_settings(None, ["training.epochs=9", "checkpoint.keep_last=7", "rollback.memory_mb=1"])
    taken = with_live(in_force, wanted)
    assert (taken.training.epochs, taken.checkpoint.keep_last, taken.rollback.memory_mb) == (5, 7, 256)
    assert in_force.checkpoint.keep_last == 3


def test_live_settings_that_need_others_wait_with_them() -> None:
    """Nothing is taken, and the error says which settings do not fit."""
    in_force = load_settings(None, ["leyline.nonce_window_s=120"])
    wanted = load_settings(None, ["leyline.nonce_window_s=900", "leyline.freshness_s=300"])
    with pytest.raises(ConfigurationError, match=r"leyline.nonce_window_s is shorter .* needs a restart"):
        with_live(in_force, wanted)


def test_sources_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, wherever the process is by then, with the same overrides."""
    file = tmp_path / "tolaria.toml"
    file.write_text("[checkpoint]\nkeep_last = 4\n")
    monkeypatch.chdir(tmp_path)
    sources = SettingsSources.of(None, ["training.epochs=5"])
    assert sources.read().checkpoint.keep_last == 4
    file.write_text("[checkpoint]\nkeep_last = 6\n[training]\nepochs = 9\n")
    monkeypatch.chdir("/")
    again = sources.read()
    assert (again.checkpoint.keep_last, again.training.epochs) == (6, 5)


def test_a_file_that_has_gone_is_no_file_with_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change everything back. One that is there only later is read."""
    monkeypatch.chdir(tmp_path)
    without = SettingsSources.of(None, [])
    file = tmp_path / "tolaria.toml"
    file.write_text("[checkpoint]\nkeep_last = 4\n")
    sources = SettingsSources.of(None, [])
    assert without.read().checkpoint.keep_last == sources.read().checkpoint.keep_last == 4
    file.unlink()
    with pytest.raises(ConfigurationError, match=r"there is no file .*tolaria\.toml"):
        sources.read()
    assert without.read() == Settings()
