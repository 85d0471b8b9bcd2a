"""The status page over real connections."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.to_thread
import bcrypt
import pytest
from multidict import CIMultiDictProxy

from support.runs import FakePeers, RunUnderTest, new_run, running
from tolaria.errors import JournalUnavailableError
from tolaria.journal.rows import FaultRow
from tolaria.security.watched import WatchedFiles
from tolaria.security.web_config import WebConfig
from tolaria.status_page import site
from tolaria.status_page.site import FILES, POLICY, StatusPage
from tolaria.telemetry.exporter import Readiness, exporter
from tolaria.telemetry.web_server import WebGuard

pytestmark = pytest.mark.anyio
ASSETS = Path(site.__file__).parent / "assets"


class Served:
    """A page under test, and the run that it shows."""

    def __init__(self, url: str, run: RunUnderTest, page: StatusPage, closing: anyio.Event) -> None:
        self.url, self.run, self.page, self.closing = url, run, page, closing

    async def get(self, path: str, **headers: str) -> tuple[int, str, CIMultiDictProxy[str]]:
        """Status, body and headers of an answer."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}{path}", headers=headers) as answer:
            return answer.status, await answer.text(), answer.headers

    @asynccontextmanager
    async def viewer(self, last_event_id: str = "") -> AsyncIterator[Viewer]:
        """A viewer of the stream."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            session.get(f"{self.url}/page/events", headers=headers) as answer,
        ):
            yield Viewer(answer)

    def counted(self, name: str) -> float:
        """A metric of the page."""
        return self.run.sample(f"tolaria.page.{name}") or 0.0


class Viewer:
    """Reads events."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def event(self) -> tuple[str, str, dict[str, Any]]:
        """The next event: its kind, its id and its data."""
        found: dict[str, str] = {}
        async for line in self.answer.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                found[name] = value
            elif "data" in found:
                break
        return found["event"], found.get("id", ""), json.loads(found["data"])


@asynccontextmanager
async def served(
    config: WatchedFiles[WebConfig] | None = None, viewers_max: int = 8, run: RunUnderTest | None = None
) -> AsyncIterator[Served]:
    """Serves the page of a run that has not begun."""
    run = run or new_run(FakePeers(), run_name="<b>run</b>")
    closing = anyio.Event()
    made = partial(
        StatusPage, run.core.page, run.journal, run.metrics, closing=closing, viewers_max=lambda: viewers_max
    )
    page = await anyio.to_thread.run_sync(made)  # it reads files
    guard = WebGuard(config, run.metrics, 64)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        host, port = bound.getsockname()
        async with (
            exporter([bound], run.metrics, lambda: Readiness([], []), guard, page.routes()),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(page.follow_journal)
            yield Served(f"http://{host}:{port}", run, page, closing)
            closing.set()
            tasks.cancel_scope.cancel()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames and dropped viewers without much waiting."""
    monkeypatch.setattr(site, "INTERVAL_S", 0.02)
    monkeypatch.setattr("tolaria.status_page.frames.INTERVAL_S", 0.02)
    monkeypatch.setattr(site, "SLOW_S", 0.5)


async def test_each_file_is_served_with_a_strict_policy() -> None:
    """The page, styles, scripts, icon: from package data, of the right kind, and as unchanged the second time."""
    async with served() as under_test:
        for path, name in [("/", "index.html"), *((f"/page/{name}", name) for name in FILES)]:
            status, body, headers = await under_test.get(path)
            assert (status, body) == (200, (ASSETS / name).read_text()), path
            assert headers["Content-Type"] == f"{FILES[name]}; charset=utf-8"
            assert headers["Content-Security-Policy"] == POLICY
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert (await under_test.get(path, **{"If-None-Match": headers["ETag"]}))[0] == 304
        assert {path.name for path in ASSETS.iterdir()} == set(FILES)
        for path in ("/page/nothing", "/page/../site.py", "/page/..%2Fsite.py", "/page/", "/page/site.py"):
            assert (await under_test.get(path))[0] == 404
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")


class Markup(HTMLParser):
    """Collects what a policy forbids, or another machine would have to serve."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.found += [name for name in given if name.startswith("on") or name == "style"]
        self.found += ["inline script"] if tag == "script" and "src" not in given else []
        self.found += [tag] if tag in {"style", "iframe", "form"} else []
        self.found += [
            value for name, value in attrs if name in {"src", "href"} and value and (":" in value or value[0] == "/")
        ]


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    """No address of another machine in any file, none from the root, so that the page works below a proxy's path."""
    markup = Markup()
    markup.feed((ASSETS / "index.html").read_text())
    assert markup.found == []
    assert len(markup.ids) == len(set(markup.ids))
    for name in FILES:
        text = (ASSETS / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in "".join(line for line in text.splitlines() if not line.strip().startswith("//")), name
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text


async def test_a_viewer_gets_everything_and_then_changes(fast: None) -> None:
    """Names of people are data like any other. A viewer that comes back gets what it has missed."""
    async with served() as under_test:
        async with under_test.viewer() as viewer:
            assert viewer.answer.headers["Content-Type"] == "text/event-stream"
            assert viewer.answer.headers["Content-Security-Policy"] == POLICY
            kind, _, data = await viewer.event()
            assert (kind, data["run"]["name"], data["state"]["state"]) == ("full", "<b>run</b>", "starting")
            under_test.run.status.global_step = 5
            kind, last_id, data = await viewer.event()
            while "state" not in data:
                kind, last_id, data = await viewer.event()
            assert (kind, data["state"]["step"]) == ("update", 5)
        async with under_test.viewer(last_id) as viewer:
            assert (await viewer.event())[0] == "update"
        async with under_test.viewer("0123.1") as viewer:
            assert (await viewer.event())[0] == "full"


async def test_viewers_are_bounded_and_counted(fast: None, caplog: pytest.LogCaptureFixture) -> None:
    """A further one is refused with the reason, until another has left, which is not worth a line in the log."""
    async with served(viewers_max=2) as under_test:
        async with under_test.viewer() as one, under_test.viewer() as two:
            await one.event()
            await two.event()
            assert under_test.counted("viewers") == 2
            status, text, headers = await under_test.get("/page/events")
            assert (status, headers["Retry-After"]) == (503, "5")
            assert text == "there are 2 viewers already (metrics.viewers_max)\n"
        with anyio.fail_after(180):
            while under_test.counted("viewers"):
                await anyio.sleep(0.01)
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
        async with under_test.viewer() as three:
            assert (await three.event())[0] == "full"


async def test_a_slow_viewer_is_dropped_and_counted(fast: None) -> None:
    """One that reads nothing: the buffers are full, and its connection ends; others go on."""
    run = new_run(FakePeers(), run_name="r")
    async with served(run=run) as under_test:
        address = under_test.url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.setblocking(False)
            await ask(slow, address[0], int(address[1]))
            async with under_test.viewer() as viewer:
                number = 0
                with anyio.fail_after(180):
                    while under_test.counted("viewers_dropped_total") == 0:
                        number += 1
                        run.status.tamiyo_answer = f"{number} " + "x" * 290
                        run.status.logged = {f"m{key}": number + key for key in range(2000)}
                        assert (await viewer.event())[0] in {"full", "update"}
                assert (await viewer.event())[0] == "update"
                assert under_test.counted("viewers") == 1


async def ask(client: socket.socket, host: str, port: int) -> None:
    """Asks for the stream, and reads nothing of it."""
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, port))
    await loop.sock_sendall(client, b"GET /page/events HTTP/1.1\r\nHost: x\r\n\r\n")


async def test_the_end_of_the_service_is_said(fast: None) -> None:
    """The last state, and that it is the last one; the stream ends."""
    async with served() as under_test, under_test.viewer() as viewer:
        await viewer.event()
        under_test.run.status.state_reason = "the service is stopping"
        under_test.closing.set()
        reasons: list[str] = []
        with anyio.fail_after(180):
            while (event := await viewer.event())[0] != "end":
                reasons += [event[2]["state"]["reason"]] if "state" in event[2] else []
        assert reasons[-1] == "the service is stopping"
        assert await viewer.answer.content.read() == b""


@pytest.fixture
def config(tmp_path: Path) -> WatchedFiles[WebConfig]:
    """A web config with one user, and headers."""
    digest = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "web.yml").write_text(
        f"basic_auth_users: {{ana: '{digest}'}}\n"
        "http_server_config: {headers: {X-Frame-Options: deny, Content-Security-Policy: 'sandbox allow-scripts'}}\n"
    )
    return WatchedFiles("web", lambda: WebConfig.read(str(tmp_path / "web.yml")))


async def test_the_page_needs_the_password_of_metrics(config: WatchedFiles[WebConfig], fast: None) -> None:
    """Every part of it; the headers of the web config are on the stream too, and a policy there is added."""
    async with served(config) as under_test:
        for path in ("/", "/page/page.js", "/page/events"):
            status, _, headers = await under_test.get(path)
            assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="tolaria"')
            assert (await under_test.get(path, Authorization=aiohttp.encode_basic_auth("ana", "wrong")))[0] == 401
        allowed = {"Authorization": aiohttp.encode_basic_auth("ana", "secret")}
        assert (await under_test.get("/", **allowed))[0] == 200
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{under_test.url}/page/events", headers=allowed) as answer,
        ):
            assert (await Viewer(answer).event())[0] == "full"
            assert answer.headers["X-Frame-Options"] == "deny"
            assert answer.headers.getall("Content-Security-Policy") == [POLICY, "sandbox allow-scripts"]


async def test_there_may_be_no_page() -> None:
    """With metrics.viewers_max = 0."""
    async with served(viewers_max=0) as under_test:
        assert [(await under_test.get(path))[0] for path in ("/", "/page/page.js", "/page/events")] == [404] * 3
        assert (await under_test.get("/livez"))[0] == 200


async def test_requests_flat_out_are_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the page, not of probes; one after a pause does not wait."""
    monkeypatch.setattr(site, "SPACING_S", 0.2)
    async with served() as under_test:
        begun_s = anyio.current_time()
        for _ in range(4):
            assert (await under_test.get("/"))[0] == 200
        assert anyio.current_time() - begun_s >= 0.6


async def test_incidents_and_restore_points_come_from_the_journal(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an earlier process; what cannot be read is said, and read again later."""
    run = new_run(FakePeers(), epochs=2, sections={"checkpoint": {"every_epochs": 1}})
    row = FaultRow("f1", 1, "run", "lane_lost", 7, "crashed", "SIGSEGV in <i>kernel</i>")
    await anyio.to_thread.run_sync(run.storage.journal.put, row)
    async with served(run=run) as under_test, under_test.viewer() as viewer:
        incidents: dict[str, Any] = {}
        with anyio.fail_after(180):
            while not incidents.get("rows"):
                incidents = (await viewer.event())[2].get("incidents", incidents)
        assert incidents["rows"][0]["reason"] == "SIGSEGV in <i>kernel</i>"
        assert incidents["rows"][0]["details"] == {"stage": "crashed"}

        async def fails(_limit: int) -> tuple[()]:
            raise JournalUnavailableError("no disk")

        with monkeypatch.context() as broken, anyio.fail_after(180):
            broken.setattr(run.journal, "incidents", fails)
            run.core.history.journalled += 1
            while incidents["failure"] != "no disk":
                incidents = (await viewer.event())[2].get("incidents", incidents)
        points: dict[str, Any] = {"rows": []}
        with anyio.fail_after(180):
            async with running(run):
                while not {"fast", "full"} <= {point["tier"] for point in points["rows"]} or incidents["failure"]:
                    data = (await viewer.event())[2]
                    points, incidents = data.get("points", points), data.get("incidents", incidents)
