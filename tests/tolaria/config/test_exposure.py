from __future__ import annotations

from typing import Any

import pytest

from tolaria.config import Settings, exposure_warnings, require_protection
from tolaria.errors import ConfigurationError, ExposedError

TLS = {"tls_cert": "c", "tls_key": "k"}
TOKENS = {"tokens": "t"}
OPEN = "0.0.0.0:1"


def settings(listen: str, metrics: str = "127.0.0.1:2", web_config: str = "", **server: Any) -> Settings:
    """Settings with these addresses, and these of the server."""
    found = {"server": {"listen": listen, **server}, "metrics": {"listen": metrics, "web_config": web_config}}
    return Settings.model_validate(found)


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_nothing(listen: str) -> None:
    """And is no reason to warn."""
    require_protection(settings(listen))
    assert exposure_warnings(settings(listen)) == []


@pytest.mark.parametrize("listen", [OPEN, "[::]:1", "192.0.2.1:1", "gpu1:1", "127.0.0.1.example:1"])
@pytest.mark.parametrize(
    ("server", "missing", "needed"),
    [
        ({}, "without TLS and tokens", "set server.tls_cert, server.tls_key and server.tokens"),
        (TLS, "without tokens", "set server.tokens"),
        (TOKENS, "without TLS", "set server.tls_cert, server.tls_key"),
    ],
)
def test_other_addresses_are_refused_without_both(
    listen: str, server: dict[str, Any], missing: str, needed: str
) -> None:
    """One line that says what to set; a mistake in the settings."""
    with pytest.raises(ExposedError) as caught:
        require_protection(settings(listen, **server))
    text = str(caught.value)
    assert isinstance(caught.value, ConfigurationError)
    assert "\n" not in text
    assert text.startswith(f"server.listen is {listen}, which other machines can reach, {missing}: {needed} (`tolaria")
    assert "server.insecure = true" in text


def test_with_both_they_are_served_without_a_warning() -> None:
    """TLS and tokens."""
    found = settings(OPEN, **TLS, **TOKENS)
    require_protection(found)
    assert exposure_warnings(found) == []


def test_the_risk_can_be_accepted() -> None:
    """With a warning; not if nothing is missing."""
    found = settings(OPEN, insecure=True, **TLS)
    require_protection(found)
    (warning,) = exposure_warnings(found)
    assert "0.0.0.0:1 without tokens" in warning
    assert exposure_warnings(settings(OPEN, insecure=True, **TLS, **TOKENS)) == []


def test_open_metrics_are_served_with_a_warning() -> None:
    """Unless a web config protects them."""
    (warning,) = exposure_warnings(settings("127.0.0.1:1", "0.0.0.0:2"))
    assert "0.0.0.0:2" in warning
    assert "metrics.web_config" in warning
    assert exposure_warnings(settings("127.0.0.1:1", "0.0.0.0:2", web_config="w")) == []


def test_an_open_rendezvous_is_served_with_a_warning() -> None:
    """If machines can join at all."""
    lane = {"mode": "torchrun", "nodes": 2, "rendezvous": "0.0.0.0:3", "secret_file": "s"}
    (warning,) = exposure_warnings(Settings.model_validate({"lane": lane}))
    assert warning.startswith("lane.rendezvous: other machines can reach 0.0.0.0:3")
    for change in ({"rendezvous": "127.0.0.1:3"}, {"nodes": 1}):
        assert exposure_warnings(Settings.model_validate({"lane": lane | change})) == []
