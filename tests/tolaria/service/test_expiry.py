"""What operators learn about certificates that expire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from support.security import Pki, key_of
from tolaria.config import Settings
from tolaria.security.certificates import Validity, now_utc
from tolaria.service import expiry
from tolaria.service.expiry import CertificateExpiry, UsedCertificate
from tolaria.service.protection import Protection, protected
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


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


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    with anyio.fail_after(180):
        while not condition():
            await anyio.sleep(0.005)


def lasting(days: float, *, until_days: float) -> UsedCertificate:
    """Returns a certificate that lasts for some days, until some days from now."""
    ends = now_utc() + timedelta(days=until_days)
    return UsedCertificate("tls.pem", Validity(ends - timedelta(days=days), ends))


async def test_a_renewed_certificate_ends_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has it once, the metric until it is renewed; of one that is not used any more there is none."""
    used, metrics = {"server.tls_cert": lasting(90, until_days=-1)}, Metrics()
    async with looking(CertificateExpiry(lambda: used, metrics), monkeypatch) as logs:
        await until(lambda: values(metrics, "certificate_renewal_due") == {"server.tls_cert": 1.0})
        renewed = used["server.tls_cert"] = lasting(90, until_days=90)
        await until(lambda: values(metrics, "certificate_renewal_due") == {"server.tls_cert": 0.0})
        ends_s = renewed.validity.ends.timestamp()
        assert values(metrics, "certificate_expires_timestamp_seconds") == {"server.tls_cert": ends_s}
        used.clear()
        await until(lambda: not values(metrics, "certificate_renewal_due"))
        assert not values(metrics, "certificate_expires_timestamp_seconds")
    (line,) = logs
    assert line["event"] == "certificate_expires"
    assert "server.tls_cert: tls.pem expired on" in line["detail"]


async def test_a_warning_is_repeated_twice_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is found in the log of the last day."""
    monkeypatch.setattr(expiry, "_REPEAT_S", 0.1)
    looks = CertificateExpiry(lambda: {"server.tls_cert": lasting(90, until_days=3)}, Metrics())
    async with looking(looks, monkeypatch) as logs:
        await until(lambda: len(logs) == 2)
    assert len({line["detail"].partition(" on ")[0] for line in logs}) == 1


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A folder with certificates of a server and of a client."""
    made = Pki(tmp_path / "pki")
    made.server()
    made.client("client")
    return made


@pytest.fixture
def protection(pki: Pki) -> tuple[Protection, Metrics]:
    """What protects a service that uses certificates everywhere, and its metrics."""
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
    return protected(settings, metrics), metrics


async def test_all_certificates_of_a_service_are_looked_at(
    pki: Pki, protection: tuple[Protection, Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of both servers, and those with which peers are called, which are used until the end once they are read."""
    found, metrics = protection
    expected = {"server.tls_cert", "metrics.web_config", "tamiyo.tls_cert", "kasmina.tls_cert"}
    async with looking(found.expiry, monkeypatch):
        await until(lambda: values(metrics, "certificate_renewal_due").keys() == expected)
        before = values(metrics, "certificate_expires_timestamp_seconds")
        await anyio.to_thread.run_sync(renew, pki)
        for watched in (found.tls, found.web):
            assert watched is not None
            await anyio.to_thread.run_sync(watched.refresh)
        await until(lambda: len(later(metrics, before)) > 1)
        assert later(metrics, before) == {"server.tls_cert", "metrics.web_config"}


def later(metrics: Metrics, before: Mapping[str, float]) -> set[str]:
    """The settings whose certificates expire later than they did before."""
    after = values(metrics, "certificate_expires_timestamp_seconds")
    return {name for name, at_s in after.items() if at_s > before[name]}


def renew(pki: Pki) -> None:
    """Puts certificates that last longer in the place of all."""
    for stem in ("server", "client"):
        pki.issuer.issue(pki.folder, stem, hosts=("localhost",) if stem == "server" else (), days=60, now=now_utc())
