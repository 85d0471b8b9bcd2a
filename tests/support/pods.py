"""The containers of a pod as processes: their commands, variables and volumes, and what they write."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from support.processes import python_path

_RECORDER = """
import os, sys

_file = os.open(os.environ["WRITES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def _record(event, arguments):
    if event == "open":
        path, writes = arguments[0], arguments[2] & _writing
    elif event in {"os.mkdir", "os.remove", "os.truncate", "sqlite3.connect"}:
        path, writes = arguments[0], True
    elif event in {"os.rename", "os.link", "os.symlink"}:
        path, writes = arguments[1], True
    else:
        return
    if writes and isinstance(path, (str, bytes, os.PathLike)):
        os.write(_file, os.fsencode(os.path.abspath(os.fspath(path))) + b"\\n")

sys.addaudithook(_record)
"""


class Pod:
    """A pod whose volumes are directories, and whose addresses have free ports.

    Attributes:
        spec: the pod's specification.
        changes: text in arguments and variables, and what replaces it.
    """

    def __init__(self, spec: Mapping[str, Any], settings: Mapping[str, str], directory: Path) -> None:
        self.spec, self._settings, self._directory = spec, settings, directory
        self.changes = {f"{host}:{port}": f"127.0.0.1:{free_port()}" for host, port in _addresses(spec, settings)}
        for container in containers_of(spec).values():
            for mount in container["volumeMounts"]:
                self.changes[mount["mountPath"]] = str(self.volume(mount["name"]))
        (directory / "recorder").mkdir()
        (directory / "recorder" / "sitecustomize.py").write_text(_RECORDER)

    def volume(self, name: str) -> Path:
        """The directory that takes the place of a volume."""
        path = self._directory / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def start(self, name: str, more: Mapping[str, str] | None = None) -> Process:
        """Starts a container with its command and variables, and `more` variables."""
        container = containers_of(self.spec)[name]
        variables = variables_of(container, self._settings) | dict(more or {})
        return self._run([sys.executable, "-m", "tolaria", *container["args"]], name, variables)

    def probe(self, name: str) -> int:
        """Returns the exit code of the command of a container's liveness probe."""
        python, *arguments = containers_of(self.spec)[name]["livenessProbe"]["exec"]["command"]
        assert python == "python"
        return self._run([sys.executable, *arguments], name, {}).wait()

    def written(self, name: str) -> set[Path]:
        """Everything that a container's Python code has opened to write, made, renamed or removed."""
        paths = {Path(line) for line in self._writes(name).read_text().splitlines()}
        return {path for path in paths if path != Path(os.devnull) and not path.is_relative_to("/proc")}

    def changed(self, text: str) -> str:
        """Returns a text of the manifest with the pod's directories and ports in it."""
        olds = sorted(self.changes, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, olds)), lambda found: self.changes[found[0]], text)

    def _run(self, command: Iterable[str], name: str, variables: Mapping[str, str]) -> Process:
        # torch sets its own variables, such as the directory of its compiler's cache, in the process of the tests.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TOLARIA_", "TORCH"))}
        inside = {
            "PYTHONPATH": os.pathsep.join([str(self._directory / "recorder"), python_path()]),
            "PYTHONDONTWRITEBYTECODE": "1",  # the image's root file system is read-only
            "TMPDIR": self.changed("/tmp"),  # noqa: S108 - a path inside a container
            "WRITES": str(self._writes(name)),
        }
        environment = kept | inside | {key: self.changed(value) for key, value in variables.items()}
        home = Path(self.changed("/var/lib/tolaria"))  # the image's working directory
        return Process([self.changed(word) for word in command], environment, home)

    def _writes(self, name: str) -> Path:
        return self._directory / f"{name}.writes"


class Process:
    """The process of a container, whose log is read continuously."""

    def __init__(self, command: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self.process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self.lines.extend(line.rstrip() for line in stream)

    def events(self) -> list[str]:
        """The names of the events that it has logged."""
        return [json.loads(line)["event"] for line in list(self.lines) if line.startswith("{")]

    def children(self) -> dict[int, str]:
        """The command lines of its child processes, by id."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {int(child): Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in children}

    def stop(self) -> int:
        """Sends SIGTERM, as the end of a pod does; returns the exit code."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        code = self.process.wait(60)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """Ends it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def containers_of(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the containers of a pod by name, sidecars first."""
    return {container["name"]: container for container in [*spec.get("initContainers", []), *spec["containers"]]}


def variables_of(container: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that a container gets where no optional secret exists; `settings` is its ConfigMap."""
    variables = dict(settings) if "envFrom" in container else {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "resourceFieldRef" in source:
            kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
            variables[entry["name"]] = container["resources"][kind][resource]
        elif "secretKeyRef" not in source:
            variables[entry["name"]] = entry["value"]
    return variables


def free_port() -> int:
    """Returns a port of loopback that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _addresses(spec: Mapping[str, Any], settings: Mapping[str, str]) -> set[tuple[str, str]]:
    """Every address of IPv4 in arguments, probes and settings."""
    words = [word for container in containers_of(spec).values() for word in container.get("args", [])]
    found = [word.rpartition("=")[2].rpartition(":") for word in [*words, *settings.values()]]
    return {(host, port) for host, colon, port in found if colon and port.isdigit() and host.count(".") == 3}
