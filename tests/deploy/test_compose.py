"""docker-compose.yml, checked without a container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from ruamel.yaml import YAML

from tolaria.config import ServiceSettings, connection, load_settings, require_protection
from tolaria.security.certificates import now_utc
from tolaria.security.tokens import Role
from tolaria.service.protection import protected
from tolaria.signals import SignalBoard
from tolaria.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
PEERS = {"tamiyo": 50052, "kasmina": 50053}
OURS = ("tolaria", *PEERS)
MONITORING = ("prometheus", "grafana")
RUNNING = (*OURS, *MONITORING)
ALL = (*RUNNING, "secrets")


def read(path: str) -> Any:
    """Returns a YAML file of the repository with anchors and merges resolved."""
    return YAML(typ="safe").load(ROOT / path)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services of docker-compose.yml."""
    found: dict[str, Any] = read("docker-compose.yml")["services"]
    return found


def compose_command() -> list[str] | None:
    """Returns the command of Compose 2 on this machine: the plugin, else the program; None without either."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version", "--short"], check=False, capture_output=True, text=True)
            if done.returncode == 0 and int(done.stdout.strip().lstrip("v").split(".")[0]) >= 2:
                return command
    return None


def test_file_is_valid_by_the_compose_schema() -> None:
    """The Compose specification allows every key and value."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_accepts_the_file() -> None:
    """Compose resolves the file, including the monitoring profile."""
    command = compose_command()
    if command is None:
        pytest.skip("neither `docker compose` nor docker-compose 2 is installed; only the schema was checked")

    done = subprocess.run(
        [*command, "--profile", "monitoring", "config", "--quiet"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_services_are_the_three_and_optional_monitoring(services: dict[str, Any]) -> None:
    """What makes the secrets, Tolaria and its peers start by default, the others in the monitoring profile only."""
    assert set(services) == set(ALL)
    assert all(services[name]["profiles"] == ["monitoring"] for name in MONITORING)
    assert [name for name in OURS if "profiles" in services[name]] == []


@pytest.mark.parametrize("name", ALL)
def test_container_is_hardened(name: str, services: dict[str, Any]) -> None:
    """No capabilities, no new privileges, and a read-only root file system; the image has an init."""
    service = services[name]

    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "cap_add", "user", "network_mode", "pid"} & set(service)


@pytest.mark.parametrize("name", RUNNING)
def test_container_restarts_and_has_time_to_drain(name: str, services: dict[str, Any]) -> None:
    """A crashed container is restarted; the grace period of a stop exceeds the drain timeout."""
    service = services[name]

    assert service["restart"] == "unless-stopped"
    assert int(service["stop_grace_period"].removesuffix("s")) > ServiceSettings().drain_timeout_s


@pytest.mark.parametrize("name", ALL)
def test_ports_are_published_on_loopback_only(name: str, services: dict[str, Any]) -> None:
    """No port is reachable from outside the host."""
    assert [port for port in services[name].get("ports", []) if not port.startswith("127.0.0.1:")] == []


def test_peers_share_the_memory_of_tolaria(services: dict[str, Any]) -> None:
    """The peers join the IPC namespace of Tolaria and restart with it, so that all three share one /dev/shm."""
    assert services["tolaria"]["ipc"] == "shareable"
    for peer in PEERS:
        assert services[peer]["ipc"] == "service:tolaria"
        assert services[peer]["depends_on"] == {"tolaria": {"condition": "service_started", "restart": True}}
    assert services["tolaria"]["depends_on"] == {"secrets": {"condition": "service_completed_successfully"}}


def test_peers_attach_to_the_board_that_tolaria_creates(services: dict[str, Any], tmp_path: Path) -> None:
    """All three have the same path, and a peer started with the command of the file beats on such a board."""
    board = services["tolaria"]["environment"]["TOLARIA_SIGNALS__PATH"]

    assert Path(board).parent == Path("/dev/shm")  # noqa: S108 - a path inside a container
    for peer in PEERS:
        *command, address = services[peer]["command"][:4]
        assert services[peer]["command"][4:] == ["--board", board]
        with SignalBoard.create(tmp_path / peer, "run-1") as created:
            options = ["127.0.0.1:0", "--board", str(created.path), "--while-stdin"]
            assert address.startswith("0.0.0.0:")
            child = subprocess.Popen(
                [sys.executable, "-m", "tolaria", *command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            seen, beaten = created.bell, 0
            while not beaten and child.poll() is None:
                seen = created.wait(seen, timeout_s=1.0)
                beaten = created.read(peer).heartbeat_ns
            child.communicate(timeout=180)
            assert beaten


def test_three_services_run_one_image(services: dict[str, Any]) -> None:
    """One service builds the image, and all three run it."""
    assert len({services[name]["image"] for name in (*OURS, "secrets")}) == 1
    assert [name for name in ALL if "build" in services[name]] == ["tolaria"]


@pytest.mark.parametrize("peer", PEERS)
def test_peer_listens_where_tolaria_calls(peer: str, services: dict[str, Any]) -> None:
    """The peer's address, Tolaria's target and the health check agree on the port."""
    port = PEERS[peer]

    assert services[peer]["command"][:4] == ["peer", peer, "--listen", f"0.0.0.0:{port}"]
    assert services["tolaria"]["environment"][f"TOLARIA_{peer.upper()}__TARGET"] == f"{peer}:{port}"
    assert services[peer]["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"


def test_state_is_on_a_volume(services: dict[str, Any]) -> None:
    """The volume is mounted at the only directory that the image's user may write; /tmp is in memory."""
    assert services["tolaria"]["volumes"][0] == "state:/var/lib/tolaria"
    assert "state" in read("docker-compose.yml")["volumes"]
    assert all(services[name]["tmpfs"] == ["/tmp"] for name in OURS)  # noqa: S108 - a path inside a container


@pytest.mark.parametrize("name", OURS)
def test_environment_is_accepted(
    name: str, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every variable names a setting and has a valid value."""
    monkeypatch.chdir(tmp_path)
    for variable, value in services[name]["environment"].items():
        monkeypatch.setenv(variable, value or "")

    settings = load_settings()

    if name == "tolaria":
        assert (settings.server.listen, settings.metrics.listen) == ("0.0.0.0:50051", "0.0.0.0:9464")
        assert (settings.tamiyo.target, settings.kasmina.target) == ("tamiyo:50052", "kasmina:50053")
        assert str(settings.signals.board("any run")) == services[name]["environment"]["TOLARIA_SIGNALS__PATH"]


def test_admin_port_is_protected_by_what_the_secrets_service_makes(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its script, run twice as it is on the folders of this test, makes the files that Tolaria's variables name.

    The key of the CA is where Tolaria does not see it, and a client in the container has a token for everything.
    """
    (secrets, ca), mounts = (tmp_path / "secrets", tmp_path / "ca"), services["secrets"]["volumes"]
    assert mounts == ["secrets:/etc/tolaria/secrets", "ca:/etc/tolaria/ca"]
    assert [mount for name in OURS for mount in services[name].get("volumes", []) if mount.startswith("ca:")] == []
    assert "secrets:/etc/tolaria/secrets:ro" in services["tolaria"]["volumes"]
    secrets.mkdir()

    def here(text: str) -> str:
        return text.replace("/etc/tolaria/secrets", str(secrets)).replace("/etc/tolaria/ca", str(ca))

    (script,) = services["secrets"]["command"]
    shell = [*services["secrets"]["entrypoint"], here(script.replace("$$", "$"))]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = []
    for _ in range(2):
        subprocess.run(shell, check=True, capture_output=True, env={**os.environ, "PATH": tools})
        made.append({path.name: path.read_bytes() for path in (*secrets.iterdir(), *ca.iterdir())})
    assert made[0] == made[1]
    assert not (secrets / "ca.key").exists()

    monkeypatch.chdir(tmp_path)
    for variable, value in services["tolaria"]["environment"].items():
        monkeypatch.setenv(variable, here(value or ""))
    settings = load_settings()
    require_protection(settings)
    tokens = protected(settings, Metrics()).tokens
    client = connection()
    assert tokens is not None
    assert tokens.value.find(Path(client.token_file).read_text().strip(), now_utc()).role is Role.ADMIN
    assert Path(client.tls_ca).read_bytes() == (ca / "ca.pem").read_bytes()


def test_secret_comes_from_the_environment(services: dict[str, Any]) -> None:
    """The key of signatures is passed through to all three, and is in no file."""
    assert all(services[name]["environment"]["TOLARIA_LEYLINE__SECRET"] is None for name in OURS)


def test_prometheus_scrapes_tolaria_under_underscore_names(services: dict[str, Any]) -> None:
    """The pinned Prometheus scrapes Tolaria's port and stores the names that dashboards use."""
    config = read("deploy/prometheus/prometheus.yml")
    port = services["tolaria"]["environment"]["TOLARIA_METRICS__LISTEN"].rpartition(":")[2]

    assert config["global"]["metric_name_escaping_scheme"] == "underscores"
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": [f"tolaria:{port}"]}]
    assert services["prometheus"]["image"].rpartition(":")[2].startswith("v3.")
    assert services["prometheus"]["volumes"][0].endswith(":/etc/prometheus/prometheus.yml:ro")
    assert services["prometheus"]["volumes"][1] == "./deploy/prometheus/rules:/etc/prometheus/rules:ro"
    assert config["rule_files"] == ["rules/*.yml"]


def test_grafana_has_no_default_password(services: dict[str, Any]) -> None:
    """Dashboards are read without a login, and there is no user who could change anything."""
    environment = services["grafana"]["environment"]

    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert services["grafana"]["image"].rpartition(":")[2].startswith("11.6.")  # the dashboards are made for it


@pytest.mark.parametrize(("variable", "expected"), [(None, "cpu"), ("", ""), ("https://example/cu128", "cu128")])
def test_torch_is_for_cpus_unless_another_index_is_chosen(
    variable: str | None, expected: str, services: dict[str, Any]
) -> None:
    """The default needs gigabytes less; an empty variable chooses the default index of packages."""
    default = services["tolaria"]["build"]["args"]["TORCH_INDEX_URL"]
    environment = {} if variable is None else {"TORCH_INDEX_URL": variable}

    done = subprocess.run(
        ["/bin/sh", "-c", f'echo "{default}"'], check=True, capture_output=True, text=True, env=environment
    )

    assert done.stdout.strip().rpartition("/")[2] == expected


@contextmanager
def grpc_health_server(*, serving: bool) -> Iterator[int]:
    """A gRPC server on loopback with a health status; yields its port."""
    status = health_pb2.HealthCheckResponse
    servicer = health.HealthServicer()
    servicer.set("", status.SERVING if serving else status.NOT_SERVING)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


def healthy(services: dict[str, Any], peer: str, port: int) -> bool:
    """Whether a peer's health check accepts the server at `port`."""
    kind, python, *arguments, _ = services[peer]["healthcheck"]["test"]
    assert (kind, python) == ("CMD", "python")
    command = [sys.executable, *arguments, f"127.0.0.1:{port}"]
    environment = {"http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(command, check=False, capture_output=True, env=environment).returncode == 0


@pytest.mark.parametrize("peer", PEERS)
def test_peer_health_check_follows_grpc_health(peer: str, services: dict[str, Any]) -> None:
    """A peer is healthy while grpc.health.v1 answers SERVING, not if it answers NOT_SERVING or is unreachable."""
    with grpc_health_server(serving=True) as port:
        assert healthy(services, peer, port)
    assert not healthy(services, peer, port)
    with grpc_health_server(serving=False) as port:
        assert not healthy(services, peer, port)
