from __future__ import annotations

from pathlib import Path

import pytest

from leyline.v1 import kasmina_service_pb2, tamiyo_service_pb2
from tolaria.config import KasminaSettings, PeerSettings, TamiyoSettings, as_toml, load_settings


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "service"),
    [
        (TamiyoSettings, tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]),
        (KasminaSettings, kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]),
    ],
)
def test_the_methods_are_those_of_the_contract(kind: type[PeerSettings], service: object) -> None:
    """Whatever a peer's own service can be asked may have a deadline."""
    assert set(kind.methods) == {method.name for method in service.methods}  # type: ignore[attr-defined]


def test_a_method_without_its_own_deadline_has_the_common_one() -> None:
    """timeout_s is the default of all."""
    tamiyo = TamiyoSettings(timeout_s=3.0, timeouts_s={"EvaluateStep": 0.5})
    assert (tamiyo.timeout_of("EvaluateEpoch"), tamiyo.timeout_of("EvaluateStep")) == (3.0, 0.5)


def test_deadlines_of_methods_come_through_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in the file, JSON in the environment, a dotted name on the command line; and shown as it is read."""
    (tmp_path / "tolaria.toml").write_text("[tamiyo.timeouts_s]\nEvaluateEpoch = 1.5\n")
    monkeypatch.setenv("TOLARIA_KASMINA__TIMEOUTS_S", '{"ApplyCommand": 0.25}')
    settings = load_settings(None, ["tamiyo.timeouts_s.EvaluateStep=0.5"])
    assert settings.tamiyo.timeouts_s == {"EvaluateEpoch": 1.5, "EvaluateStep": 0.5}
    assert settings.kasmina.timeouts_s == {"ApplyCommand": 0.25}
    monkeypatch.delenv("TOLARIA_KASMINA__TIMEOUTS_S")
    (tmp_path / "shown.toml").write_text(as_toml(settings))
    again = load_settings(tmp_path / "shown.toml")
    assert (again.tamiyo, again.kasmina) == (settings.tamiyo, settings.kasmina)


def test_no_drain_at_all_can_be_wanted() -> None:
    """Zero cuts calls in flight at once."""
    assert load_settings(None, ["tamiyo.drain_s=0"]).tamiyo.drain_s == 0
