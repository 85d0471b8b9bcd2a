"""The journal's rows: one frozen dataclass per table, and the schema derived from them.

Times are wall-clock nanoseconds since 1970. Each row is stored with its own digest, since SQLite does not detect a
flipped bit in a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from types import MappingProxyType
from typing import ClassVar, Final, Literal, TypeAlias

import xxhash

from tolaria.values.lineage import FIRST_ATTEMPT, Lineage

SCHEMA_VERSION: Final = 4
"""Version of the whole state directory: a change of the format of any file in it raises this number."""

Scalar: TypeAlias = "str | int | float | bytes | None"

CheckpointState: TypeAlias = Literal["committed", "superseded", "pruned", "quarantined", "missing"]
"""Only `committed` is resumed from. `superseded`: not an ancestor of the live state, because of a rollback; it is kept
for a while, so that the rollback can be undone. `pruned`: removed by retention."""


@dataclass(frozen=True, slots=True)
class Row:
    """Base class of all rows. The first field of each is its key."""

    table: ClassVar[str]


@dataclass(frozen=True, slots=True)
class RunRow(Row):
    """A run of the service. `resumed_from` is a checkpoint id; `outcome` is empty while the run lasts.

    `scale` holds, as JSON, the baselines of the health checks, which a rollback must not reset.
    """

    table: ClassVar[str] = "runs"
    run_id: str
    at_ns: int
    job: str
    resumed_from: str | None = None
    ended_at_ns: int | None = None
    outcome: str = ""
    scale: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointRow(Row):
    """A durable checkpoint, past or present. `detail` explains its state, if needed.

    `attempt` and `forks` are its lineage, `parent` the newest checkpoint among its ancestors. `suspect`: captured while
    the loss was rising; `proven`: sound losses followed. Both are 1 or 0. Times of rows of version 0.1.0 are None.
    """

    table: ClassVar[str] = "checkpoints"
    checkpoint_id: str
    at_ns: int
    run_id: str
    global_step: int
    epoch: int
    size_bytes: int
    digest: str
    metric: float | None
    state: CheckpointState = "committed"
    detail: str = ""
    attempt: int = FIRST_ATTEMPT
    forks: str = ""
    parent: str = ""
    suspect: int = 0
    proven: int = 0
    superseded_at_ns: int | None = None

    @property
    def lineage(self) -> Lineage:
        """The ancestors of the checkpoint."""
        return Lineage.of(self.attempt, self.forks)

    @property
    def doubtful(self) -> bool:
        """Whether the checkpoint is suspect and nothing has proven it since."""
        return bool(self.suspect and not self.proven)


DATA_SKIPS: Final = "data_skips"
"""Kind of a row of the commands whose `reason` has the data that operators have left out, as JSON."""

ADJUSTMENTS: Final = "learning_rates"
"""Kind of the one row of a run whose `reason` has the adjustments of learning rates in force, as JSON."""

BRANCH: Final = "branch"
"""Kind of the row whose `reason` says, as JSON, where a run has branched off."""

SCHEDULED: Final = "learning_rate_scheduled"
"""Kind of a row whose `reason` has, as JSON, the rates that the job's schedule has changed after an evaluation, and
why."""

STOPPED_EARLY: Final = "stopped_early"
"""Kind of a row whose `reason` says why early stopping ends the run at its `global_step`."""

LOCAL_KINDS: Final = frozenset({DATA_SKIPS, ADJUSTMENTS, BRANCH, SCHEDULED, STOPPED_EARLY})
"""Kinds of rows in the table of commands that are the service's own, and no command of the controller."""


@dataclass(frozen=True, slots=True)
class CommandRow(Row):
    """A command from Tamiyo, or a row of one of `LOCAL_KINDS`, and the step at which it took effect.

    `outcome` is applied or rejected.
    """

    table: ClassVar[str] = "commands"
    command_id: str
    at_ns: int
    run_id: str
    kind: str
    global_step: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class RollbackRow(Row):
    """A rollback. `outcome` is restored, failed, aborted or deadline_exceeded; `restored_step` is -1 unless restored.

    `coordinated` is 1 if a quorum took part, else 0. `origin` is operator, health, tamiyo or emergency; `attempt` the
    one that training continued with, `waited_ms` the time until the step boundary; `chosen` names the restore point.
    """

    table: ClassVar[str] = "rollbacks"
    rollback_id: str
    at_ns: int
    run_id: str
    tier: str
    global_step: int
    restored_step: int
    outcome: str
    reason: str
    state_digest: str
    expected_digest: str
    latency_ms: float
    coordinated: int
    origin: str = ""
    attempt: int = 0
    checkpoint_id: str = ""
    waited_ms: float = 0.0
    chosen: str = ""


@dataclass(frozen=True, slots=True)
class EmergencyRow(Row):
    """An emergency, and when it was cleared."""

    table: ClassVar[str] = "emergencies"
    emergency_id: str
    at_ns: int
    run_id: str
    level: str
    origin: str
    global_step: int
    reason: str
    cleared_at_ns: int | None = None


@dataclass(frozen=True, slots=True)
class AdminActionRow(Row):
    """An operator's request and its response. `answer` is the serialized response message."""

    table: ClassVar[str] = "admin_actions"
    request_id: str
    at_ns: int
    run_id: str
    method: str
    reason: str
    global_step: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class AdminCallRow(Row):
    """A call that could change something: who made it, from where, when and why, and how it ended.

    `caller` is the name of the token, and that of the client's certificate; `role` is that of the token. `outcome` is
    the name of the gRPC status; empty while the call lasts, and if the service ended before it. A caller's first
    repeat of a request has a row too. `at_ns` is the time of the call.
    """

    table: ClassVar[str] = "admin_calls"
    call_id: str
    at_ns: int
    run_id: str
    method: str
    request_id: str
    caller: str
    role: str
    peer: str
    reason: str
    global_step: int
    outcome: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FaultRow(Row):
    """A storage fault: a checkpoint that was not written or is damaged, a rebuilt journal."""

    table: ClassVar[str] = "faults"
    fault_id: str
    at_ns: int
    run_id: str
    kind: str
    global_step: int
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class VersionRow(Row):
    """A version of Tolaria that has opened the state directory for writing after another one, or changed its schema.

    `schema_from` is 0 when the journal was created. `backup` names the copy that was taken before, in `backups`.
    Later versions keep the column `tolaria`: versions that cannot read their journals name the one that can.
    """

    table: ClassVar[str] = "versions"
    version_id: str
    at_ns: int
    tolaria: str
    schema_from: int
    schema_to: int
    backup: str = ""


@dataclass(frozen=True, slots=True)
class Incident:
    """A row of the incidents view, whose columns these are: a rollback, an emergency or a fault."""

    incident_id: str
    kind: str
    at_ns: int
    global_step: int
    reason: str
    details: Mapping[str, str]


ROW_TYPES: Final = (
    RunRow,
    CheckpointRow,
    CommandRow,
    RollbackRow,
    EmergencyRow,
    AdminActionRow,
    FaultRow,
    AdminCallRow,
    VersionRow,
)

_SQL_TYPES: Final = MappingProxyType(
    {"int": "INTEGER", "float": "REAL", "bytes": "BLOB", "str": "TEXT", "CheckpointState": "TEXT"}
)

_META: Final = "CREATE TABLE meta (schema_version INTEGER NOT NULL, row_digest TEXT NOT NULL)"

_COLUMNS_SINCE: Final[Mapping[int, Mapping[str, tuple[str, ...]]]] = MappingProxyType(
    {
        2: {
            "checkpoints": ("attempt", "forks", "parent", "suspect", "proven", "superseded_at_ns"),
            "rollbacks": ("origin", "attempt", "checkpoint_id", "waited_ms", "chosen"),
        },
    }
)
"""Columns by the schema that added them; their fields have defaults. Schema 1 is that of version 0.1.0."""

_TABLES_SINCE: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType({3: ("admin_calls",), 4: ("versions",)})
"""Tables by the schema that added them."""

_ROLLBACK_DETAILS: Final = "\n    'origin', origin, 'waited_ms', CAST(waited_ms AS TEXT), 'chosen', chosen,"
_ROLLBACK_DETAILS_SINCE: Final = 2

_INCIDENTS_VIEW: Final = """CREATE VIEW incidents AS
SELECT rollback_id AS incident_id, 'rollback' AS kind, at_ns, global_step, reason,
  json_object('tier', tier, 'outcome', outcome, 'restored_step', CAST(restored_step AS TEXT),%s
    'latency_ms', CAST(latency_ms AS TEXT), 'state_digest', state_digest, 'expected_digest', expected_digest,
    'coordinated', CAST(coordinated AS TEXT)) AS details FROM rollbacks
UNION ALL SELECT emergency_id, 'emergency', at_ns, global_step, reason,
  json_object('level', level, 'origin', origin, 'cleared', CASE WHEN cleared_at_ns IS NULL THEN 'no' ELSE 'yes' END)
  FROM emergencies
UNION ALL SELECT fault_id, kind, at_ns, global_step, reason, json_object('stage', stage) FROM faults"""


def columns(kind: type[Row | Incident], version: int = SCHEMA_VERSION) -> tuple[str, ...]:
    """Returns the names of a row type's columns in a journal of this schema version. The first is the key."""
    names = tuple(field.name for field in fields(kind))
    if not issubclass(kind, Row):
        return names
    later = {name for since, added in _COLUMNS_SINCE.items() if since > version for name in added.get(kind.table, ())}
    return tuple(name for name in names if name not in later)


def row_types(version: int = SCHEMA_VERSION) -> tuple[type[Row], ...]:
    """Returns the row types whose tables a journal of this schema version has."""
    later = {table for since, added in _TABLES_SINCE.items() if since > version for table in added}
    return tuple(kind for kind in ROW_TYPES if kind.table not in later)


def schema(version: int = SCHEMA_VERSION) -> list[str]:
    """Returns the statements that create all tables and the view."""
    tables = [_create_table(kind, columns(kind, version)) for kind in row_types(version)]
    details = _ROLLBACK_DETAILS if version >= _ROLLBACK_DETAILS_SINCE else ""
    return [_META, *tables, _INCIDENTS_VIEW % details]


def stored_values(row: Row, version: int = SCHEMA_VERSION) -> tuple[Scalar, ...]:
    """Returns the row's values as SQLite stores them in a journal of this schema version, followed by its digest.

    Raises:
        ValueError: a number is not finite.
    """
    known = columns(type(row), version)
    named = [(field, value) for field, value in zip(fields(row), astuple(row), strict=True) if field.name in known]
    values = tuple(_stored(f"{row.table}.{field.name}", str(field.type), value) for field, value in named)
    return (*values, values_digest(row.table, values))


def values_digest(table: str, values: tuple[Scalar, ...]) -> str:
    """Returns the digest of a row with these values."""
    plain = [["b", v.hex()] if isinstance(v, bytes) else v for v in values]
    return xxhash.xxh3_128_hexdigest(json.dumps([table, plain]).encode())


def _create_table(kind: type[Row], names: tuple[str, ...]) -> str:
    typed = []
    for field in (field for field in fields(kind) if field.name in names):
        scalar, optional, _ = str(field.type).partition(" | None")
        typed.append(f"{field.name} {_SQL_TYPES[scalar]}{'' if optional else ' NOT NULL'}")
    typed[0] += " PRIMARY KEY"
    return f"CREATE TABLE {kind.table} ({', '.join(typed)}, row_digest TEXT NOT NULL)"


def _stored(name: str, kind: str, value: Scalar) -> Scalar:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case int() | float():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            return float(value) if kind.startswith("float") else int(value)
        case _:
            return value
