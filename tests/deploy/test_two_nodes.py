"""deploy/kubernetes/two-nodes: a JobSet, whose jobs are checked as such, and its commands as processes."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support.pods import containers_of, free_port, variables_of
from support.processes import python_path
from tolaria.config import Address, Settings, load_settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
SECRET_FILE = "/etc/tolaria/secret"


@cache
def read(name: str) -> Any:
    """Returns a file with aliases resolved."""
    return YAML(typ="safe").load(FOLDER / name)


def job_of(name: str) -> Any:
    """The specification of a replicated job."""
    (found,) = (job for job in read("two-nodes/jobset.yaml")["spec"]["replicatedJobs"] if job["name"] == name)
    return found["template"]["spec"]


def pod_of(name: str) -> Any:
    """The specification of its pod."""
    return job_of(name)["template"]["spec"]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """What the service reads in its container."""
    monkeypatch.chdir(tmp_path)
    config_map = read("base/settings.yaml")["data"]
    for name, value in variables_of(containers_of(pod_of("service"))["tolaria"], config_map).items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_jobs_are_valid_by_the_schema_of_kubernetes(tmp_path: Path) -> None:
    """Each template is a Job's; the schema of JobSet is not among those that are installed, so its keys are listed."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed; pyproject.toml lists it")
    jobset = read("two-nodes/jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"network", "successPolicy", "failurePolicy", "replicatedJobs"}
    files = [FOLDER / "two-nodes" / "network-policy.yaml"]
    for job in jobset["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        files.append(tmp_path / f"{job['name']}.yaml")
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        files[-1].write_text(json.dumps(whole))  # which is YAML, in which 1:2 stays a text
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "kubernetes_validate",
        "--strict",
        "--kubernetes-version",
        "1.29.0",
        *files,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kustomization_has_every_file() -> None:
    """Each file is a resource, and the images are those of the pods."""
    kustomization = read("two-nodes/kustomization.yaml")
    names = {path.name for path in (FOLDER / "two-nodes").iterdir()}
    assert {*kustomization["resources"], "kustomization.yaml"} == names
    (image,) = kustomization["images"]
    used = {c["image"] for name in ("service", "node") for c in containers_of(pod_of(name)).values()}
    assert used == {f"{image['name']}:{image['newTag']}"}


def test_files_that_are_named_exist() -> None:
    """Each file and folder that comments and commands name is there, from this folder or from that of the command."""
    for path in (FOLDER / "two-nodes").iterdir():
        text = path.read_text(encoding="utf-8")
        roots = [FOLDER / "two-nodes", FOLDER.parents[1]]
        roots += [FOLDER.parents[1] / found for found in re.findall(r"\(cd (\S+)", text)]
        for name in re.findall(r"[\w./-]+\.yaml\b|deploy/[\w/-]+", text):
            assert any((root / name).exists() for root in roots), f"{path.name} names {name}"


def test_the_service_is_that_of_the_job_but_for_the_group() -> None:
    """Everything that the Job and its peers have to be is the same here: policies, probes, sidecars, volumes."""
    alone, here = copy.deepcopy(read("base/job.yaml")["spec"]), copy.deepcopy(job_of("service"))
    alone["template"]["spec"] |= read("overlays/peers/peers.yaml")["spec"]["template"]["spec"]
    assert (here.pop("parallelism"), here.pop("completions")) == (1, 1)
    assert here["template"]["metadata"]["labels"].pop("app.kubernetes.io/component") == "service"
    pod = here["template"]["spec"]
    container = containers_of(pod)["tolaria"]
    targets = read("overlays/peers/settings.yaml")["data"]
    assert {each["name"]: each["value"] for each in container["env"] if each["name"] in targets} == targets
    container["env"] = [
        each
        for each in container["env"]
        if each["name"] not in targets and not each["name"].startswith("TOLARIA_LANE__")
    ]
    container["ports"] = [each for each in container["ports"] if each["name"] != "rendezvous"]
    for part in (container["volumeMounts"], pod["volumes"]):
        assert part.pop()["name"] == "ranks-secret"
    assert here == alone


def test_the_other_machine_finds_the_service_and_has_its_secret(settings: Settings) -> None:
    """By the name that a JobSet gives the pod; the group waits for no machine, and takes it in when it comes."""
    jobset = read("two-nodes/jobset.yaml")
    arguments = dict(each.partition("=")[::2] for each in containers_of(pod_of("node"))["node"]["args"][2:])
    here, there = Address.parse(settings.lane.rendezvous), Address.parse(arguments["--rendezvous"])
    assert there.host == f"{jobset['metadata']['name']}-service-0-0.{jobset['spec']['network']['subdomain']}"
    assert jobset["spec"]["network"]["publishNotReadyAddresses"] is True
    ports = {port["name"]: port["containerPort"] for port in containers_of(pod_of("service"))["tolaria"]["ports"]}
    assert here.port == there.port == ports["rendezvous"]
    assert (settings.lane.mode, settings.lane.nodes, settings.lane.grow) == ("torchrun", "1:2", "epoch")
    assert settings.lane.secret_file == arguments["--secret-file"] == SECRET_FILE
    for name, container in (("service", "tolaria"), ("node", "node")):
        (volume,) = (v for v in pod_of(name)["volumes"] if v["name"] == "ranks-secret")
        assert volume["secret"] == {"secretName": "tolaria-ranks", "defaultMode": 0o440}
        mounts = containers_of(pod_of(name))[container]["volumeMounts"]
        assert {"name": "ranks-secret", "mountPath": "/etc/tolaria", "readOnly": True} in mounts


def test_only_the_pods_of_the_run_reach_the_ranks() -> None:
    """The policy selects both pods, and nothing else may connect but to the metrics."""
    policy = read("two-nodes/network-policy.yaml")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    for name in ("service", "node"):
        assert selector.items() <= job_of(name)["template"]["metadata"]["labels"].items()
    assert policy["ingress"] == [
        {"from": [{"podSelector": {"matchLabels": selector}}]},
        {"ports": [{"port": "metrics", "protocol": "TCP"}]},
    ]


def test_a_machine_that_joins_is_hardened_and_never_ends_the_run() -> None:
    """It is started again on failure; the run's end is that of the service's job."""
    pod, jobset = pod_of("node"), read("two-nodes/jobset.yaml")["spec"]
    assert jobset["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["service"]}
    assert pod["restartPolicy"] == "OnFailure"
    assert job_of("node")["backoffLimit"] >= 1000
    assert (
        containers_of(pod)["node"]["securityContext"] == containers_of(pod_of("service"))["tolaria"]["securityContext"]
    )
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not [each for each in containers_of(pod)["node"].get("env", []) if "SECRET" in each["name"]]


def test_the_command_of_the_other_machine_runs(tmp_path: Path) -> None:
    """It takes its options, reads the secret, and waits for the service, here for no time."""
    (tmp_path / "secret").write_text("0123456789abcdef")
    replaced = {
        SECRET_FILE: str(tmp_path / "secret"),
        "tolaria-service-0-0.tolaria-ranks:29400": f"127.0.0.1:{free_port()}",
    }
    arguments = list(containers_of(pod_of("node"))["node"]["args"])
    for old, new in replaced.items():
        arguments = [each.replace(old, new) for each in arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOLARIA_")}
    done = subprocess.run(
        [sys.executable, "-m", "tolaria", *arguments, "--wait=0"],
        check=False, capture_output=True, text=True, cwd=tmp_path, timeout=180,
        env=environment | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert (done.returncode, "no service at 127.0.0.1" in done.stderr) == (3, True), done.stderr
