from __future__ import annotations

from pathlib import Path

import pytest

from tolaria.config import Settings, child_environment, load_settings
from tolaria.errors import ConfigurationError


def problems(overrides: list[str] | None = None, config_file: Path | None = None) -> list[str]:
    """The problems that loading reports."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(config_file, overrides)
    return caught.value.problems


def test_defaults_apply_without_any_source() -> None:
    """Neither a file nor a variable nor an override is required."""
    settings = load_settings()
    assert settings == Settings()
    assert settings.server.listen == "127.0.0.1:50051"
    assert settings.metrics.listen == "127.0.0.1:9464"
    assert settings.training.job == "digits"


def test_command_line_overrides_environment_overrides_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source overrides single fields of the one before."""
    (tmp_path / "tolaria.toml").write_text("[training]\nepochs = 3\nseed = 3\naccumulate = 3\n")
    monkeypatch.setenv("TOLARIA_TRAINING__SEED", "4")
    monkeypatch.setenv("TOLARIA_TRAINING__ACCUMULATE", "4")
    training = load_settings(None, ["training.accumulate=5"]).training
    assert (training.epochs, training.seed, training.accumulate) == (3, 4, 5)


def test_variable_names_are_case_insensitive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in lower case is the same setting."""
    monkeypatch.setenv("tolaria_training__epochs", "4")
    assert load_settings().training.epochs == 4


def test_environment_is_read_by_load_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are built directly do not depend on the environment."""
    monkeypatch.setenv("TOLARIA_TRAINING__SEED", "4")
    assert Settings().training.seed == 0


def test_config_file_replaces_the_default_file(tmp_path: Path) -> None:
    """tolaria.toml is not read when another file is given."""
    (tmp_path / "tolaria.toml").write_text("[training]\nepochs = 3\n")
    other = tmp_path / "other.toml"
    other.write_text("[training]\nseed = 9\n")
    training = load_settings(other).training
    assert (training.epochs, training.seed) == (20, 9)


def test_tables_are_merged_across_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """training.options is a table in the file, JSON in the environment, dotted names on the command line."""
    (tmp_path / "tolaria.toml").write_text("[training.options]\nwidth = 8\n")
    monkeypatch.setenv("TOLARIA_TRAINING__OPTIONS", '{"dropout": 0.5}')
    options = load_settings(None, ["training.options.batch_size=64"]).training.options
    assert options == {"width": 8, "dropout": 0.5, "batch_size": 64}


def test_json_in_a_text_field_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tables and lists are parsed as JSON."""
    monkeypatch.setenv("TOLARIA_TRAINING__EXPERIMENT", "[1]")
    settings = load_settings(None, ["leyline.secret={}"])
    assert settings.training.experiment == "[1]"
    assert settings.leyline.secret.get_secret_value() == "{}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainin.epochs=1", ["trainin", "unknown section", "did you mean training"]),
        ("training.epocs=1", ["training.epocs", "unknown field", "did you mean epochs"]),
        ("training.epochs=0", ["training.epochs", "greater than or equal to 1", "'0'", "--set"]),
        ("training.epochs=x", ["training.epochs", "integer"]),
        ("training.epochs.x=1", ["training.epochs", "integer"]),
        ("tamiyo.timeout_s=nan", ["tamiyo.timeout_s", "finite"]),
        ("tamiyo.timeouts_s.EvaluateStp=1", ["tamiyo.timeouts_s", "'EvaluateStp'", "did you mean EvaluateStep"]),
        ("tamiyo.timeouts_s.ApplyCommand=1", ["tamiyo.timeouts_s", "known are EvaluateEpoch, EvaluateStep"]),
        ("kasmina.timeouts_s.PrepareRollback=1", ["kasmina.timeouts_s", "no method with a separate deadline"]),
        ("kasmina.timeouts_s.ApplyCommand=3", ["kasmina.timeouts_s", "gives ApplyCommand 3.0 s", "timeout_s (2.0)"]),
        ("kasmina.timeouts_s.ApplyCommand=0", ["kasmina.timeouts_s.ApplyCommand", "greater than 0"]),
        ("emergency.recovery_epochs=0", ["emergency.recovery_epochs", "greater than or equal to 1"]),
        ("tamiyo.retries=-1", ["tamiyo.retries", "greater than or equal to 0"]),
        ("tamiyo.in_flight_max=0", ["tamiyo.in_flight_max", "greater than or equal to 1"]),
        ("tamiyo.target=nowhere", ["tamiyo.target", "'nowhere' is not host:port"]),
        ("tamiyo.target=host:0", ["tamiyo.target", "port 0"]),
        ("server.listen=127.0.0.1:70000", ["server.listen", "port from 0 to 65535"]),
        ("training.device=tpu", ["training.device"]),
        ("training.options=3", ["training.options", "dictionary"]),
        ("training.options={x", ["training.options", "not JSON", "--set"]),
        ("training=3", ["section.field=value"]),
        ("nonsense", ["section.field=value"]),
    ],
)
def test_invalid_override_names_the_setting(override: str, words: list[str]) -> None:
    """Each kind of mistake is one problem that names the setting and the cause."""
    (problem,) = problems([override])
    for word in words:
        assert word in problem


def test_all_problems_are_reported_at_once() -> None:
    """Several mistakes need one correction, not one start each."""
    assert len(problems(["server.listen=x", "training.epochs=0", "kasmina.timeout_s=-1"])) == 3
    assert len(problems(["training.epocs=1", "training.epochs=x", "nonsense"])) == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TOLARIA_TRAINING__EPOCS", "3", ["training.epocs", "unknown field"]),
        ("TOLARIA_TRAINNG__EPOCHS", "3", ["trainng", "unknown section"]),
        ("TOLARIA_EPOCHS", "3", ["TOLARIA_EPOCHS", "TOLARIA_<SECTION>__<FIELD>"]),
        ("TOLARIA_TRAINING__OPTIONS", "{x", ["training.options", "not JSON", "TOLARIA_TRAINING__OPTIONS"]),
        ("TOLARIA_TRAINING__OPTIONS__WIDTH", "8", ["training.options__width", "unknown field"]),
        ("tolaria_training__epocs", "3", ["training.epocs", "unknown field"]),
        ("TOLARIA_TRAINING__EPOCHS", "-1", ["training.epochs", "environment TOLARIA_TRAINING__EPOCHS"]),
    ],
)
def test_invalid_variable_is_reported(name: str, value: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No TOLARIA_ variable is ignored."""
    monkeypatch.setenv(name, value)
    (problem,) = problems()
    for word in words:
        assert word in problem


def test_unreadable_file_is_reported_by_name(tmp_path: Path) -> None:
    """A missing file, invalid TOML and a section that is no table are each reported with the file."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[training\n")
    assert "broken.toml" in problems(config_file=broken)[0]
    assert "missing.toml" in problems(config_file=tmp_path / "missing.toml")[0]
    broken.write_text("training = 3\n")
    assert problems(["training.epochs=x"], broken) == [
        f"training: is a section, not a value ({broken})",
        "training.epochs: input should be a valid integer, unable to parse string as an integer, got 'x' (--set)",
    ]


@pytest.mark.parametrize("field", ["secret", "previous_secret"])
def test_masked_secret_is_rejected(field: str) -> None:
    """Asterisks copied from masked output do not become the key."""
    (problem,) = problems([f"leyline.{field}=**********"])
    assert problem == f"leyline.{field}: consists of asterisks only, which is how a secret is masked (--set)"


def test_invalid_secret_is_not_printed(tmp_path: Path) -> None:
    """The problem names the setting without its value."""
    file = tmp_path / "x.toml"
    file.write_text("[leyline]\nsecret = 12345\n")
    (problem,) = problems(config_file=file)
    assert "leyline.secret" in problem
    assert "12345" not in problem


def test_child_environment_has_secrets_and_no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer started by Tolaria shares the secrets, and is not configured by Tolaria's settings."""
    monkeypatch.setenv("TOLARIA_TRAINING__EPOCHS", "3")
    monkeypatch.setenv("tolaria_training__seed", "3")
    monkeypatch.setenv("TOLARIA_LEYLINE__PREVIOUS_SECRET", "b")
    monkeypatch.setenv("PATH", "/bin")
    environment = child_environment(load_settings(None, ["leyline.secret=a"]))
    assert environment["TOLARIA_LEYLINE__SECRET"] == "a"
    assert environment["TOLARIA_LEYLINE__PREVIOUS_SECRET"] == "b"
    assert environment["PATH"] == "/bin"
    assert not {"TOLARIA_TRAINING__EPOCHS", "tolaria_training__seed"} & environment.keys()
