"""Restore points and incidents as rows of a table. Owns their wording; must not know how a table is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1.admin_service_pb2 import Incident, RestorePoint
from tolaria.cli.words import duration, one_line, size, tier_word

RESTORE_POINT_COLUMNS = ("tier", "step", "epoch", "age", "size", "digest", "id", "stable")
INCIDENT_COLUMNS = ("time (UTC)", "kind", "step", "reason")

_DIGEST_SHOWN = 12
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNKNOWN = "?"


def restore_point_rows(points: Iterable[RestorePoint], *, now_s: float) -> list[tuple[str, ...]]:
    """Newest step first; ages as of `now_s`, seconds since 1970."""
    return [
        (
            tier_word(point.tier),
            str(point.global_step),
            str(point.epoch),
            duration(max(0.0, now_s - point.created_at.seconds)) if point.HasField("created_at") else _UNKNOWN,
            size(point.size_bytes),
            one_line(point.digest, length_max=_DIGEST_SHOWN),
            one_line(point.checkpoint_id) or "-",
            "yes" if point.stable else "no",
        )
        for point in sorted(points, key=lambda point: point.global_step, reverse=True)
    ]


def incident_rows(incidents: Iterable[Incident]) -> list[tuple[str, ...]]:
    """Newest first."""
    newest_first = sorted(incidents, key=lambda i: (i.occurred_at.seconds, i.occurred_at.nanos), reverse=True)
    return [
        (_time(incident.occurred_at), one_line(incident.kind), str(incident.global_step), _why(incident))
        for incident in newest_first
    ]


def _time(moment: Timestamp) -> str:
    try:
        return (_EPOCH + timedelta(seconds=moment.seconds)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return _UNKNOWN


def _why(incident: Incident) -> str:
    """The reason, and the details that are not empty; of digests only whether they differ, which would be news."""
    details = dict(incident.details)
    restored, captured = details.pop("state_digest", ""), details.pop("expected_digest", "")
    told = [
        f"{one_line(name.replace('_', ' '))} {one_line(details[name])}" for name in sorted(details) if details[name]
    ]
    if restored and captured and restored != captured:
        told.append("DIGESTS DIFFER")
    reason = one_line(incident.reason) or "no reason given"
    return f"{reason} ({', '.join(told)})" if told else reason
