"""Whether a machine may join a group: what it says of itself, and what both sides say to each other afterwards.

All messages are JSON objects with a `kind`, which are validated strictly. Nothing that arrives is executed or imported.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from tolaria import __version__
from tolaria.errors import ChannelError
from tolaria.ranks.replicas import HELD_MAX, ReplicaPoint

LINES_MAX: Final = 20
LINE_CHARACTERS_MAX: Final = 500
STACKS_CHARACTERS_MAX: Final = 20_000
_Text = Annotated[str, Field(max_length=4096)]
_Name = Annotated[str, Field(max_length=255)]
_Line = Annotated[str, Field(max_length=LINE_CHARACTERS_MAX)]
_Number = Annotated[int, Field(ge=0, lt=2**31)]
_Points = Annotated[tuple[ReplicaPoint, ...], Field(max_length=HELD_MAX)]


@dataclass(frozen=True, slots=True)
class Joining:
    """To the service, first: a machine asks to join. `identity` is that of its command, also after a reconnection."""

    identity: _Name
    host: _Name
    processes: Annotated[int, Field(ge=1, le=256)]
    tolaria: _Name
    torch: _Name
    kind: Literal["joining"] = "joining"


@dataclass(frozen=True, slots=True)
class Accepted:
    """To a machine: it may join, if it has this job. `job_digest` is empty if the service cannot compute it."""

    job: _Text
    job_digest: _Name
    timeout_s: Annotated[float, Field(gt=0, le=86_400)]
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, slots=True)
class Refused:
    """To a machine: it may not join."""

    reason: Literal["version", "full"]
    detail: _Text
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True, slots=True)
class Ready:
    """To the service: the machine can start ranks; none of an earlier generation runs."""

    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True)
class StartRanks:
    """To a machine: it is number `node` of `nodes` in a generation of the group, whose store listens there."""

    generation: _Number
    node: _Number
    nodes: _Number
    store_host: _Name
    store_port: Annotated[int, Field(gt=0, lt=2**16)]
    kind: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class StopRanks:
    """To a machine: the group has ended; its ranks have to go. Answered by `Ready`."""

    why: _Text
    kind: Literal["stop"] = "stop"


@dataclass(frozen=True, slots=True)
class RanksEnded:
    """To the service: the ranks of a generation have ended; `code` is as that of `subprocess`, of the first to fail.

    `lines` are the last ones of standard error.
    """

    generation: _Number
    code: Annotated[int, Field(ge=-255, le=255)]
    lines: Annotated[tuple[_Line, ...], Field(max_length=LINES_MAX)]
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True)
class AskStacks:
    """To a machine: send the stacks of each of its ranks."""

    kind: Literal["ask_stacks"] = "ask_stacks"


@dataclass(frozen=True, slots=True)
class RankStacks:
    """To the service: the stacks of one rank, or why there are none."""

    rank: _Number
    stacks: Annotated[str, Field(max_length=STACKS_CHARACTERS_MAX)]
    kind: Literal["stacks"] = "stacks"


@dataclass(frozen=True, slots=True)
class RankSilent:
    """To the service: a rank of the machine gives no heartbeat, and will end."""

    kind: Literal["silent"] = "silent"


@dataclass(frozen=True, slots=True)
class StoreReplica:
    """To a machine: a replica is to be kept. Answered by `ReplicaReady`; then it follows in pieces.

    In all requests about replicas, `request` is a number that rises; what answers them repeats it.
    """

    request: _Number
    point: ReplicaPoint
    kind: Literal["store_replica"] = "store_replica"


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """To the service: there is memory for the replica, which is to follow; or why it is not to."""

    request: _Number
    problem: _Text = ""
    kind: Literal["replica_ready"] = "replica_ready"


@dataclass(frozen=True, slots=True)
class ReplicaStored:
    """To the service: the replica has arrived and is kept; or why it is not."""

    request: _Number
    problem: _Text = ""
    kind: Literal["replica_stored"] = "replica_stored"


@dataclass(frozen=True, slots=True)
class KeepReplicas:
    """To a machine: no other replicas than these are needed."""

    points: _Points
    kind: Literal["keep_replicas"] = "keep_replicas"


@dataclass(frozen=True, slots=True)
class AskReplicas:
    """To a machine: which replicas of the run are there? Answered by `ReplicasHeld`."""

    request: _Number
    run_id: _Name
    kind: Literal["ask_replicas"] = "ask_replicas"


@dataclass(frozen=True, slots=True)
class ReplicasHeld:
    """To the service: these replicas."""

    request: _Number
    points: _Points
    kind: Literal["replicas_held"] = "replicas_held"


@dataclass(frozen=True, slots=True)
class SendReplica:
    """To a machine: send a replica. Answered by `ReplicaFollows`."""

    request: _Number
    digest: _Name
    kind: Literal["send_replica"] = "send_replica"


@dataclass(frozen=True, slots=True)
class ReplicaFollows:
    """To the service: the replica follows, in pieces; of 0 bytes, if it is not there any more."""

    request: _Number
    size_bytes: Annotated[int, Field(ge=0, lt=2**53)]
    kind: Literal["replica_follows"] = "replica_follows"


@dataclass(frozen=True, slots=True)
class Alive:
    """To either side, several times within the silence that is allowed."""

    kind: Literal["alive"] = "alive"


@dataclass(frozen=True, slots=True)
class RunOver:
    """To a machine: the run has ended, and no ranks are needed any more."""

    failed: bool
    detail: _Text
    kind: Literal["over"] = "over"


OfReplicas: TypeAlias = ReplicaReady | ReplicaStored | ReplicasHeld | ReplicaFollows
"""What a machine answers about replicas."""

ToService: TypeAlias = Joining | Ready | RanksEnded | RankStacks | RankSilent | OfReplicas | Alive
_ReplicaOrder: TypeAlias = StoreReplica | KeepReplicas | AskReplicas | SendReplica
ToMachine: TypeAlias = Accepted | Refused | StartRanks | StopRanks | AskStacks | _ReplicaOrder | Alive | RunOver

_TO_SERVICE: Final[TypeAdapter[ToService]] = TypeAdapter(Annotated[ToService, Field(discriminator="kind")])
_TO_MACHINE: Final[TypeAdapter[ToMachine]] = TypeAdapter(Annotated[ToMachine, Field(discriminator="kind")])


def packed(message: ToService | ToMachine) -> bytes:
    """Returns the encoded message."""
    adapter: TypeAdapter[ToService] | TypeAdapter[ToMachine]
    of_machines = Joining | Ready | RanksEnded | RankStacks | RankSilent | OfReplicas
    adapter = _TO_SERVICE if isinstance(message, of_machines) else _TO_MACHINE
    return adapter.dump_json(message)  # type: ignore[arg-type] # of one of the two unions


def for_service(content: bytes) -> ToService:
    """Returns a message to the service. Raises ChannelError for anything else."""
    try:
        return _TO_SERVICE.validate_json(content, strict=True)
    except ValidationError as error:
        raise ChannelError(_problem(error)) from None


def for_machine(content: bytes) -> ToMachine:
    """Returns a message to a machine. Raises ChannelError for anything else."""
    try:
        return _TO_MACHINE.validate_json(content, strict=True)
    except ValidationError as error:
        raise ChannelError(_problem(error)) from None


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"not a message: {'.'.join(map(str, first['loc']))}: {first['msg']}"


@cache
def torch_version() -> str:
    """Returns the version of the installed torch without its build, such as "+cpu"; it is not imported.

    The first call reads files.
    """
    try:
        return version("torch").partition("+")[0]
    except PackageNotFoundError:
        return ""


def version_problem(asked: Joining) -> str:
    """Returns why a machine's versions do not fit those of this one; empty if they do."""
    for name, theirs, ours in (("Tolaria", asked.tolaria, __version__), ("torch", asked.torch, torch_version())):
        if theirs != ours:
            return f"it has {name} {theirs or 'not at all'}, the service {ours}"
    return ""


def job_digest(job: str, folders: Sequence[str] | None = None) -> str:
    """Returns the digest of the file of the job's module; empty if there is no such file on the path.

    Imports nothing. `folders` is where modules are looked for, by default as a rank does.
    """
    source = _job_file(job, [str(Path.cwd()), *sys.path] if folders is None else folders)
    try:
        return "" if source is None else hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError:
        return ""


def _job_file(job: str, folders: Sequence[str]) -> Path | None:
    if ":" not in job:
        known = entry_points(group="tolaria.jobs")
        job = known[job].value if job in known.names else ""
    module = job.partition(":")[0]
    found, path = None, list(folders)
    parts = module.split(".") if module else []
    for number in range(len(parts)):
        found = PathFinder.find_spec(".".join(parts[: number + 1]), path)
        if found is None:
            return None
        path = list(found.submodule_search_locations or ())
    return Path(found.origin) if found is not None and found.has_location and found.origin else None
