"""What this process's control group, version 2 or 1, says about it: its share of the processor, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_GROUPS: Final = Path("/proc/self/cgroup")
_MEMORY: Final = Path("/proc/meminfo")


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


def kills_together() -> bool:
    """Whether all processes of the group are killed when it has no memory, as by Kubernetes, and not one of them."""
    return next(_read("memory", "memory.oom.group", ""), "").strip() == "1"


def memory_left() -> int | None:
    """Returns how many bytes can still be allocated before the system or the group has none; None if neither says so.

    Page cache counts as left. Limits of groups above this one are not looked at: a container does not see them.
    """
    left = list[int]()
    with suppress(OSError, ValueError, KeyError):
        left.append(1024 * _fields(_MEMORY.read_text(encoding="ascii"))["MemAvailable:"])
    with suppress(ValueError, KeyError, StopIteration):  # such as the text "max" without a limit
        limit = int(next(_read("memory", "memory.max", "memory.limit_in_bytes")))
        used = int(next(_read("memory", "memory.current", "memory.usage_in_bytes")))
        stat = _fields(next(_read("memory", "memory.stat", "memory.stat"), ""))
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        left.append(max(0, limit - used + cache))
    return min(left, default=None)


def _fields(text: str) -> dict[str, int]:
    """Returns numbers by name, of lines that begin with both."""
    words = (line.split() for line in text.splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1}


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
