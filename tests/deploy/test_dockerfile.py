"""The Dockerfile, checked without a container engine: linted, parsed, and its commands run one by one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tolaria.service.readiness import ADMIN_SERVICE

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, with continuation lines joined."""

    name: str
    rest: str


def stages() -> list[list[Instruction]]:
    """Returns the Dockerfile's instructions, one list for each stage."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    text = re.sub(r"^ARG .*$", "", text, count=1, flags=re.MULTILINE)  # the one before the first stage
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
    """Returns the arguments of an instruction in the stages before the last, in order."""
    return [instruction.rest for stage in stages()[:-1] for instruction in stage if instruction.name == name]


def commands(run: str) -> list[str]:
    """Returns the shell commands of a RUN instruction."""
    return re.sub(r"^(--\S+ )*", "", run).split(" && ")


def test_hadolint_finds_nothing() -> None:
    """The linter reports nothing, with no rule switched off."""
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "Dockerfile"], cwd=ROOT, check=False, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint ignore" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not (ROOT / ".hadolint.yaml").exists()


def test_image_is_the_slim_base_and_two_directories() -> None:
    """Tools and sources stay in the stage of the service; nothing large is copied between stages."""
    assert (ROOT / "Dockerfile").read_text().count("\nARG BASE_IMAGE=python:3.11-slim\n") == 1
    assert [stage[0].rest for stage in stages()] == [
        "${BASE_IMAGE} AS environment",
        "environment AS service",
        "environment",
    ]
    assert runtime("COPY") == ["--from=service /opt/service /opt/service"]
    assert runtime("RUN") == []


def test_code_is_in_the_last_layer() -> None:
    """A change of the service rebuilds two layers, which downloads nothing."""
    environment, service = stages()[0], stages()[1]
    sources = [instruction.rest for instruction in environment if instruction.name == "COPY"]

    assert sources == ["constraints.txt ./", "pyproject.toml ./"]
    assert [instruction.name for instruction in service] == ["FROM", "RUN", "COPY", "COPY", "RUN"]
    assert "--no-deps --no-index --no-build-isolation --target /opt/service ." in service[-1].rest


def test_image_has_a_bill_of_materials() -> None:
    """CycloneDX lists what is installed in the environment; its generator is not."""
    (run,) = [run for run in builds("RUN") if "cyclonedx-py" in run]

    assert "--output-file /opt/service/sbom.cdx.json /opt/tolaria/bin/python" in run
    assert "/opt/tools/bin/pip install --constraint constraints.txt cyclonedx-bom" in run


def test_every_install_is_pinned() -> None:
    """Every pip install uses the pinned versions."""
    installs = [command for run in builds("RUN") for command in commands(run) if "pip install" in command]

    assert len(installs) == 4
    assert all("--constraint constraints.txt" in command or "--no-index" in command for command in installs)


@pytest.mark.parametrize(("url", "expected"), [("", []), ("file:///a b", ["--extra-index-url", "file:///a b"])])
def test_torch_index_is_used_only_if_given(url: str, expected: list[str]) -> None:
    """An empty build argument adds no index; any other is passed to pip as one word."""
    found = [command for run in builds("RUN") for command in commands(run) if "--extra-index-url" in command]
    assert len(found) == 2
    for command in found:
        words = subprocess.run(
            ["/bin/sh", "-c", command.replace("pip install", "printf '%s\\n'", 1)],
            check=True,
            capture_output=True,
            text=True,
            env={"TORCH_INDEX_URL": url},
        )
        lines = words.stdout.splitlines()
        index = lines[: lines.index("--constraint")]
        assert index == expected


def test_no_index_host_is_written_down() -> None:
    """Packages come from the index that the builder's pip is configured with."""
    assert re.findall(r"https?://", (ROOT / "Dockerfile").read_text(encoding="utf-8")) == []


def test_process_is_an_unprivileged_user_with_a_fixed_number() -> None:
    """The user is a number, which a cluster can verify without reading /etc/passwd, and owns its home directory."""
    assert runtime("USER") == ["10001:10001"]
    assert "--uid 10001" in builds("RUN")[0]
    assert runtime("WORKDIR") == ["/var/lib/tolaria"]
    assert "install --directory --owner=tolaria --group=tolaria --mode=0750 /var/lib/tolaria" in builds("RUN")[0]


def test_image_serves_by_default_and_drains_when_stopped() -> None:
    """`docker run` serves, arguments choose another command, and a stop sends SIGTERM, which the init passes on."""
    assert runtime("ENTRYPOINT") == ['["tini", "-s", "--", "tolaria"]']
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


def health_command() -> list[str]:
    """Returns the command of HEALTHCHECK for this interpreter."""
    command: list[str] = json.loads(runtime("HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


@contextmanager
def admin_server(*, serving: bool) -> Iterator[str]:
    """A gRPC server on loopback where only the admin service has this health; yields its address."""
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)  # as that of a halted run
    status = health_pb2.HealthCheckResponse
    servicer.set(ADMIN_SERVICE, status.SERVING if serving else status.NOT_SERVING)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_health_check_follows_the_admin_service() -> None:
    """A container is healthy while the admin service serves, also if the run is halted or a proxy is set."""
    proxied = {"http_proxy": "http://127.0.0.1:1", "PATH": ""}

    def healthy(address: str) -> bool:
        command = [word.replace("127.0.0.1:50051", address) for word in health_command()]
        return subprocess.run(command, check=False, capture_output=True, env=proxied).returncode == 0

    with admin_server(serving=True) as address:
        assert healthy(address)
    assert not healthy(address)
    with admin_server(serving=False) as address:
        assert not healthy(address)


def test_hadolint_finds_mistakes(tmp_path: Path) -> None:
    """The linter fails for a careless Dockerfile."""
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    with (tmp_path / "Dockerfile").open("a", encoding="utf-8") as file:
        file.write("USER root\nRUN pip install torch\n")

    done = subprocess.run([Path(sys.executable).parent / "hadolint", "Dockerfile"], cwd=tmp_path, check=False)

    assert done.returncode != 0
