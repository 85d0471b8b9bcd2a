"""The reference peers over TLS, called as the service calls its peers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from leyline.v1.state_pb2 import SystemStatePacket
from support.events import RecordingEmitter
from support.security import Pki, key_of
from tolaria.config import KasminaSettings, LeylineSettings, TamiyoSettings
from tolaria.errors import CredentialsError, PeerError, PeerUnavailableError
from tolaria.peers.connect import connected_peers
from tolaria.reference.server import peer_server
from tolaria.resilience.breaker import Breaker
from tolaria.security.certificates import Identity
from tolaria.security.watched import WatchedFiles
from tolaria.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


async def outcome(served: WatchedFiles[Identity] | None, **settings: Any) -> str:
    """Asks both peers, which serve with these files and are called with these settings; returns the outcomes."""
    breakers = {name: Breaker(name, clock=time.monotonic, policy=None) for name in ("tamiyo", "kasmina")}
    async with (
        peer_server("tamiyo", "127.0.0.1:0", LeylineSettings(), tls=served) as tamiyo,
        peer_server("kasmina", "127.0.0.1:0", LeylineSettings(), tls=served) as kasmina,
        connected_peers(
            TamiyoSettings(target=str(tamiyo.address), **settings),
            KasminaSettings(target=str(kasmina.address), **settings),
            breakers=breakers,
            metrics=Metrics(),
            emitter=RecordingEmitter(),
        ) as peers,
    ):
        state = SystemStatePacket(version=1, training_run_id="run", packet_id="p")
        found = []
        for call in (peers.tamiyo.evaluate_epoch, peers.kasmina.export_seeds):
            try:
                await call(state)
                found.append("ok")
            except PeerUnavailableError:
                found.append("unavailable")
            except PeerError as error:
                found.append(type(error).__name__)
        first, second = found
        return first if first == second else f"{first}, {second}"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A CA with a certificate for the peers."""
    return Pki(tmp_path / "own")


async def test_peers_are_called_over_tls(pki: Pki) -> None:
    """With the CA of their certificate; not without TLS, and no TLS is expected where none is served."""
    served = await to_thread.run_sync(pki.watched)
    assert await outcome(served, tls_ca=str(pki.ca)) == "ok"
    assert await outcome(served) == "unavailable"
    assert await outcome(None, tls_ca=str(pki.ca)) == "unavailable"


async def test_a_foreign_certificate_is_not_accepted(pki: Pki, tmp_path: Path) -> None:
    """Of another CA, or with another name unless it is set."""
    foreign = await to_thread.run_sync(Pki, tmp_path / "foreign")
    served = await to_thread.run_sync(pki.watched)
    assert await outcome(served, tls_ca=str(foreign.ca)) == "unavailable"
    assert await outcome(served, tls_ca=str(pki.ca), tls_name="tamiyo") == "unavailable"
    assert await outcome(served, tls_ca=str(pki.ca), tls_name="localhost") == "ok"


async def test_peers_may_require_a_certificate(pki: Pki, tmp_path: Path) -> None:
    """Mutual TLS: Tolaria presents the one of its settings."""
    foreign = await to_thread.run_sync(Pki, tmp_path / "foreign")
    served = await to_thread.run_sync(lambda: pki.watched(clients=True))
    own = await to_thread.run_sync(pki.client, "tolaria")
    other = await to_thread.run_sync(foreign.client, "tolaria")
    assert await outcome(served, tls_ca=str(pki.ca)) == "unavailable"
    good = {"tls_ca": str(pki.ca), "tls_cert": str(own), "tls_key": key_of(own)}
    assert await outcome(served, **good) == "ok"
    assert await outcome(served, **good | {"tls_cert": str(other), "tls_key": key_of(other)}) == "unavailable"


async def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """The setting begins with the peer."""
    await anyio.Path(tmp_path / "ca").write_text("none")
    with pytest.raises(CredentialsError, match=r"tamiyo\.tls_ca: .*: it holds no certificates"):
        await outcome(None, tls_ca=str(tmp_path / "ca"))
