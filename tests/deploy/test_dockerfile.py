"""The Dockerfile, checked without a container engine: linted, parsed, and its commands run one by one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, with continuation lines joined."""

    name: str
    rest: str


def stages() -> list[list[Instruction]]:
    """Returns the Dockerfile's instructions, one list for each stage."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, " ".join(rest.split())))
    return found


def runtime(name: str) -> list[str]:
    """Returns the arguments of an instruction in the last stage, in order."""
    return [instruction.rest for instruction in stages()[-1] if instruction.name == name]


def builds(name: str) -> list[str]:
    """Returns the arguments of an instruction in the first stage, in order."""
    return [instruction.rest for instruction in stages()[0] if instruction.name == name]


def test_hadolint_finds_nothing() -> None:
    """The linter reports nothing, with no rule switched off."""
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "Dockerfile"], cwd=ROOT, check=False, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not (ROOT / ".hadolint.yaml").exists()


def test_image_is_built_in_two_stages_from_the_slim_base() -> None:
    """The final stage is the slim base and one directory; compilers, caches and sources stay in the builder."""
    assert len(stages()) == 2
    assert runtime("FROM") == ["python:3.11-slim"]
    assert runtime("COPY") == ["--from=builder /opt/tolaria /opt/tolaria"]


def test_every_install_is_pinned() -> None:
    """Every pip install uses the pinned versions."""
    installs = [run for run in builds("RUN") if "pip install" in run]

    assert installs
    assert all("--constraint constraints.txt" in run for run in installs)


@pytest.mark.parametrize(("url", "expected"), [("", []), ("file:///a b", ["--extra-index-url", "file:///a b"])])
def test_torch_index_is_used_only_if_given(url: str, expected: list[str]) -> None:
    """An empty build argument adds no index; any other is passed to pip as one word."""
    for run in (run for run in builds("RUN") if "pip install" in run):
        words = subprocess.run(
            ["/bin/sh", "-c", run.replace("pip install", "printf '%s\\n'", 1)],
            check=True,
            capture_output=True,
            text=True,
            env={"TORCH_INDEX_URL": url},
        )
        *index, flag, _, _ = words.stdout.splitlines()
        assert (index, flag) == (expected, "--constraint")


def test_no_index_host_is_written_down() -> None:
    """Packages come from the index that the builder's pip is configured with."""
    assert set(re.findall(r"https?://([^/'\" ]*)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))) == {
        "127.0.0.1:9464"
    }


def test_process_is_an_unprivileged_user_with_a_fixed_number() -> None:
    """The user is a number, which a cluster can verify without reading /etc/passwd, and owns its home directory."""
    assert runtime("USER") == ["10001:10001"]
    assert "--uid 10001" in runtime("RUN")[0]
    assert runtime("WORKDIR") == ["/var/lib/tolaria"]
    assert "install --directory --owner=tolaria --group=tolaria --mode=0750 /var/lib/tolaria" in runtime("RUN")[0]


def test_image_serves_by_default_and_drains_when_stopped() -> None:
    """`docker run` serves, arguments choose another command, and a stop sends SIGTERM."""
    assert runtime("ENTRYPOINT") == ['["tolaria"]']
    assert runtime("CMD") == ['["serve"]']
    assert runtime("STOPSIGNAL") == ["SIGTERM"]
    assert runtime("EXPOSE") == ["50051 9464"]


def test_label_carries_the_version_of_the_package() -> None:
    """The label and the package have the same version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert f'org.opencontainers.image.version="{project["version"]}"' in runtime("LABEL")[0]


def test_build_context_is_a_list_of_what_is_needed() -> None:
    """The build context contains only the paths of the COPY instructions."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {word.removeprefix("./") for copy in builds("COPY") for word in copy.split()[:-1]}

    assert "*" in lines
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


class _Answer(BaseHTTPRequestHandler):
    """Answers /livez with the server's `status`, anything else with 404."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/livez" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the library's
        """Logs nothing."""


@contextmanager
def metrics_server(status: int) -> Iterator[int]:
    """A server on loopback whose /livez has `status`; yields its port."""
    with HTTPServer(("127.0.0.1", 0), _Answer) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health_command() -> list[str]:
    """Returns the command of HEALTHCHECK for this interpreter."""
    command: list[str] = json.loads(runtime("HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_health_check_follows_livez(status: int, healthy: bool) -> None:
    """The container is healthy while /livez answers 200, also if the environment names a proxy."""
    proxied = {"http_proxy": "http://127.0.0.1:1", "PATH": ""}

    with metrics_server(status) as port:
        command = [word.replace(":9464/", f":{port}/") for word in health_command()]
        done = subprocess.run(command, check=False, capture_output=True, env=proxied)

    assert (done.returncode == 0) == healthy


def test_health_check_fails_without_a_server() -> None:
    """A service that does not listen is unhealthy."""
    with metrics_server(200) as port:
        pass

    command = [word.replace(":9464/", f":{port}/") for word in health_command()]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_hadolint_finds_mistakes(tmp_path: Path) -> None:
    """The linter fails for a careless Dockerfile."""
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    with (tmp_path / "Dockerfile").open("a", encoding="utf-8") as file:
        file.write("USER root\nRUN pip install torch\n")

    done = subprocess.run([Path(sys.executable).parent / "hadolint", "Dockerfile"], cwd=tmp_path, check=False)

    assert done.returncode != 0
