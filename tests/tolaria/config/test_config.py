from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tolaria.config import Address, Settings, as_toml, child_environment, load_settings
from tolaria.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def problems(overrides: list[str] | None = None, config_file: Path | None = None) -> list[str]:
    """What is wrong with the settings, one line a mistake."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(config_file, overrides)
    return caught.value.problems


def test_defaults_need_no_file_and_no_environment() -> None:
    """Without any source the documented defaults hold."""
    settings = load_settings()
    assert settings.server.listen == "127.0.0.1:50051"
    assert settings.metrics.listen == "127.0.0.1:9464"
    assert settings.training.job == "digits"


def test_command_line_wins_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source overrides the one below it, field by field."""
    (tmp_path / "tolaria.toml").write_text("[training]\nepochs = 3\nseed = 3\naccumulate = 3\n")
    monkeypatch.setenv("TOLARIA_TRAINING__SEED", "4")
    monkeypatch.setenv("TOLARIA_TRAINING__ACCUMULATE", "4")
    training = load_settings(None, ["training.accumulate=5"]).training
    assert (training.epochs, training.seed, training.accumulate) == (3, 4, 5)


def test_named_file_is_read_instead_of_the_default_one(tmp_path: Path) -> None:
    """--config names the only file that is read."""
    (tmp_path / "tolaria.toml").write_text("[training]\nepochs = 3\n")
    other = tmp_path / "other.toml"
    other.write_text("[training]\nseed = 9\n")
    training = load_settings(other).training
    assert (training.epochs, training.seed) == (20, 9)


def test_options_of_the_job_come_through_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """training.options is a table: JSON in the environment, dotted names on the command line."""
    (tmp_path / "tolaria.toml").write_text("[training.options]\nwidth = 8\n")
    monkeypatch.setenv("TOLARIA_TRAINING__OPTIONS", '{"dropout": 0.5}')
    options = load_settings(None, ["training.options.batch_size=64"]).training.options
    assert options == {"width": 8, "dropout": 0.5, "batch_size": 64}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainin.epochs=1", ["trainin", "unknown section", "did you mean training"]),
        ("training.epocs=1", ["training.epocs", "unknown field", "did you mean epochs"]),
        ("training.epochs=0", ["training.epochs", "greater than or equal to 1", "'0'", "--set"]),
        ("training.epochs=x", ["training.epochs", "integer"]),
        ("tamiyo.timeout_s=nan", ["tamiyo.timeout_s", "finite"]),
        ("tamiyo.timeouts_s.EvaluateStp=1", ["tamiyo.timeouts_s", "'EvaluateStp'", "did you mean EvaluateStep"]),
        ("tamiyo.timeouts_s.ApplyCommand=1", ["tamiyo.timeouts_s", "known are EvaluateEpoch, EvaluateStep"]),
        ("kasmina.timeouts_s.PrepareRollback=1", ["kasmina.timeouts_s", "no method with a deadline of its own"]),
        ("kasmina.timeouts_s.ApplyCommand=3", ["kasmina.timeouts_s", "gives ApplyCommand 3.0 s", "timeout_s (2.0)"]),
        ("kasmina.timeouts_s.ApplyCommand=0", ["kasmina.timeouts_s.ApplyCommand", "greater than 0"]),
        ("tamiyo.retries=-1", ["tamiyo.retries", "greater than or equal to 0"]),
        ("tamiyo.in_flight_max=0", ["tamiyo.in_flight_max", "greater than or equal to 1"]),
        ("tamiyo.target=nowhere", ["tamiyo.target", "'nowhere' is not host:port"]),
        ("tamiyo.target=host:0", ["tamiyo.target", "port 0"]),
        ("server.listen=127.0.0.1:70000", ["server.listen", "port from 0 to 65535"]),
        ("training.device=tpu", ["training.device"]),
        ("training.options=3", ["training.options", "dictionary"]),
        ("training=3", ["section.field=value"]),
        ("nonsense", ["section.field=value"]),
    ],
)
def test_a_mistake_is_named_with_its_setting(override: str, words: list[str]) -> None:
    """Every kind of mistake gives one line that names the setting and what is wrong."""
    (problem,) = problems([override])
    for word in words:
        assert word in problem


def test_all_mistakes_are_told_at_once() -> None:
    """A start with several mistakes needs one correction, not one start for each."""
    assert len(problems(["server.listen=x", "training.epochs=0", "kasmina.timeout_s=-1"])) == 3
    assert len(problems(["training.epocs=1", "training.epochs=x", "nonsense"])) == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TOLARIA_TRAINING__EPOCS", "3", ["training.epocs", "unknown field"]),
        ("TOLARIA_TRAINNG__EPOCHS", "3", ["trainng", "unknown section"]),
        ("TOLARIA_EPOCHS", "3", ["TOLARIA_EPOCHS", "TOLARIA_<SECTION>__<FIELD>"]),
        ("TOLARIA_TRAINING__OPTIONS", "{x", ["training.options", "not JSON", "TOLARIA_TRAINING__OPTIONS"]),
        ("TOLARIA_TRAINING__EPOCHS", "-1", ["training.epochs", "environment TOLARIA_TRAINING__EPOCHS"]),
    ],
)
def test_environment_mistakes_are_named(
    name: str, value: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TOLARIA_ variable is ever ignored."""
    monkeypatch.setenv(name, value)
    (problem,) = problems()
    for word in words:
        assert word in problem


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    """The file's name stands in the message, whatever is wrong with it."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[training\n")
    assert "broken.toml" in problems(config_file=broken)[0]
    assert "missing.toml" in problems(config_file=tmp_path / "missing.toml")[0]
    broken.write_text("training = 3\n")
    assert "is a section" in problems(config_file=broken)[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["server.listen=127.0.0.1:9464"], "server.listen and metrics.listen"),
        (["control.tamiyo_budget_ms=20"], "control.tamiyo_budget_ms"),
        (["leyline.previous_secret=old"], "leyline.secret"),
        (["kasmina.drain_s=10"], "kasmina.drain_s must be less than service.drain_timeout_s"),
        (["leyline.nonce_window_s=10"], "leyline.nonce_window_s"),
        (["leyline.nonce_window_s=119"], "twice leyline.freshness_s, which counts both ways"),
        (["leyline.freshness_s=151"], "twice leyline.freshness_s, which counts both ways"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], words: str) -> None:
    """Values that are fine alone and impossible together stop the start."""
    (problem,) = problems(overrides)
    assert words in problem


def test_shown_settings_read_back_and_hide_secrets(tmp_path: Path) -> None:
    """`config show` is a file that `--config` takes; of a secret it says that it is set, and never sets another."""
    settings = load_settings(
        None,
        [
            "leyline.secret=hush-hush",
            "leyline.previous_secret=hush-before",
            'training.options={"a": [1, "b"]}',
            "training.epochs=7",
        ],
    )
    text = as_toml(settings)
    assert "hush" not in text
    assert "\n# secret is set, not shown\n" in text
    assert "\n# previous_secret is set, not shown\n" in text
    assert tomllib.loads(text)["training"]["options"] == {"a": [1, "b"]}
    shown = tmp_path / "shown.toml"
    shown.write_text(text)
    again = load_settings(shown)
    assert again.training == settings.training
    assert again.leyline == Settings().leyline
    assert '\nsecret = ""\n' in as_toml(again)


@pytest.mark.parametrize("field", ["secret", "previous_secret"])
def test_asterisks_are_no_secret(field: str) -> None:
    """A masked secret that somebody has copied from elsewhere does not become the key."""
    (problem,) = problems([f"leyline.{field}=**********"])
    assert problem == (
        f"leyline.{field}: is nothing but asterisks, which stand for a secret elsewhere and are none (--set)"
    )


def test_a_bad_secret_is_not_printed(tmp_path: Path) -> None:
    """A message about a secret of the wrong type does not hold it."""
    file = tmp_path / "x.toml"
    file.write_text("[leyline]\nsecret = 12345\n")
    (problem,) = problems(config_file=file)
    assert "leyline.secret" in problem
    assert "12345" not in problem


def test_every_field_is_documented() -> None:
    """Each setting says what it means and why its default is what it is."""
    for section in Settings.model_fields.values():
        assert section.annotation is not None
        assert section.annotation.__doc__
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_children_inherit_secrets_but_no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that Tolaria starts gets the shared secrets and is not confused by Tolaria's own settings."""
    monkeypatch.setenv("TOLARIA_TRAINING__EPOCHS", "3")
    monkeypatch.setenv("PATH", "/bin")
    environment = child_environment(load_settings(None, ["leyline.secret=a"]))
    assert environment["TOLARIA_LEYLINE__SECRET"] == "a"
    assert environment["PATH"] == "/bin"
    assert "TOLARIA_TRAINING__EPOCHS" not in environment


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:80", "tamiyo:50052", "0.0.0.0:0"])
def test_addresses_read_and_print_alike(text: str) -> None:
    """An address survives being read and printed."""
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        ":80",
        "999.1.1.1:3",
        "-:1",
        "h\u00e9llo:5",
        "[::zz]:1",
        "host",
        "host:",
        "host:-1",
        "::1:80",
        "a b:80",
        "http://x:80",
        "x:\uff18\uff10",
    ],
)
def test_addresses_that_are_none_are_refused(text: str) -> None:
    """Whatever is not host:port raises with the text in the message."""
    with pytest.raises(ValueError, match=r"host:port|no port"):
        Address.parse(text)


def test_every_setting_is_read_by_something() -> None:
    """A setting that nothing reads would be a promise nobody keeps."""
    root = Path(__file__).parents[3] / "service" / "tolaria"
    sources = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "tree.py")
    fields = [
        name
        for section in Settings.model_fields.values()
        for name in section.annotation.model_fields  # type: ignore[union-attr]
    ]
    assert [name for name in fields if f".{name}" not in sources] == []


def test_a_sentinel_that_would_cut_a_drain_short_is_refused() -> None:
    """SIGKILL must come later than the longest sound drain."""
    (problem,) = problems(["service.drain_timeout_s=20"])
    assert "emergency.drain_s" in problem
