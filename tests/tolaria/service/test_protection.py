from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest

from support.security import Pki, key_of
from tolaria.config import Settings
from tolaria.security.tokens import Role, as_table
from tolaria.service.protection import protected
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


def test_metrics_say_which_files_are_not_in_use_in_their_newest_version(tmp_path: Path) -> None:
    """0 from a version that cannot be used until one that can; a setting without files has no series."""
    cert, tokens, web = Pki(tmp_path).server(), tmp_path / "tokens.toml", tmp_path / "web.yml"
    tokens.write_text(as_table("olga", Role.OPERATOR, "olga", None))
    web.write_text("{}")
    files = {"server.tls_cert": cert, "server.tokens": tokens, "metrics.web_config": web}
    server = {"tls_cert": str(cert), "tls_key": key_of(cert), "tokens": str(tokens)}
    settings = Settings.model_validate({"server": server, "metrics": {"web_config": str(web)}})
    metrics, bare = Metrics(), Metrics()
    protection = protected(settings, metrics)
    protected(Settings(), bare)

    def current() -> dict[str, float | None]:
        name = "tolaria.server.credentials_current"
        return {setting: metrics.registry.get_sample_value(name, {"setting": setting}) for setting in files}

    assert current() == dict.fromkeys(files, 1.0)
    assert b"credentials_current{" not in generate_latest(bare.registry)
    watched = {
        "server.tls_cert": protection.tls,
        "server.tokens": protection.tokens,
        "metrics.web_config": protection.web,
    }
    for setting, path in files.items():
        sound, part = path.read_bytes(), watched[setting]
        assert part is not None
        path.write_bytes(b"half of a [")
        part.refresh()
        assert current() == dict.fromkeys(files, 1.0) | {setting: 0.0}
        path.write_bytes(sound)
        part.refresh()
        assert current() == dict.fromkeys(files, 1.0)
