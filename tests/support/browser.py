"""A real headless Chromium, driven by the W3C WebDriver protocol through Debian's chromedriver.

The protocol is a few requests over HTTP. A client library would bring a dozen packages, one of which is a plugin of
the test framework.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).parents[1] / "fixtures" / "axe-core" / "axe.min.js"
"""axe-core 4.14.1, unchanged, under the Mozilla Public License 2.0 beside it: checks a page's accessibility."""

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
TAB, ENTER = "\ue004", "\ue007"
WIDE, NARROW = (1440, 900), (390, 844)
_TIMEOUT_S = 60.0


def program(name: str, package: str) -> str:
    """Returns the path of a program; skips the test without it, and fails it in CI."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is missing: it is in Debian's package {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


class Browser:
    """One window of a browser."""

    def __init__(self, port: int, session: str) -> None:
        self._port, self._session = port, session

    def open(self, url: str) -> None:
        """Loads a page."""
        self._post("url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Runs JavaScript in the page; returns what it returns."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str) -> Any:
        """Runs JavaScript, whose last argument is called with the result."""
        return self._post("execute/async", {"script": script, "args": []})

    def text(self, css: str) -> str:
        """The text of an element, whether it is visible or not; empty without it."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css))

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def emulate(self, size: tuple[int, int] = WIDE, **features: str) -> None:
        """Sets the size of the window, and media features, whose names have underscores for dashes."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=named)
        self.run_async("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")

    def devtools(self, command: str, **parameters: object) -> Any:
        """Calls the DevTools protocol, which only Chromium has."""
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path) -> bytes:
        """Writes the whole page as PNG; returns it."""
        found = base64.b64decode(self.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        path.write_bytes(found)
        return found

    def console(self) -> list[str]:
        """The messages of the console since the last call, among them violations of the content policy."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def violations(self) -> list[str]:
        """What axe-core finds wrong, by the rules of WCAG 2.2 A and AA and its best practices."""
        if not self.run("return typeof axe === 'object'"):
            self.devtools("Runtime.evaluate", expression=AXE.read_text(encoding="utf-8"))
        found = self.run_async(
            "const done = arguments[0]; axe.run(document).then((it) => done(it), (e) => done({error: String(e)}))"
        )
        assert "error" not in found, found
        assert len(found["passes"]) > 20, "axe has hardly looked at anything"
        return [
            f"{each['id']}: {node['html']} {node['failureSummary']}"
            for each in found["violations"]
            for node in each["nodes"]
        ]

    def until(self, condition: Callable[[], object], timeout_s: float = _TIMEOUT_S) -> None:
        """Waits until a condition holds; fails with the page's text if it does not in time."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until_s, (self.text("body"), self.console())
            time.sleep(0.1)

    def windows(self) -> list[str]:
        """The windows, in the order in which they were opened."""
        return list(self._call("GET", "window/handles"))

    def switch(self, window: str) -> None:
        """Makes a window that which all other calls are about."""
        self._post("window", {"handle": window})

    def close_window(self) -> None:
        """Closes the window, and leaves the browser open if there is another one."""
        self._call("DELETE", "window")

    def close(self) -> None:
        """Closes the browser."""
        self._call("DELETE", "")

    def _call(self, method: str, command: str, body: dict[str, object] | None = None) -> Any:
        return _call(self._port, method, f"/session/{self._session}/{command}".rstrip("/"), body)

    def _post(self, command: str, body: dict[str, object]) -> Any:
        return self._call("POST", command, body)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Runs a browser with an empty profile; skips the test without one."""
    binary, driver = program("chromium", "chromium"), program("chromedriver", "chromium-driver")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            port = _port(iter(process.stdout))
            options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = _call(port, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            browser = Browser(port, made["sessionId"])
            try:
                yield browser
            finally:
                browser.close()
        finally:
            process.kill()


def _port(lines: Iterator[str]) -> int:
    for line in lines:
        if found := re.search(r"started successfully on port (\d+)", line):
            return int(found[1])
    raise AssertionError("chromedriver does not start")


def _call(port: int, method: str, path: str, body: dict[str, object] | None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode())
        answer = connection.getresponse()
        value = json.load(answer)["value"]
    finally:
        connection.close()
    assert answer.status == 200, value["message"]
    return value
