"""What operators learn about certificates that expire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from support.security import Pki, key_of
from tolaria.config import Settings
from tolaria.security.certificates import TlsFiles, now_utc
from tolaria.service import expiry
from tolaria.service.expiry import CertificateExpiry
from tolaria.service.protection import protected
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A folder with certificates: of a server, of a client, and of one that has expired."""
    made = Pki(tmp_path / "pki")
    made.server()
    made.client("client")
    made.client("expired", expired=True)
    return made


@asynccontextmanager
async def looking(looks: CertificateExpiry, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Any]]:
    """Looks again and again at short intervals; yields the log."""
    monkeypatch.setattr(expiry, "_LOOK_S", 0.01)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(looks.keep_current)
            yield logs
            tasks.cancel_scope.cancel()


def values(metrics: Metrics, name: str) -> dict[str, float]:
    """Returns a metric by setting."""
    samples = [each for family in metrics.registry.collect() for each in family.samples]
    return {each.labels["setting"]: each.value for each in samples if each.name == f"tolaria.server.{name}"}


async def until(logs: list[Any], event: str) -> None:
    """Waits until an event is in the log."""
    with anyio.fail_after(60):
        while not any(line["event"] == event for line in logs):
            await anyio.sleep(0.005)


def watched(files: Mapping[str, TlsFiles], metrics: Metrics) -> CertificateExpiry:
    """Looks at these files, which may be changed."""
    return CertificateExpiry(lambda: files, metrics)


@pytest.mark.parametrize("content", [None, "half of a certi"])
async def test_a_certificate_that_cannot_be_read_is_logged_and_ends_nothing(
    pki: Pki, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in force stays, and further looks follow, which do not repeat the line."""
    path, metrics = anyio.Path(pki.folder, "mounted.pem"), Metrics()
    if content is not None:
        await path.write_text(content)
    files = {"server.tls_cert": TlsFiles("server", str(path), str(path))}
    async with looking(watched(files, metrics), monkeypatch) as logs:
        await until(logs, "certificate_expiry_unknown")
        await path.write_bytes(await anyio.Path(pki.folder, "server.pem").read_bytes())
        with anyio.fail_after(60):
            while not values(metrics, "certificate_expires_timestamp_seconds"):
                await anyio.sleep(0.005)
    assert [line["event"] for line in logs] == ["certificate_expiry_unknown"]
    assert "server.tls_cert" in logs[0]["detail"]


async def test_a_renewed_certificate_ends_the_warning(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says it once, the metric until it is renewed; of one that is not used any more there is none."""
    expired, metrics = anyio.Path(pki.folder, "expired.pem"), Metrics()
    files = {"kasmina.tls_cert": TlsFiles("kasmina", str(expired), key_of(Path(expired)))}
    async with looking(watched(files, metrics), monkeypatch) as logs:
        await until(logs, "certificate_expires")
        assert values(metrics, "certificate_renewal_due") == {"kasmina.tls_cert": 1.0}
        await anyio.Path(pki.folder, "client.pem").rename(expired)
        with anyio.fail_after(60):
            while values(metrics, "certificate_renewal_due") != {"kasmina.tls_cert": 0.0}:
                await anyio.sleep(0.005)
        ends_s = values(metrics, "certificate_expires_timestamp_seconds")["kasmina.tls_cert"]
        assert abs(ends_s - (now_utc() + timedelta(days=30)).timestamp()) < 3600
        files.clear()
        with anyio.fail_after(60):
            while values(metrics, "certificate_renewal_due"):
                await anyio.sleep(0.005)
    assert len(logs) == 1
    assert "the other side refuses it" in logs[0]["detail"]


@pytest.fixture
def protection(pki: Pki) -> tuple[CertificateExpiry, Metrics]:
    """What a service looks at that uses certificates everywhere, and its metrics."""
    server, client, web = pki.folder / "server.pem", pki.folder / "client.pem", pki.folder / "web.yml"
    web.write_text(f"tls_server_config: {{cert_file: {server.name}, key_file: {Path(key_of(server)).name}}}")
    identity = {"tls_cert": str(client), "tls_key": key_of(client), "tls_ca": str(pki.ca)}
    settings = Settings.model_validate(
        {
            "server": {"tls_cert": str(server), "tls_key": key_of(server)},
            "metrics": {"web_config": str(web)},
            "tamiyo": identity | {"target": "tamiyo:50051"},
            "kasmina": identity | {"target": "kasmina:50052"},
        }
    )
    metrics = Metrics()
    return protected(settings, metrics).expiry, metrics


async def test_all_certificates_of_a_service_are_looked_at(
    protection: tuple[CertificateExpiry, Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both servers, and those with which peers are called."""
    looks, metrics = protection
    expected = {"server.tls_cert", "metrics.web_config", "tamiyo.tls_cert", "kasmina.tls_cert"}
    async with looking(looks, monkeypatch):
        with anyio.fail_after(60):
            while values(metrics, "certificate_renewal_due").keys() != expected:
                await anyio.sleep(0.005)
