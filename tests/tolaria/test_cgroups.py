from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tolaria import cgroups


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups in place of the system's; the process is in none."""
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "_MEMORY", tmp_path / "meminfo")
    return tmp_path


def put(root: Path, groups: str, files: Mapping[str, str]) -> None:
    """Writes /proc/self/cgroup, and files by their paths."""
    (root / "cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_control_groups_nothing_is_known(root: Path) -> None:
    """As on other systems."""
    assert (cgroups.oom_kills(), cgroups.cpu_quota()) == (0, None)
    put(root, "0::/\nnonsense", {})
    assert (cgroups.oom_kills(), cgroups.cpu_quota()) == (0, None)


@pytest.mark.parametrize("place", ["pod/a/", ""])
def test_version_2(root: Path, place: str) -> None:
    """Whether the group is seen under its path or, in a container, as the root."""
    files = {"memory.events": "low 0\noom 3\noom_kill 2\n", "cpu.max": "150000 100000\n"}
    put(root, "0::/pod/a\n", {place + name: text for name, text in files.items()})
    assert (cgroups.oom_kills(), cgroups.cpu_quota()) == (2, 1.5)


def test_version_1(root: Path) -> None:
    """The controllers have separate trees, and the second line of the quota a separate file."""
    files = {
        "memory/m/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
        "cpu,cpuacct/c/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
    }
    put(root, "4:memory:/m\n3:cpu,cpuacct:/c\n0::/\n", files)
    assert (cgroups.oom_kills(), cgroups.cpu_quota()) == (5, 0.5)


@pytest.mark.parametrize(("groups", "name", "text"), [
    ("0::/\n", "cpu.max", "max 100000\n"),
    ("3:cpu:/\n", "cpu/cpu.cfs_quota_us", "-1\n"),
    ("0::/\n", "cpu.max", "nonsense\n"),
])  # fmt: skip
def test_no_limit(root: Path, groups: str, name: str, text: str) -> None:
    """As the system writes it, or something unknown."""
    put(root, groups, {name: text})
    assert cgroups.cpu_quota() is None


MEMORY_2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 150\n"}
MEMORY_1 = {
    "memory/m/memory.limit_in_bytes": "1000\n",
    "memory/m/memory.usage_in_bytes": "700\n",
    "memory/m/memory.stat": "inactive_file 1\ntotal_inactive_file 150\n",
}


@pytest.mark.parametrize(("groups", "files", "meminfo", "expected"), [
    ("", {}, "", None),
    ("0::/\n", MEMORY_2, "", 450),
    ("4:memory:/m\n0::/\n", MEMORY_1, "", 450),
    ("0::/\n", MEMORY_2, "MemTotal: 9 kB\nMemAvailable: 1 kB\n", 450),
    ("0::/\n", {**MEMORY_2, "memory.max": "max\n"}, "MemAvailable: 3 kB\n", 3072),
    ("0::/\n", {**MEMORY_2, "memory.current": "1700\n"}, "MemAvailable: 3 kB\n", 0),
    ("0::/\n", {}, "nonsense", None),
])  # fmt: skip
def test_the_memory_that_is_left(
    root: Path, groups: str, files: Mapping[str, str], meminfo: str, expected: int | None
) -> None:
    """The least of what the system and the group have; page cache counts as left."""
    put(root, groups, files)
    (root / "meminfo").write_text(meminfo)
    assert cgroups.memory_left() == expected
