"""`tolaria skip`: has a running service leave data out, lists what is left out, and undoes it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from leyline.v1 import admin_service_pb2 as messages
from tolaria.cli.admin_commands import (
    TIMEOUT_S,
    AsJson,
    ConfigFile,
    Overrides,
    Profile,
    RequestId,
    ServiceAddress,
    Timeout,
)
from tolaria.cli.answers import time_text
from tolaria.cli.errors import ServiceUnreachableError
from tolaria.cli.render import json_text, one_line, print_table

if TYPE_CHECKING:
    from tolaria.cli.client import Target

skip_app = typer.Typer()

COLUMNS = ("id", "made (UTC)", "state", "steps", "batches", "reason")
_RANGES_SHOWN = 4
_UINT64_MAX = 2**64 - 1
_UINT32_MAX = 2**32 - 1


@skip_app.command()
def skip(
    *,
    first: Annotated[
        int | None, typer.Option("--from", min=0, max=_UINT64_MAX, help="First step; with --epoch: batch, from 0.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--to", min=0, max=_UINT64_MAX, help="Last step or batch, included (default: --from).")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option("--epoch", min=1, max=_UINT32_MAX, help="Name batches of this epoch, not steps.")
    ] = None,
    remove: Annotated[str, typer.Option("--remove", metavar="ID", help="Undo this skip of --list.")] = "",
    listing: Annotated[bool, typer.Option("--list", help="List the skips of the run, the newest first.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Reason for the action, recorded with it.")] = "",
    request_id: RequestId = None,
    address: ServiceAddress = None,
    profile: Profile = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Have training leave out the data of steps, or batches of an epoch, from the next step boundary on.

    The batches of steps that were taken are left out when the run goes back before them: tolaria rollback --step.
    """
    if sum((listing, bool(remove), first is not None)) != 1:
        raise typer.BadParameter("give one of --from, --remove and --list")
    if (last is not None or epoch is not None) and first is None:
        raise typer.BadParameter("--to and --epoch need --from")
    if not listing and not reason.strip():
        raise typer.BadParameter("a change needs --reason")
    from tolaria.cli import client  # noqa: PLC0415 - imports grpc, which --help does not need

    target = client.target(address, timeout_s, config_file, overrides, profile)
    if listing:
        _list(target, as_json=as_json)
        return
    request = messages.SkipDataRequest(request_id=request_id or str(uuid.uuid4()), reason=reason, remove=remove)
    if first is not None and epoch is not None:
        request.epoch, request.from_batch = epoch, first
        request.to_batch = first if last is None else last
    elif first is not None:
        request.from_step, request.to_step = first, first if last is None else last
    try:
        answer = client.call(target, lambda admin: admin.SkipData, request)
    except ServiceUnreachableError as error:
        raise ServiceUnreachableError(f"{error}; --request-id {request.request_id} repeats it safely") from None
    typer.echo(json_text(answer) if as_json else _described(answer))


def _list(target: Target, *, as_json: bool) -> None:
    from tolaria.cli import client  # noqa: PLC0415 - as above

    answer = client.call(target, lambda admin: admin.ListDataSkips, messages.ListDataSkipsRequest())
    if as_json:
        typer.echo(json_text(answer))
    elif not answer.skips:
        typer.echo("no data are left out")
    else:
        print_table([_row(each) for each in answer.skips], COLUMNS)


def _row(skip: messages.DataSkip) -> tuple[str, ...]:
    state = "removed" if skip.HasField("removed_at") else "in force"
    steps = f"{skip.from_step} to {skip.to_step}" if skip.HasField("from_step") else "-"
    return one_line(skip.skip_id), time_text(skip.made_at), state, steps, _batches(skip), one_line(skip.reason)


def _batches(skip: messages.DataSkip) -> str:
    shown = [f"epoch {each.epoch}: {each.from_batch} to {each.to_batch}" for each in skip.ranges[:_RANGES_SHOWN]]
    more = len(skip.ranges) - _RANGES_SHOWN
    return "; ".join([*shown, *([f"{more} more ranges"] if more > 0 else [])])


def _described(answer: messages.SkipDataResponse) -> str:
    skip = answer.skip
    if skip.HasField("removed_at"):
        return f"skip {one_line(skip.skip_id)} removed at step {answer.global_step}: {_batches(skip)}"
    text = f"skip {one_line(skip.skip_id)} from step {answer.global_step} on: {_batches(skip)}"
    if skip.passed:
        before = f" --step {skip.from_step - 1}" if skip.HasField("from_step") else ""
        of_all = "they have" if skip.passed >= skip.batches else f"{skip.passed} of {skip.batches} have"
        text += f"\n{of_all} been read already, and are left out once the run goes back: tolaria rollback{before}"
    return text
