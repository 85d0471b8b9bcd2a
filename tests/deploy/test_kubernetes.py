"""deploy/kubernetes, checked without a cluster: by schema, by the settings, and with its containers as processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support.pods import Pod, Process, containers_of, variables_of
from support.waiting import wait_for
from tolaria.config import Address, Settings, load_settings
from tolaria.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
PEERS = ("tamiyo", "kasmina")
ALL = (*PEERS, "tolaria")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a path inside a container
ENDLESS = {"TOLARIA_TRAINING__EPOCHS": "100000"}


@cache
def read(name: str) -> Any:
    """Returns a file of the folder with aliases resolved."""
    return YAML(typ="safe").load(FOLDER / name)


def job() -> Any:
    """The specification of the Job."""
    return read("job.yaml")["spec"]


def pod_spec() -> Any:
    """The specification of the pod."""
    return job()["template"]["spec"]


def containers() -> dict[str, dict[str, Any]]:
    """The containers by name."""
    return containers_of(pod_spec())


def history() -> Path:
    """Where Tamiyo keeps its history."""
    return Path(containers()["tamiyo"]["args"][-1].removeprefix("--state-dir="))


def config_map() -> dict[str, str]:
    """The variables of the ConfigMap."""
    data: dict[str, str] = read("settings.yaml")["data"]
    return data


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """What Tolaria reads in its container; fails if a variable is no setting, or has an invalid value."""
    monkeypatch.chdir(tmp_path)
    for name, value in variables_of(containers()["tolaria"], config_map()).items():
        monkeypatch.setenv(name, value)
    return load_settings()


# -- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.29.0", "1.37.0"])
def test_files_are_valid_by_the_schema_of_kubernetes(version: str) -> None:
    """The oldest version that has sidecars by default and the newest known one allow every key and value."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed; pyproject.toml lists it")
    files = [FOLDER / name for name in read("kustomization.yaml")["resources"]]
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--kubernetes-version", version, *files]

    done = subprocess.run(command, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed for resource") == len(files)


def test_kustomization_has_every_file() -> None:
    """Each file is a resource, and the images are those of the Job."""
    kustomization = read("kustomization.yaml")

    files = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert {*kustomization["resources"], "kustomization.yaml"} == files
    (image,) = kustomization["images"]
    assert {c["image"] for c in containers().values()} == {f"{image['name']}:{image['newTag']}"}


def test_kustomize_builds_the_folder() -> None:
    """Kustomize of kubectl accepts the files, aliases included."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; only the schema was checked")

    done = subprocess.run([kubectl, "kustomize", FOLDER], check=False, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    built = [document for document in YAML(typ="safe").load_all(done.stdout) if document]
    assert {document["kind"] for document in built} == {
        *("ConfigMap", "PersistentVolumeClaim", "Job", "Service", "NetworkPolicy")
    }
    assert [d["spec"]["template"]["spec"] for d in built if d["kind"] == "Job"] == [pod_spec()]


def test_selectors_and_names_agree() -> None:
    """Service and policy select the pod, which uses the ConfigMap and the claim that are there."""
    labels = job()["template"]["metadata"]["labels"].items()
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod_spec()["volumes"] if "persistentVolumeClaim" in v]

    assert read("metrics.yaml")["spec"]["selector"].items() <= labels
    assert read("network-policy.yaml")["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert containers()["tolaria"]["envFrom"] == [{"configMapRef": {"name": read("settings.yaml")["metadata"]["name"]}}]
    assert claims == [read("state.yaml")["metadata"]["name"]]


# -- settings --------------------------------------------------------------------------------------------------------


def test_variables_are_settings(settings: Settings) -> None:
    """Each has the name of a setting and a valid value, and the lane is a child process."""
    assert settings.training.threads == 2
    assert settings.lane.mode == "process"
    assert not settings.notices


def test_secret_is_optional_and_in_no_file() -> None:
    """Who signs and who verifies gets the key from a Secret that may be missing; its name is that of the setting."""
    reference = {"name": "tolaria-leyline", "key": "secret", "optional": True}
    for name in ("tolaria", "tamiyo"):
        secrets = [e for e in containers()[name]["env"] if "secretKeyRef" in e.get("valueFrom", {})]
        assert secrets == [{"name": "TOLARIA_LEYLINE__SECRET", "valueFrom": {"secretKeyRef": reference}}]
    assert not [name for name in config_map() if "SECRET" in name]


def test_variables_of_services_are_kept_away(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes would set TOLARIA_PORT for a Service of this name, which is no setting."""
    assert read("metrics.yaml")["metadata"]["name"] == "tolaria"
    assert pod_spec()["enableServiceLinks"] is False
    monkeypatch.setenv("TOLARIA_PORT", "tcp://10.0.0.1:9464")
    with pytest.raises(ConfigurationError):
        load_settings()


def test_pod_has_time_to_drain(settings: Settings) -> None:
    """The grace period exceeds what a drain, and the sentinel, may take."""
    grace_s = pod_spec()["terminationGracePeriodSeconds"]

    assert grace_s > settings.emergency.drain_s > settings.service.drain_timeout_s


def test_job_ends_with_the_run_only(settings: Settings) -> None:
    """A finished run completes the Job, a mistake fails it, a drain or a disruption does neither."""
    disruption, mistake = job()["podFailurePolicy"]["rules"]

    assert settings.service.exit_when_done
    assert settings.service.exit_code_drained not in {0, *mistake["onExitCodes"]["values"]}
    assert mistake == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "tolaria", "operator": "In", "values": [2]},
    }
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job()["podReplacementPolicy"] == "Failed"
    assert pod_spec()["restartPolicy"] == "Never"
    assert {name for name, c in containers().items() if c.get("restartPolicy") == "Always"} == set(PEERS)


def test_addresses_agree(settings: Settings) -> None:
    """Metrics are on the port that is published; everything else is on loopback, and the peers are where it calls."""
    ports = {port["name"]: port["containerPort"] for port in containers()["tolaria"]["ports"]}
    metrics, annotations = Address.parse(settings.metrics.listen), job()["template"]["metadata"]["annotations"]

    assert ports == {"metrics": metrics.port}
    assert not metrics.is_loopback
    assert annotations["prometheus.io/port"] == str(metrics.port)
    assert [p["targetPort"] for p in read("metrics.yaml")["spec"]["ports"]] == ["metrics"]
    assert read("network-policy.yaml")["spec"]["ingress"] == [{"ports": [{"port": "metrics", "protocol": "TCP"}]}]
    assert Address.parse(settings.server.listen).is_loopback
    for name, target in (("tamiyo", settings.tamiyo.target), ("kasmina", settings.kasmina.target)):
        assert Address.parse(target).is_loopback
        assert containers()[name]["args"][:3] == ["peer", name, f"--listen={target}"]
        assert containers()[name]["livenessProbe"]["exec"]["command"][-1] == target


def test_prometheus_scrapes_the_service() -> None:
    """The configuration in deploy/prometheus names the Service and its port, ready or not."""
    scraped = YAML(typ="safe").load(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    service = read("metrics.yaml")
    (port,) = service["spec"]["ports"]

    assert scraped["static_configs"] == [{"targets": [f"{service['metadata']['name']}:{port['port']}"]}]
    assert service["spec"]["publishNotReadyAddresses"] is True


# -- containers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_container_is_hardened(name: str) -> None:
    """The user of the image, a read-only root file system, no capabilities, no new privileges, no token."""
    user = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nUSER ")[2].split()[0]
    security = pod_spec()["securityContext"]

    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["fsGroup"] == security["runAsGroup"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod_spec()["automountServiceAccountToken"] is False
    assert containers()[name]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_liveness_leaves_sound_runs_alone(settings: Settings) -> None:
    """Only /livez ends a container, later than the sentinel would; the start may take minutes."""
    probes, limits = containers()["tolaria"], settings.emergency
    live, start = probes["livenessProbe"], probes["startupProbe"]

    assert live["httpGet"] == start["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert probes["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    sentinel_s = limits.heartbeat_timeout_s + limits.grace_s + limits.drain_s
    assert live["periodSeconds"] * live["failureThreshold"] > sentinel_s
    assert start["periodSeconds"] * start["failureThreshold"] >= limits.phase_timeout_s


def test_processes_can_be_killed_from_inside() -> None:
    """The sentinel cannot kill process 1 of its own container."""
    assert pod_spec()["shareProcessNamespace"] is True


def test_state_is_on_the_claim(settings: Settings) -> None:
    """state.dir and the history of Tamiyo are on the claim's volume, in different directories."""
    (home,) = {m["mountPath"] for c in containers().values() for m in c["volumeMounts"] if m["name"] == "state"}

    assert {Path(settings.state.dir).parent, history().parent} == {Path(home)}
    assert Path(settings.state.dir) != history()


def test_board_is_in_memory_that_all_share(settings: Settings) -> None:
    """The three have the same path, in a volume in memory."""
    (volume,) = (v for v in pod_spec()["volumes"] if v["name"] == "shared-memory")
    board = settings.signals.board("any run")

    assert volume["emptyDir"]["medium"] == "Memory"
    assert board.parent == Path(SHARED_MEMORY)
    for name in ALL:
        assert {"name": "shared-memory", "mountPath": SHARED_MEMORY} in containers()[name]["volumeMounts"]
    assert all(f"--board={board}" in containers()[name]["args"] for name in PEERS)


def test_memory_has_room_for_snapshots(settings: Settings) -> None:
    """What counts against the limit fits: snapshots, shared memory, and 1 GiB for service, lane and torch."""
    (shared,) = (v["emptyDir"]["sizeLimit"] for v in pod_spec()["volumes"] if v["name"] == "shared-memory")
    units = {"Mi": 1, "Gi": 1024}
    limit_mb, shared_mb = (
        int(size[:-2]) * units[size[-2:]] for size in (containers()["tolaria"]["resources"]["limits"]["memory"], shared)
    )

    assert limit_mb >= settings.rollback.memory_mb + shared_mb + 1024


# -- the pod, as processes -------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What happened in a pod: answers of Tolaria by path, exit codes of probes, and what was written and logged."""

    first: dict[str, int] = field(default_factory=dict)
    recovering: dict[str, int] = field(default_factory=dict)
    probes: dict[str, int] = field(default_factory=dict)
    drained: int = -1
    resumed: list[str] = field(default_factory=list)
    written: dict[str, set[Path]] = field(default_factory=dict)


def probe_paths() -> dict[str, str]:
    """The paths of Tolaria's probes by kind, and of the metrics."""
    probes = {kind: containers()["tolaria"][f"{kind}Probe"]["httpGet"]["path"] for kind in ("liveness", "readiness")}
    return probes | {"metrics": job()["template"]["metadata"]["annotations"]["prometheus.io/path"]}


def asked(pod: Pod) -> dict[str, int]:
    """Returns the status of each path; 0 where nothing answers."""
    address = pod.changed(config_map()["TOLARIA_METRICS__LISTEN"])
    found = {}
    for kind, path in probe_paths().items():
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
                found[kind] = response.status
        except urllib.error.HTTPError as error:
            found[kind] = error.code
        except OSError:
            found[kind] = 0
    return found


def answers_when(pod: Pod, readiness: int) -> dict[str, int]:
    """Returns the answers once the readiness probe gets this status, at most two minutes later."""
    until_s = time.monotonic() + 120
    while (found := asked(pod))["readiness"] != readiness:
        assert time.monotonic() < until_s, found
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """The pod with temporary directories as volumes."""
    return Pod(pod_spec(), config_map(), tmp_path_factory.mktemp("pod"))


@pytest.fixture(scope="module")
def story(pod: Pod) -> Iterator[Story]:
    """Runs the containers: the lane is killed, the pod is drained, and another one goes on."""
    told = Story()
    with ExitStack() as ended:

        def start(name: str) -> Process:
            process = pod.start(name, ENDLESS if name == "tolaria" else None)
            ended.callback(process.kill)
            return process

        peers, tolaria = [start(name) for name in PEERS], start("tolaria")
        told.first = answers_when(pod, 200)
        os.kill(next(pid for pid, command in tolaria.children().items() if "tolaria.lane" in command), signal.SIGKILL)
        told.recovering = answers_when(pod, 503)
        answers_when(pod, 200)
        told.probes = {name: pod.probe(name) for name in PEERS}
        saved = Path(pod.changed(str(history())))
        wait_for(lambda: saved.exists() and "checkpoint_written" in tolaria.events())
        told.drained = tolaria.stop()
        again = start("tolaria")
        answers_when(pod, 200)
        again.stop()
        told.resumed = again.events()
        for peer in peers:
            assert peer.stop() == 0
        told.written = {name: pod.written(name) for name in ALL}
        yield told


@pytest.mark.timeout(400)  # the first test of the story: it takes four starts of the service
def test_probes_are_served(story: Story) -> None:
    """The paths of all probes and of the metrics answer 200 while the run trains."""
    assert story.first == {"liveness": 200, "readiness": 200, "metrics": 200}


def test_recovering_lane_is_alive_and_not_ready(story: Story) -> None:
    """While the lane is started again, only readiness fails."""
    assert story.recovering == {"liveness": 200, "readiness": 503, "metrics": 200}


def test_probes_of_the_peers_find_them(story: Story, pod: Pod) -> None:
    """The command succeeds for a peer that serves, and fails once it has ended."""
    assert story.probes == {"tamiyo": 0, "kasmina": 0}
    assert pod.probe("tamiyo") != 0


def test_drained_pod_is_no_finished_run(story: Story) -> None:
    """SIGTERM ends it with the code that the Job does not count as success, and the next pod resumes the run."""
    assert story.drained == int(config_map()["TOLARIA_SERVICE__EXIT_CODE_DRAINED"])
    assert "resumed" in story.resumed


@pytest.mark.parametrize("name", ALL)
def test_writes_go_to_volumes_of_the_container(name: str, story: Story, pod: Pod) -> None:
    """The root file system is read-only: everything written is on a volume that this container has."""
    volumes = [pod.volume(mount["name"]) for mount in containers()[name]["volumeMounts"]]

    assert story.written[name]
    assert [path for path in story.written[name] if not any(path.is_relative_to(v) for v in volumes)] == []


def test_volumes_are_written_to(story: Story, pod: Pod) -> None:
    """Tolaria writes its state and the board, and Tamiyo its history."""
    names = {path.relative_to(pod.volume("state")).parts[0] for path in pod.volume("state").rglob("*")}

    assert names == {Path(config_map()["TOLARIA_STATE__DIR"]).name, history().name}
    assert any(path.is_relative_to(pod.volume("shared-memory")) for path in story.written["tolaria"])
