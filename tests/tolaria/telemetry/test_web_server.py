"""The metrics server behind a web config file, over real connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import bcrypt
import pytest
from anyio import to_thread

from support.security import Pki, key_of
from tolaria.errors import CredentialsError
from tolaria.security.watched import WatchedFiles
from tolaria.security.web_config import WebConfig
from tolaria.telemetry import web_server
from tolaria.telemetry.exporter import Readiness, exporter
from tolaria.telemetry.metrics import Metrics
from tolaria.telemetry.web_server import WebGuard

pytestmark = pytest.mark.anyio
DIGEST = bcrypt.hashpw(b"correct horse", bcrypt.gensalt(4)).decode()
USERS = f"basic_auth_users:\n  prom: {DIGEST}\n"


class Site:
    """A metrics server under test."""

    def __init__(self, address: str, metrics: Metrics) -> None:
        self.address = address
        self.metrics = metrics

    async def get(
        self, path: str, *, auth: tuple[str, str] | None = None, context: ssl.SSLContext | None = None
    ) -> tuple[int, str]:
        """Requests a path on a new connection; returns status and body."""
        url = f"{'https' if context else 'http'}://{self.address}{path}"
        headers = {"Authorization": aiohttp.encode_basic_auth(*auth)} if auth else {}
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, headers=headers, ssl=context or True) as response,
        ):
            return response.status, await response.text()

    def counted(self, caller: str, code: int) -> float:
        """How many requests have been counted."""
        labels = {"caller": caller, "code": str(code)}
        return self.metrics.registry.get_sample_value("tolaria.metrics.requests_total", labels) or 0.0


@asynccontextmanager
async def served(config: WatchedFiles[WebConfig] | None = None, connections_max: int = 64) -> AsyncIterator[Site]:
    """Serves the metrics of a service that is not ready."""
    metrics = Metrics()
    with socket.create_server(("127.0.0.1", 0)) as bound:
        host, port = bound.getsockname()
        guard = WebGuard(config, metrics, connections_max)
        async with exporter([bound], metrics, lambda: Readiness(["the secret reason"], ["detail"]), guard):
            yield Site(f"{host}:{port}", metrics)


def watched(path: Path, text: str) -> WatchedFiles[WebConfig]:
    """A web config with this content."""
    path.write_text(text)
    return WatchedFiles("web", lambda: WebConfig.read(str(path)))


@pytest.fixture
def passwords(tmp_path: Path) -> WatchedFiles[WebConfig]:
    """A web config with one user."""
    return watched(tmp_path / "web.yml", USERS)


@pytest.mark.parametrize(
    ("auth", "status", "caller"),
    [
        (("prom", "correct horse"), 200, "prom"),
        (("prom", "wrong"), 401, "unknown"),
        (("other", "correct horse"), 401, "unknown"),
        (("prom", "x" * 100), 401, "unknown"),
        (("prom", ""), 401, "unknown"),
        (None, 401, "unknown"),
    ],
)
async def test_metrics_need_a_password(
    auth: tuple[str, str] | None, status: int, caller: str, passwords: WatchedFiles[WebConfig]
) -> None:
    """Twice alike: results are remembered. Counted by the name of a known user only."""
    async with served(passwords) as site:
        for _ in range(2):
            assert (await site.get("/metrics", auth=auth))[0] == status
        assert site.counted(caller, status) == 2


async def test_guesses_push_no_known_password_out(
    passwords: WatchedFiles[WebConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scraper would otherwise wait for bcrypt, behind them, each time."""
    compared: list[bytes] = []
    fits = vars(web_server)["_fits"]

    def counted(password: bytes, digest: bytes) -> bool:
        compared.append(password)
        return bool(fits(password, digest))

    monkeypatch.setattr(web_server, "_fits", counted)
    monkeypatch.setattr(web_server, "_CACHED_MAX", 3)
    async with served(passwords) as site:
        assert (await site.get("/metrics", auth=("prom", "correct horse")))[0] == 200
        for guess in range(5):
            assert (await site.get("/metrics", auth=("prom", f"guess {guess}")))[0] == 401
        assert (await site.get("/metrics", auth=("prom", "correct horse")))[0] == 200
    assert compared.count(b"correct horse") == 1
    assert len(compared) == 6


async def test_probes_need_no_password_and_learn_no_reason(passwords: WatchedFiles[WebConfig]) -> None:
    """A kubelet has none. With the password, and without a web config, the reasons are there."""
    async with served(passwords) as site:
        assert (await site.get("/livez"))[0] == (await site.get("/healthz"))[0] == 200
        assert await site.get("/readyz") == (503, '{"ready": false}')
        assert "secret reason" in (await site.get("/readyz", auth=("prom", "correct horse")))[1]
        assert (await site.get("/nothing"))[0] == 401
        assert (await site.get("/nothing", auth=("prom", "correct horse")))[0] == 404
    async with served() as site:
        assert "secret reason" in (await site.get("/readyz"))[1]


async def test_a_changed_password_holds_at_once(tmp_path: Path, passwords: WatchedFiles[WebConfig]) -> None:
    """What has been remembered of the old one does not count."""
    async with served(passwords) as site:
        assert (await site.get("/metrics", auth=("prom", "correct horse")))[0] == 200
        other = bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()
        await anyio.Path(tmp_path / "web.yml").write_text(f"basic_auth_users:\n  prom: {other}\n")
        assert await to_thread.run_sync(passwords.refresh)
        assert (await site.get("/metrics", auth=("prom", "correct horse")))[0] == 401
        assert (await site.get("/metrics", auth=("prom", "new")))[0] == 200


async def test_guessing_passwords_does_not_pile_up(
    passwords: WatchedFiles[WebConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is compared at a time; beyond a few that wait, guesses are refused without being compared."""
    monkeypatch.setattr(web_server, "_CHECKS_MAX", 2)
    async with served(passwords) as site, anyio.create_task_group() as tasks:
        found: list[int] = []

        async def guess(number: int) -> None:
            found.append((await site.get("/metrics", auth=("prom", str(number))))[0])

        for number in range(30):
            tasks.start_soon(guess, number)
        while len(found) < 30:
            await anyio.sleep(0.01)
        assert set(found) == {401, 429}
        assert (await site.get("/metrics", auth=("prom", "correct horse")))[0] == 200


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Pki, WatchedFiles[WebConfig]]:
    """A web config with TLS, whose certificates are beside it, and a header."""
    pki = Pki(tmp_path)
    pki.server()
    text = """
tls_server_config: {cert_file: server.pem, key_file: server.key, min_version: TLS13}
http_server_config: {http2: true, headers: {X-Frame-Options: deny}}
"""
    return pki, watched(tmp_path / "web.yml", text)


async def test_tls_is_served_with_the_newest_certificate(tls: tuple[Pki, WatchedFiles[WebConfig]]) -> None:
    """Plain HTTP is not answered; a renewed certificate is shown to new connections."""
    pki, config = tls
    context = ssl.create_default_context(cadata=pki.ca.read_text())
    async with served(config) as site:
        assert (await site.get("/metrics", context=context))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await site.get("/metrics")
        await to_thread.run_sync(pki.server, "gpu2")
        assert await to_thread.run_sync(config.refresh)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await site.get("/metrics", context=context)


@pytest.fixture
def mutual(tmp_path: Path) -> tuple[WatchedFiles[WebConfig], dict[str, ssl.SSLContext]]:
    """A web config that requires certificates of clients, and clients with a good, a foreign and no certificate."""
    pki, foreign = Pki(tmp_path), Pki(tmp_path / "foreign")
    pki.server()
    certificates = {"good": pki.client("prom"), "foreign": foreign.client("prom"), "none": None}
    contexts = {name: ssl.create_default_context(cafile=str(pki.ca)) for name in certificates}
    for name, certificate in certificates.items():
        if certificate is not None:
            contexts[name].load_cert_chain(certificate, key_of(certificate))
    text = """
tls_server_config:
  cert_file: server.pem
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.pem
"""
    return watched(tmp_path / "web.yml", text), contexts


async def test_clients_need_a_certificate_if_it_is_required(
    mutual: tuple[WatchedFiles[WebConfig], dict[str, ssl.SSLContext]],
) -> None:
    """As RequireAndVerifyClientCert says; a foreign one is none."""
    config, contexts = mutual
    async with served(config) as site:
        assert (await site.get("/metrics", context=contexts["good"]))[0] == 200
        for name in ("foreign", "none"):
            with pytest.raises((aiohttp.ClientError, OSError)):
                await site.get("/metrics", context=contexts[name])


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
async def test_half_open_requests_are_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says nothing, or half a request."""
    monkeypatch.setattr(web_server, "SILENT_S", 0.2)
    async with served() as site:
        host, port = site.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()


async def send_forever(client: socket.socket, request: bytes) -> None:
    """Sends the request again and again, at most for a minute."""
    async with asyncio.timeout(60):
        while True:
            await asyncio.get_running_loop().sock_sendall(client, request)


async def test_a_slow_reader_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without reading fill the buffers; the connection ends, others are served."""
    monkeypatch.setattr(web_server, "SEND_S", 0.2)
    async with served() as site:
        host, port = site.address.split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(slow, (host, int(port)))
            request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200
            with pytest.raises(ConnectionError):
                await send_forever(slow, request)
        assert (await site.get("/livez"))[0] == 200


async def test_scraping_flat_out_leaves_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape right after another waits; probes and a scrape after the pause do not."""
    monkeypatch.setattr(web_server, "PAUSE", 1e6)
    monkeypatch.setattr(web_server, "PAUSE_S_MAX", 0.4)
    async with served() as site:
        assert (await site.get("/metrics"))[0] == 200
        started = anyio.current_time()
        assert (await site.get("/livez"))[0] == 200
        assert (await site.get("/metrics"))[0] == 200
        assert anyio.current_time() - started >= 0.25


async def test_connections_are_limited() -> None:
    """Those beyond the limit are closed at once; there is room again when one has ended."""
    async with served(connections_max=3) as site:
        host, port = site.address.split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        for _, other in (*held, (reader, writer)):
            other.close()
            await other.wait_closed()
        async with asyncio.timeout(30):
            while True:
                try:
                    assert (await site.get("/livez"))[0] == 200
                except aiohttp.ClientError:
                    continue
                break


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c", "is no YAML, line 1"),
        ("- x", "must be a mapping"),
        ("tls_config: {}", "not supported: tls_config; known are basic_auth_users"),
        ("rate_limit: {interval: 1s}", "not supported: rate_limit"),
        ("tls_server_config: {cert_file: a}", "cert_file and key_file must be set"),
        ("tls_server_config: {cipher_suites: [x]}", "tls_server_config: not supported: cipher_suites"),
        ("tls_server_config: {cert_file: a, key_file: 1}", "key_file: must be a path"),
        ("tls_server_config: {cert_file: a, key_file: b, min_version: TLS10}", "min_version: must be one of TLS12"),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequireAnyClientCert}",
            "client_auth_type: must be one of NoClientCert",
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequireAndVerifyClientCert}",
            "client_auth_type and client_ca_file must be set together",
        ),
        ("tls_server_config: {cert_file: a, key_file: b}", "No such file"),
        ("basic_auth_users: [a]", "must be a mapping"),
        ("basic_auth_users: {a: plain-password}", "basic_auth_users.a: is no bcrypt digest"),
        ("basic_auth_users: {'a:b': c}", "names without a colon"),
        ("http_server_config: {headers: {Server: x}}", "not allowed by the format: Server"),
    ],
)
def test_a_wrong_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """The message names the setting, the file and the key, and quotes no value."""
    path = tmp_path / "web.yml"
    path.write_text(text)
    with pytest.raises(CredentialsError) as caught:
        WebConfig.read(str(path))
    assert words in str(caught.value)
    assert str(caught.value).startswith("metrics.web_config")
    assert "plain-password" not in str(caught.value)


def test_an_empty_file_protects_nothing(tmp_path: Path) -> None:
    """As with Prometheus's exporters."""
    assert watched(tmp_path / "w", "").value == WebConfig()
