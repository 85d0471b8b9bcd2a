"""deploy/kubernetes, checked without a cluster: by schema, by the settings, and with its containers as processes."""

from __future__ import annotations

import importlib.util
import os
import re
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
from typer.testing import CliRunner

from dashboards.generate import texts
from dashboards.manifests import manifests
from faults.interrupted import unpack
from support.pods import Pod, Process, containers_of, variables_of
from support.prometheus import groups
from support.waiting import wait_for
from tolaria.cli.commands import app
from tolaria.config import Address, Settings, load_settings
from tolaria.errors import ConfigurationError
from tolaria.probe import TIMEOUT_S
from tolaria.service.readiness import ADMIN_SERVICE
from tolaria.telemetry.metrics import Metrics

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
    return read("base/job.yaml")["spec"]


def pod_spec() -> Any:
    """The specification of the pod with its peers, as kustomize makes it."""
    peers = read("overlays/peers/peers.yaml")["spec"]["template"]["spec"]
    assert set(peers) == {"initContainers"}
    return job()["template"]["spec"] | peers


def containers() -> dict[str, dict[str, Any]]:
    """The containers by name."""
    return containers_of(pod_spec())


def history() -> Path:
    """Where Tamiyo keeps its history."""
    return Path(containers()["tamiyo"]["args"][-1].removeprefix("--state-dir="))


def config_map() -> dict[str, str]:
    """The variables of the ConfigMap, with the addresses of the peers."""
    data: dict[str, str] = read("base/settings.yaml")["data"] | read("overlays/peers/settings.yaml")["data"]
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
    files = [FOLDER / "base" / name for name in read("base/kustomization.yaml")["resources"]]
    files += [FOLDER / "overlays" / "monitoring" / "dashboards.yaml"]
    files += [FOLDER / "components" / "no-eviction" / "disruption-budget.yaml"]
    files += [FOLDER / "components" / "backups" / name for name in ("backup.yaml", "volume.yaml")]
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--kubernetes-version", version, *files]

    done = subprocess.run(command, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed for resource") == len(files)


KUSTOMIZATIONS = ("base", "components/backups", "components/no-eviction", "overlays/monitoring", "overlays/peers")


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_kustomization_has_every_file(folder: str) -> None:
    """Each file is a resource or a patch."""
    kustomization = read(f"{folder}/kustomization.yaml")
    named = {*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))}

    assert {name for name in named if name.endswith(".yaml")} == {
        path.name for path in (FOLDER / folder).iterdir() if path.name != "kustomization.yaml"
    }
    assert all((FOLDER / folder / name).resolve().exists() for name in named)


def test_images_are_those_of_the_kustomization() -> None:
    """One choice of an image is that of all three containers."""
    (image,) = read("base/kustomization.yaml")["images"]

    assert {c["image"] for c in containers().values()} == {f"{image['name']}:{image['newTag']}"}


def test_the_nightly_backup_is_that_of_the_run_and_works(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It mounts the run's volume at the same place, on its node and as its user; its command makes a backup."""
    spec = read("components/backups/backup.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in spec["volumes"]}
    mounts = {claims[each["name"]]: each["mountPath"] for each in container["volumeMounts"]}
    run = containers()["tolaria"]
    (term,) = spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    labels = job()["template"]["metadata"]["labels"]

    assert mounts["tolaria"] in [each["mountPath"] for each in run["volumeMounts"] if each["name"] == "state"]
    assert claims["backups"] == read("components/backups/volume.yaml")["metadata"]["name"]
    assert (container["image"], spec["securityContext"]) == (run["image"], pod_spec()["securityContext"])
    assert (container["securityContext"], container["envFrom"]) == (run["securityContext"], run["envFrom"])
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == labels
    assert read("components/backups/backup.yaml")["metadata"]["labels"] != labels  # else the Service has its pods too

    place = container["args"][container["args"].index("--into") + 1]
    assert place == mounts["tolaria-backups"]
    assert settings.state.dir.startswith(f"{mounts['tolaria']}/")
    unpack(tmp_path)
    monkeypatch.setenv("TOLARIA_STATE__DIR", str(tmp_path / "state"))
    (tmp_path / "backups").mkdir()
    arguments = [str(tmp_path / "backups") if each == place else each for each in container["args"]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "backups").glob("tolaria-*"))) == 1


def built(folder: str) -> dict[str, Any]:
    """Returns what kustomize makes of a folder, by kind and name; skips without kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; only the schema was checked")
    done = subprocess.run([kubectl, "kustomize", FOLDER / folder], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    documents = [document for document in YAML(typ="safe").load_all(done.stdout) if document]
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


RUN = {f"{kind}/tolaria" for kind in ("ConfigMap", "PersistentVolumeClaim", "Job", "Service", "NetworkPolicy")}


def test_kustomize_builds_a_run_alone() -> None:
    """Without targets of peers, which are child processes then."""
    found = built("base")

    assert set(found) == RUN
    assert "initContainers" not in found["Job/tolaria"]["spec"]["template"]["spec"]
    assert not [name for name in found["ConfigMap/tolaria"]["data"] if "TARGET" in name]


def test_kustomize_builds_the_example_with_peers() -> None:
    """The folder itself is the example; what kustomize makes of it is what these tests use."""
    found = built(".")

    assert found == built("overlays/peers")
    assert set(found) == RUN
    assert found["Job/tolaria"]["spec"]["template"]["spec"] == pod_spec()
    assert found["ConfigMap/tolaria"]["data"] == config_map()


def test_kustomize_builds_the_overlay_with_monitoring() -> None:
    """It adds the rules, the dashboards and the monitor to the example, and changes nothing of it."""
    found = built("overlays/monitoring")
    more = {"ServiceMonitor/tolaria", "PrometheusRule/tolaria", "ConfigMap/tolaria-dashboards"}

    assert set(found) == RUN | more
    assert {name: each for name, each in found.items() if name in RUN} == built(".")


def test_written_manifests_are_current() -> None:
    """`python scripts/dashboards` changes nothing: rules and dashboards are those of Prometheus and Grafana."""
    wanted = manifests(texts())

    assert {name: (FOLDER / "overlays" / "monitoring" / name).read_text() for name in wanted} == wanted
    rules = read("overlays/monitoring/prometheus-rule.yaml")["spec"]["groups"]
    assert rules == groups()


def test_monitor_finds_the_service_and_gives_the_names_of_the_rules() -> None:
    """The job is the one that rules expect, and dots become underscores whatever Prometheus stores."""
    service, monitor = read("base/metrics.yaml"), read("overlays/monitoring/service-monitor.yaml")["spec"]
    (endpoint,) = monitor["endpoints"]

    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "tolaria"
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    for family in Metrics().registry.collect():
        name = family.name
        for relabeling in endpoint["metricRelabelings"]:
            assert (relabeling["sourceLabels"], relabeling["targetLabel"]) == (["__name__"], "__name__")
            replacement = re.sub(r"\$\{(\d)\}", r"\\\1", relabeling["replacement"])
            name = re.sub(f"^(?:{relabeling['regex']})$", replacement, name)
        assert name == family.name.replace(".", "_")


def test_budget_protects_the_pod_unless_it_is_not_ready() -> None:
    """It selects the pod of the run, and a halted one may be evicted; no overlay has it by default."""
    budget = read("components/no-eviction/disruption-budget.yaml")["spec"]

    assert budget["selector"]["matchLabels"].items() <= job()["template"]["metadata"]["labels"].items()
    assert (budget["minAvailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    assert not [folder for folder in KUSTOMIZATIONS if "components" in read(f"{folder}/kustomization.yaml")]


def test_selectors_and_names_agree() -> None:
    """Service and policy select the pod, which uses the ConfigMap and the claim that are there."""
    labels = job()["template"]["metadata"]["labels"].items()
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod_spec()["volumes"] if "persistentVolumeClaim" in v]

    assert read("base/metrics.yaml")["spec"]["selector"].items() <= labels
    assert read("base/network-policy.yaml")["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert containers()["tolaria"]["envFrom"] == [
        {"configMapRef": {"name": read("base/settings.yaml")["metadata"]["name"]}}
    ]
    assert claims == [read("base/state.yaml")["metadata"]["name"]]


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
    assert read("base/metrics.yaml")["metadata"]["name"] == "tolaria"
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
    assert [p["targetPort"] for p in read("base/metrics.yaml")["spec"]["ports"]] == ["metrics"]
    assert read("base/network-policy.yaml")["spec"]["ingress"] == [{"ports": [{"port": "metrics", "protocol": "TCP"}]}]
    assert Address.parse(settings.server.listen).is_loopback
    for name, target in (("tamiyo", settings.tamiyo.target), ("kasmina", settings.kasmina.target)):
        assert Address.parse(target).is_loopback
        assert containers()[name]["args"][:3] == ["peer", name, f"--listen={target}"]
        assert containers()[name]["livenessProbe"]["exec"]["command"][-1] == target


def test_prometheus_scrapes_the_service() -> None:
    """The configuration in deploy/prometheus names the Service and its port, ready or not."""
    scraped = YAML(typ="safe").load(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    service = read("base/metrics.yaml")
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
    """Only an admin service that does not serve ends a container, later than the sentinel; a start may take minutes."""
    probes, limits = containers()["tolaria"], settings.emergency
    live, start = probes["livenessProbe"], probes["startupProbe"]

    command = ["python", "-m", "tolaria.probe", settings.server.listen, ADMIN_SERVICE]
    assert live["exec"] == start["exec"] == {"command": command}
    assert live["timeoutSeconds"] > 2 * TIMEOUT_S
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
    readiness = containers()["tolaria"]["readinessProbe"]["httpGet"]["path"]
    return {"readiness": readiness, "metrics": job()["template"]["metadata"]["annotations"]["prometheus.io/path"]}


def asked(pod: Pod) -> dict[str, int]:
    """Returns the status of each path; 0 where nothing answers."""
    address = pod.changed(config_map()["TOLARIA_METRICS__LISTEN"])
    found = {}
    for kind, path in probe_paths().items():
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as response:
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
    seen = Story()
    with ExitStack() as ended:

        def start(name: str) -> Process:
            process = pod.start(name, ENDLESS if name == "tolaria" else None)
            ended.callback(process.kill)
            return process

        peers, tolaria = [start(name) for name in PEERS], start("tolaria")
        seen.first = answers_when(pod, 200)
        os.kill(next(pid for pid, command in tolaria.children().items() if "tolaria.lane" in command), signal.SIGKILL)
        seen.recovering = answers_when(pod, 503) | {"liveness": pod.probe("tolaria")}
        answers_when(pod, 200)
        seen.probes = {name: pod.probe(name) for name in ALL}
        saved = Path(pod.changed(str(history())))
        wait_for(lambda: saved.exists() and "checkpoint_written" in tolaria.events())
        seen.drained = tolaria.stop()
        again = start("tolaria")
        answers_when(pod, 200)
        again.stop()
        seen.resumed = again.events()
        for peer in peers:
            assert peer.stop() == 0
        seen.written = {name: pod.written(name) for name in ALL}
        yield seen


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first test of the story: it takes four starts of the service
def test_probes_are_served(story: Story) -> None:
    """The paths of all probes and of the metrics answer 200 while the run trains."""
    assert story.first == {"readiness": 200, "metrics": 200}


@pytest.mark.slow
def test_recovering_lane_is_alive_and_not_ready(story: Story) -> None:
    """While the lane is started again, only readiness fails."""
    assert story.recovering == {"liveness": 0, "readiness": 503, "metrics": 200}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_liveness_probes_find_what_serves(name: str, story: Story, pod: Pod) -> None:
    """The command succeeds for a container that serves, and fails once it has ended."""
    assert story.probes[name] == 0
    assert pod.probe(name) == 1


@pytest.mark.slow
def test_drained_pod_is_no_finished_run(story: Story) -> None:
    """SIGTERM ends it with the code that the Job does not count as success, and the next pod resumes the run."""
    assert story.drained == int(config_map()["TOLARIA_SERVICE__EXIT_CODE_DRAINED"])
    assert "resumed" in story.resumed


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_writes_go_to_volumes_of_the_container(name: str, story: Story, pod: Pod) -> None:
    """The root file system is read-only: everything written is on a volume that this container has."""
    volumes = [pod.volume(mount["name"]) for mount in containers()[name]["volumeMounts"]]

    assert story.written[name]
    assert [path for path in story.written[name] if not any(path.is_relative_to(v) for v in volumes)] == []


@pytest.mark.slow
def test_volumes_are_written_to(story: Story, pod: Pod) -> None:
    """Tolaria writes its state and the board, and Tamiyo its history."""
    names = {path.relative_to(pod.volume("state")).parts[0] for path in pod.volume("state").rglob("*")}

    assert names == {Path(config_map()["TOLARIA_STATE__DIR"]).name, history().name}
    assert any(path.is_relative_to(pod.volume("shared-memory")) for path in story.written["tolaria"])
