"""Two hosts on one machine: network namespaces with a switch between them, whose link can be cut without a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NETWORK = "10.231.7"


@dataclass
class Host:
    """A network namespace with one address, and a host name."""

    name: str
    namespace: str
    address: str
    port: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], cwd: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
        """Starts a program there; both outputs go to a file."""
        inside = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *inside],
                stdout=output, stderr=output, cwd=cwd, env=environment, text=True,
            )  # fmt: skip
        self.processes.append(process)
        return process


@dataclass
class Hosts:
    """Both hosts, and the switch between them."""

    first: Host
    second: Host
    switch: str

    def cut(self) -> None:
        """Drops everything that is sent between them; both links stay up."""
        ip("-n", self.switch, "link", "set", self.second.port, "nomaster")

    def mend(self) -> None:
        """Ends the cut."""
        ip("-n", self.switch, "link", "set", self.second.port, "master", "switch0")


def ip(*arguments: str) -> None:
    """Runs the program of this name."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def require_hosts() -> None:
    """Skips a test where namespaces cannot be made. In CI a missing program fails it; a missing privilege skips it."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        missing = "ip or unshare is missing: Debian's packages iproute2 and util-linux have them"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    if problem := _why_no_hosts():
        pytest.skip(problem)


def _why_no_hosts() -> str:
    """Returns why this machine cannot make namespaces; empty if it can."""
    name = f"tolaria-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made: {tried.stderr.strip()}"
    try:
        ip("-n", name, "link", "add", "switch0", "type", "bridge")
        ip("-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    except subprocess.CalledProcessError as error:
        return f"bridges or veth pairs cannot be made: {error.stderr.strip()}"
    finally:
        ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes both hosts; ends what runs there, and removes them."""
    names = [f"tolaria-{os.getpid()}-{part}" for part in ("a", "b", "switch")]
    hosts = [Host(f"host-{part}", names[n], f"{NETWORK}.{n + 1}", f"port{n}") for n, part in enumerate("ab")]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[2], "link", "add", "switch0", "type", "bridge")
        ip("-n", names[2], "link", "set", "switch0", "up")
        for host in hosts:
            ip(
                "link",
                "add",
                "link0",
                "netns",
                host.namespace,
                "type",
                "veth",
                "peer",
                "name",
                host.port,
                "netns",
                names[2],
            )
            ip("-n", names[2], "link", "set", host.port, "master", "switch0")
            ip("-n", names[2], "link", "set", host.port, "up")
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "link0")
            ip("-n", host.namespace, "link", "set", "link0", "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
        yield Hosts(hosts[0], hosts[1], names[2])
    finally:
        for process in [process for host in hosts for process in host.processes]:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
