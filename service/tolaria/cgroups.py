"""What this process's control group, version 2 or 1, says about it: its share of the processor, and lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_GROUPS: Final = Path("/proc/self/cgroup")


def oom_kills() -> int:
    """Returns how many processes of the group were killed because it had no memory; 0 if that is not known."""
    for text in _read("memory", "memory.events", "memory.oom_control"):
        with suppress(ValueError, IndexError):
            return int(text.partition("oom_kill ")[2].split()[0])
    return 0


def cpu_quota() -> float | None:
    """Returns how many processor cores the group may use at a time, as a fraction; None if that is not limited."""
    for text in _read("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, _, period = text.strip().partition(" ")
        with suppress(ValueError):
            micros = int(period or next(_read("cpu", "", "cpu.cfs_period_us"), "100000"))
            if (share := int(quota)) > 0 and micros > 0:
                return share / micros
    return None


def _read(controller: str, version_2: str, version_1: str) -> Iterator[str]:
    """Yields the contents of a file of this group, by the names that it has in each version."""
    with suppress(OSError):
        for line in _GROUPS.read_text(encoding="utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, named, group = rest.partition(":")
            unified, mine = bool(named) and not controllers, controller in controllers.split(",")
            name = version_2 if unified else version_1
            if not name or not (unified or mine):
                continue
            above = _ROOT if unified else _ROOT / controllers
            # In a container the group may be mounted as the root of its hierarchy.
            for place in (above / group.lstrip("/"), above):
                with suppress(OSError):
                    yield (place / name).read_text(encoding="ascii")
                    break
