"""What the journal holds, row by row: one frozen dataclass for each table. Owns the schema; knows no SQL connection.

Times are wall-clock nanoseconds since 1970. Every row is kept with a digest of itself, since SQLite does not notice a
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

SCHEMA_VERSION: Final = 1

Scalar: TypeAlias = "str | int | float | bytes | None"

CheckpointState: TypeAlias = Literal["committed", "superseded", "pruned", "quarantined", "missing"]
"""Only `committed` is resumed from. `superseded`: a rollback went behind it. `pruned`: retention removed it."""


@dataclass(frozen=True, slots=True)
class Row:
    """Base of all; the first field of each is its key."""

    table: ClassVar[str]


@dataclass(frozen=True, slots=True)
class RunRow(Row):
    """One run of the service. `resumed_from` is a checkpoint's id; `outcome` is empty while it lasts.

    `scale` is what its health is measured against, as JSON: more than its state, which a rollback turns back.
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
    """One durable checkpoint, ever. `detail` says why its state is what it is, if that needs saying."""

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


@dataclass(frozen=True, slots=True)
class CommandRow(Row):
    """A command of Tamiyo's, and at which step it took effect; `outcome` is applied or rejected."""

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
    """One rollback. `outcome`: restored, failed, aborted or deadline_exceeded; `restored_step`: -1 unless restored.

    `coordinated` is 1 when a quorum took part, 0 otherwise.
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


@dataclass(frozen=True, slots=True)
class EmergencyRow(Row):
    """One emergency raised, and when it was cleared."""

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
    """An operator's request and the answer that it got; `answer` is the response message, serialized."""

    table: ClassVar[str] = "admin_actions"
    request_id: str
    at_ns: int
    run_id: str
    method: str
    reason: str
    global_step: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class FaultRow(Row):
    """Something that went wrong with storage itself: a checkpoint not written or damaged, a journal rebuilt."""

    table: ClassVar[str] = "faults"
    fault_id: str
    at_ns: int
    run_id: str
    kind: str
    global_step: int
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Incident:
    """One line of the incidents view: a rollback, an emergency or a fault."""

    incident_id: str
    kind: str
    at_ns: int
    global_step: int
    reason: str
    details: Mapping[str, str]


ROW_TYPES: Final[tuple[type[Row], ...]] = (
    RunRow,
    CheckpointRow,
    CommandRow,
    RollbackRow,
    EmergencyRow,
    AdminActionRow,
    FaultRow,
)

_SQL_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "int": "INTEGER NOT NULL",
        "int | None": "INTEGER",
        "float": "REAL NOT NULL",
        "float | None": "REAL",
        "bytes": "BLOB NOT NULL",
        "str": "TEXT NOT NULL",
        "str | None": "TEXT",
        "CheckpointState": "TEXT NOT NULL",
    }
)

INCIDENTS_VIEW: Final = """CREATE VIEW incidents AS
SELECT rollback_id AS incident_id, 'rollback' AS kind, at_ns, global_step, reason,
  json_object('tier', tier, 'outcome', outcome, 'restored_step', CAST(restored_step AS TEXT),
    'latency_ms', CAST(latency_ms AS TEXT), 'state_digest', state_digest, 'expected_digest', expected_digest,
    'coordinated', CAST(coordinated AS TEXT)) AS details FROM rollbacks
UNION ALL SELECT emergency_id, 'emergency', at_ns, global_step, reason,
  json_object('level', level, 'origin', origin, 'cleared', CASE WHEN cleared_at_ns IS NULL THEN 'no' ELSE 'yes' END)
  FROM emergencies
UNION ALL SELECT fault_id, kind, at_ns, global_step, reason, json_object('stage', stage) FROM faults"""


def columns(kind: type[Row]) -> tuple[str, ...]:
    """The fields' names, in order; the first is the key."""
    return tuple(field.name for field in fields(kind))


def create_table(kind: type[Row]) -> str:
    """The statement that makes the table of these rows."""
    typed = [f"{field.name} {_SQL_TYPES[str(field.type)]}" for field in fields(kind)]
    typed[0] += " PRIMARY KEY"
    return f"CREATE TABLE {kind.table} ({', '.join(typed)}, row_digest TEXT NOT NULL)"


def stored_values(row: Row) -> tuple[Scalar, ...]:
    """The row's values as SQLite gives them back, and last the row's digest.

    Raises:
        ValueError: for a number that is not finite.
    """
    named = zip(fields(row), astuple(row), strict=True)
    values = tuple(_stored(f"{row.table}.{field.name}", str(field.type), value) for field, value in named)
    return (*values, values_digest(row.table, values))


def values_digest(table: str, values: tuple[Scalar, ...]) -> str:
    """The digest that a row of these values must have."""
    plain = [["b", v.hex()] if isinstance(v, bytes) else v for v in values]
    return xxhash.xxh3_128_hexdigest(json.dumps([table, plain]).encode())


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
