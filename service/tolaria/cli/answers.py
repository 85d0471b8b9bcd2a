"""The answers to requests as text: restore points, incidents, rollbacks and other changes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import admin_service_pb2 as messages
from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import RollbackTier
from tolaria.cli.render import duration, enum_word, one_line, print_table, safety_rows, size

RESTORE_POINT_COLUMNS = ("tier", "step", "epoch", "age", "size", "digest", "id", "attempt", "state")
INCIDENT_COLUMNS = ("time (UTC)", "kind", "step", "reason")

_NONE: Final = "none"
_UNKNOWN: Final = "?"
_DIGEST_LENGTH_SHOWN: Final = 12
_PATH_LENGTH_MAX: Final = 4096
_FRACTION: Final = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?", re.ASCII)
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def restore_point_rows(points: Iterable[messages.RestorePoint], *, now_s: float) -> list[tuple[str, ...]]:
    """Returns table rows, the newest step first; ages are relative to `now_s`, in seconds since 1970."""
    return [
        (
            enum_word(RollbackTier.DESCRIPTOR, point.tier),
            str(point.global_step),
            str(point.epoch),
            duration(max(0.0, now_s - point.created_at.seconds)) if point.HasField("created_at") else _UNKNOWN,
            size(point.size_bytes),
            one_line(point.digest, length_max=_DIGEST_LENGTH_SHOWN),
            one_line(point.checkpoint_id) or "-",
            str(point.attempt),
            _point_state(point),
        )
        for point in sorted(points, key=lambda point: point.global_step, reverse=True)
    ]


def _point_state(point: messages.RestorePoint) -> str:
    state = "proven" if point.stable else "suspect" if point.suspect else "unproven"
    return f"superseded, {state}" if point.superseded else state


def incident_rows(incidents: Iterable[messages.Incident]) -> list[tuple[str, ...]]:
    """Returns table rows, the newest incident first."""
    newest_first = sorted(incidents, key=lambda i: (i.occurred_at.seconds, i.occurred_at.nanos), reverse=True)
    return [(time_text(i.occurred_at), one_line(i.kind), str(i.global_step), _reason(i)) for i in newest_first]


def time_text(moment: Timestamp) -> str:
    """Returns a time in UTC, with seconds."""
    try:
        return (_UNIX_EPOCH + timedelta(seconds=moment.seconds)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return _UNKNOWN


def _reason(incident: messages.Incident) -> str:
    """Returns the reason and the details that are not empty; digests are mentioned only when they differ."""
    details = dict(incident.details)
    restored, captured = details.pop("state_digest", ""), details.pop("expected_digest", "")
    shown = [f"{one_line(name.replace('_', ' '))} {_rounded(text)}" for name, text in sorted(details.items()) if text]
    if restored and captured and restored != captured:
        shown.append("DIGESTS DIFFER")
    reason = one_line(incident.reason) or "no reason given"
    return f"{reason} ({', '.join(shown)})" if shown else reason


def _rounded(text: str) -> str:
    """Returns a number with a fraction with four digits, and other text as one line."""
    return f"{float(text):.4g}" if _FRACTION.fullmatch(text) else one_line(text)


def show_safety(answer: GetStatusResponse) -> None:
    """Prints the safety rows of a status."""
    for label, text in safety_rows(answer):
        typer.echo(f"{label}: {text}")


def show_restore_points(answer: messages.ListRestorePointsResponse) -> None:
    """Prints the restore points as a table."""
    if not answer.restore_points:
        typer.echo("there is no restore point yet")
        return
    print_table(restore_point_rows(answer.restore_points, now_s=time.time()), RESTORE_POINT_COLUMNS)


def show_incidents(answer: messages.ListIncidentsResponse) -> None:
    """Prints the incidents as a table."""
    if not answer.incidents:
        typer.echo("there is no incident")
        return
    print_table(incident_rows(answer.incidents), INCIDENT_COLUMNS)


def show_reload(answer: messages.ReloadConfigResponse) -> None:
    """Prints the settings that have changed, and those that wait for a restart."""
    _took_effect("reload", answer.global_step, f"{len(answer.changed)} changed" if answer.changed else "no change")
    for one in answer.changed:
        typer.echo(f"  {_change(one)}")
    if answer.waiting:
        typer.echo("waiting for a restart:")
    for one in answer.waiting:
        typer.echo(f"  {_change(one)}")
    for notice in answer.notices:
        typer.echo(f"  {one_line(notice, length_max=_PATH_LENGTH_MAX)}")


def _change(one: messages.SettingChange) -> str:
    return f"{one_line(one.name)}: {one_line(one.before)} -> {one_line(one.after)}"


def show_clearance(answer: messages.ClearEmergencyResponse) -> None:
    """Prints the state after a clearance, and what is left to do when training stays halted."""
    show_change("clear", answer)
    if answer.state == RunState.RUN_STATE_HALTED:
        typer.echo("training stays halted: tolaria resume --reason ... goes on with it")


def show_change(name: str, answer: Message) -> None:
    """Prints the step at which the change `name` took effect, then the other fields as `name value`."""
    values = MessageToDict(answer, preserving_proto_field_name=True)
    step = values.pop("global_step", 0)
    _took_effect(name, step, ", ".join(f"{field.replace('_', ' ')} {_plain(value)}" for field, value in values.items()))


def show_rollback(answer: messages.TriggerRollbackResponse) -> None:
    """Prints the step, the restore point, the times, whether peers took part, the way back, and the digests."""
    tier = enum_word(RollbackTier.DESCRIPTOR, answer.tier)
    parts = [
        f"tier {tier}",
        one_line(answer.chosen),
        f"waited {answer.waited_ms:.1f} ms for the step boundary",
        f"kept the state that was left in {answer.kept_ms:.1f} ms" if answer.left_checkpoint_id else "",
        f"restored in {answer.restored_ms:.1f} ms",
        "coordinated" if answer.coordinated else "uncoordinated: no majority went back together",
    ]
    _took_effect("rollback", answer.restored_step, ", ".join(part for part in parts if part))
    if left_id := one_line(answer.left_checkpoint_id):
        back = f"tolaria rollback --checkpoint {left_id} --reason ... returns to it"
        typer.echo(f"step {answer.left_step} is kept as checkpoint {left_id}{_kept_until(answer)}: {back}")
    elif answer.left_not_kept:
        typer.echo(f"step {answer.left_step} is not kept: {one_line(answer.left_not_kept)}")
    if answer.superseded:
        typer.echo(f"checkpoints superseded: {answer.superseded}; rollback --checkpoint ID goes back to one")
    if differing := differing_digests(answer):
        typer.secho(f"DIGESTS DIFFER: {differing}", fg=typer.colors.RED, bold=True)
    else:
        typer.echo(f"digests equal: {one_line(answer.state_digest)}")


def _kept_until(answer: messages.TriggerRollbackResponse) -> str:
    """Returns until when the state that was left is kept; nothing for a service that does not say."""
    if not answer.HasField("left_kept_until"):
        return ""
    until = f" until {time_text(answer.left_kept_until)} UTC (checkpoint.keep_superseded_s)"
    return f"{until}, and while it is among the newest {answer.superseded_kept} superseded ones"


def differing_digests(answer: messages.TriggerRollbackResponse) -> str:
    """Describes the digests of the restored and the captured state if they differ or are missing; empty if not."""
    if answer.state_digest and answer.state_digest == answer.expected_digest:
        return ""
    restored, captured = (one_line(digest) or _NONE for digest in (answer.state_digest, answer.expected_digest))
    return f"restored {restored}, captured {captured}"


def show_checkpoint(answer: messages.CreateCheckpointResponse) -> None:
    """Prints the id, size and digest of the checkpoint on disk."""
    detail = f"id {one_line(answer.checkpoint_id)}, {size(answer.size_bytes)}, digest {one_line(answer.digest)}"
    _took_effect("checkpoint", answer.global_step, detail)


def show_profile(answer: messages.CaptureProfileResponse) -> None:
    """Prints the path of the trace and the viewers for it."""
    detail = f"{one_line(answer.path, length_max=_PATH_LENGTH_MAX)}, {size(answer.size_bytes)}"
    _took_effect("profile", answer.global_step, detail)
    typer.echo("the file is on the service's machine; open it in https://ui.perfetto.dev or chrome://tracing")


def _took_effect(name: str, step: int, detail: str) -> None:
    typer.echo(f"{name}: took effect at step {step}{': ' if detail else ''}{detail}")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return one_line(str(value)).removeprefix("RUN_STATE_")
