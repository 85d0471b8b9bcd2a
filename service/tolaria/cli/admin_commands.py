"""Commands that make one call to the admin service of a running Tolaria, and the options that commands share."""

from __future__ import annotations

import inspect
import math
import uuid
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from google.protobuf.message import Message

from leyline.v1 import admin_service_pb2 as messages
from leyline.v1.enums_pb2 import EmergencyLevel, RollbackTier
from tolaria.cli import answers, render
from tolaria.cli.completion import complete_checkpoint
from tolaria.cli.errors import CommandFailedError, ServiceUnreachableError

if TYPE_CHECKING:
    from tolaria.cli.client import Rpc  # imports grpc, which --help does not need

DEMO_EPOCHS = 60  # enough for seeds to germinate, blend and fossilize
CHAOS_EPOCHS = 45  # with the corrupt shard; recoveries take time too
RANKS_MAX = 16  # of a demo; each is a process that imports torch
TIMEOUT_S = 5.0
_ROLLBACK_TIMEOUT_S = 60.0  # twice rollback.full_budget_s is 24, and training first has to reach a step boundary
_CHECKPOINT_TIMEOUT_S = 60.0  # also of `stop`, which writes a last checkpoint
_PROFILE_TIMEOUT_S = 900.0  # includes the traced steps
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file (default: tolaria.toml, if any)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one setting of the file or the environment."),
]
ServiceAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Service to call (default: TOLARIA_ADDRESS, a profile, or server.listen).",
    ),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", metavar="NAME", help="Profile of profiles.toml with address, token and TLS files."),
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, max=3600.0, help="Longest wait for an answer.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON (proto3 mapping).")]
Reason = Annotated[str, typer.Option("--reason", help="Reason for the action, recorded with it.")]
RequestId = Annotated[
    str | None,
    typer.Option("--request-id", metavar="ID", help="A repeat with the same id gets the first answer (default: new)."),
]

Level = StrEnum("Level", ["NOTICE", "ELEVATED", "CONSERVATIVE", "HALT"])
Switch = StrEnum("Switch", ["ON", "OFF"])
Tier = StrEnum("Tier", ["FAST", "FULL", "AUTO"])

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
Build = Callable[..., RequestT]


def admin_command(
    app: typer.Typer,
    rpc: Rpc[RequestT, ResponseT],
    *,
    name: str = "",
    timeout_s: float = TIMEOUT_S,
    show: Callable[[ResponseT], None] | None = None,
    check: Callable[[ResponseT], None] | None = None,
) -> Callable[[Build[RequestT]], Build[RequestT]]:
    """Registers the decorated function, which builds a request, as a command that makes one call.

    The function's parameters become options and its docstring the help text. The options of the connection and --json
    are added, and for a request with these fields --request-id and --reason. The command is called `name`, or like the
    function. `show` prints an answer; `check` raises a TolariaError for a bad one.
    """

    def register(build: Build[RequestT]) -> Build[RequestT]:
        signature = inspect.signature(build, eval_str=True)
        is_change = "request_id" in signature.return_annotation.DESCRIPTOR.fields_by_name
        own = list(signature.parameters.values())

        def command(**values: Any) -> None:
            from tolaria.cli import client  # noqa: PLC0415 - imports grpc and pydantic, which --help does not need

            request: Any = build(**{p.name: values.pop(p.name) for p in own})
            as_json, repeat = values.pop("as_json"), ""
            if is_change:
                request.request_id = values.pop("request_id") or str(uuid.uuid4())
                request.reason = values.pop("reason")
                # The service may have made the change although its answer is lost.
                repeat = f"; --request-id {request.request_id} repeats it safely"
            try:
                answer = client.call(client.target(**values), rpc, request)
            except ServiceUnreachableError as error:
                raise ServiceUnreachableError(f"{error}{repeat}") from None
            if as_json:
                typer.echo(render.json_text(answer))
            else:
                (show or partial(answers.show_change, name or build.__name__))(answer)
            if check:
                check(answer)

        shared = _CHANGE_OPTIONS if is_change else _CALL_OPTIONS
        shared = [p.replace(default=timeout_s) if p.name == "timeout_s" else p for p in shared]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *shared]]
        command.__doc__ = build.__doc__
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        # typer reads the options of a command from its signature.
        setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010 - no attribute that mypy knows
        app.command(name or build.__name__.replace("_", "-"))(command)
        return build

    return register


def _options(
    *,
    reason: Reason,
    request_id: RequestId = None,
    address: ServiceAddress = None,
    profile: Profile = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Declares the options of commands that change something; other commands have all but the first two."""


_CHANGE_OPTIONS = list(inspect.signature(_options, eval_str=True).parameters.values())
_CALL_OPTIONS = _CHANGE_OPTIONS[2:]

emergency_app = typer.Typer(help="Raise, clear and show emergencies of a running service.", no_args_is_help=True)
admin_app = typer.Typer()
admin_app.add_typer(emergency_app, name="emergency")


@admin_command(admin_app, lambda admin: admin.GetStatus, show=render.print_status)
def status() -> messages.GetStatusRequest:
    """Show the present state of a running service."""
    return messages.GetStatusRequest()


@admin_command(admin_app, lambda admin: admin.PauseTraining)
def pause() -> messages.PauseTrainingRequest:
    """Pause training at the next microbatch until it is resumed."""
    return messages.PauseTrainingRequest()


@admin_command(admin_app, lambda admin: admin.ResumeTraining, timeout_s=_ROLLBACK_TIMEOUT_S)
def resume() -> messages.ResumeTrainingRequest:
    """Resume training that is paused or halted; a halted state that is ill is first rolled back."""
    return messages.ResumeTrainingRequest()


@admin_command(admin_app, lambda admin: admin.StopTraining, timeout_s=_CHECKPOINT_TIMEOUT_S)
def stop() -> messages.StopTrainingRequest:
    """End the run after the current step; it cannot be resumed. The service keeps answering."""
    return messages.StopTrainingRequest()


@admin_command(admin_app, lambda admin: admin.ReloadConfig, show=answers.show_reload)
def reload() -> messages.ReloadConfigRequest:
    """Have a service read its settings again: what it was started with, a file that has changed since.

    Prints what has changed and what waits for a restart. A file with a mistake changes nothing.
    """
    return messages.ReloadConfigRequest()


@admin_command(admin_app, lambda admin: admin.Shutdown)
def shutdown() -> messages.ShutdownRequest:
    """End the service after a last checkpoint, as SIGTERM does; started again, it goes on with the run."""
    return messages.ShutdownRequest()


@admin_command(admin_app, lambda admin: admin.SetConservativeMode)
def conservative(
    switch: Annotated[Switch, typer.Argument(help="on: stop changing seeds and consulting the controller; off: undo.")],
) -> messages.SetConservativeModeRequest:
    """Switch conservative mode, in which training goes on without changes to seeds and without the controller."""
    return messages.SetConservativeModeRequest(enabled=switch is Switch.ON)


def _finite(number: float | None) -> float | None:
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not finite")
    return number


def _positive(number: float | None) -> float | None:
    if number is not None and not number > 0:
        raise typer.BadParameter(f"{number} is not above 0")
    return _finite(number)


@admin_command(admin_app, lambda admin: admin.AdjustLearningRate)
def lr(
    factor: Annotated[float | None, typer.Option(callback=_positive, help="Multiply the rate by this.")] = None,
    value: Annotated[
        float | None, typer.Option(callback=_finite, help="Set the rate to this, in place of its schedule.")
    ] = None,
    group: Annotated[
        str, typer.Option(help="Parameter group, such as host or seed:seed-1 (default: all trained groups).")
    ] = "",
    for_steps: Annotated[
        int, typer.Option(min=0, max=_UINT64_MAX, help="Steps until it expires (default: it does not expire).")
    ] = 0,
) -> messages.AdjustLearningRateRequest:
    """Change learning rates at the next step boundary, by --factor or --value."""
    if (factor is None) == (value is None):
        raise typer.BadParameter("give either --factor or --value")
    request = messages.AdjustLearningRateRequest(group=group, expires_after_steps=for_steps)
    if factor is not None:
        request.factor = factor
    if value is not None:
        request.value = value
    return request


def _require_equal_digests(answer: messages.TriggerRollbackResponse) -> None:
    if differing := answers.differing_digests(answer):
        what = f"the restored state is not the one that was captured ({differing})"
        point = "full, or an earlier --step" if answer.tier == RollbackTier.ROLLBACK_TIER_FAST else "an earlier --step"
        raise CommandFailedError(f"{what}; do not trust the present state: pause the run, and roll back to {point}")


@admin_command(
    admin_app,
    lambda admin: admin.TriggerRollback,
    timeout_s=_ROLLBACK_TIMEOUT_S,
    show=answers.show_rollback,
    check=_require_equal_digests,
)
def rollback(
    tier: Annotated[
        Tier, typer.Option(help="fast: from memory; full: from disk; auto: the service chooses.")
    ] = Tier.AUTO,
    step: Annotated[
        int | None,
        typer.Option(min=0, max=_UINT64_MAX, help="Latest step to restore (default: newest proven restore point)."),
    ] = None,
    checkpoint_id: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="ID",
            help="Restore this one of restore-points, also a superseded one: undo.",
            autocompletion=complete_checkpoint,
        ),
    ] = "",
) -> messages.TriggerRollbackRequest:
    """Restore an earlier training state, verify its digest, and continue from there.

    The state that it leaves is saved first. It and later checkpoints are superseded and kept for a while; --checkpoint
    goes back to one.
    """
    if checkpoint_id and (step is not None or tier is Tier.FAST):
        raise typer.BadParameter("--checkpoint names a step on disk: omit --step and --tier fast")
    number = RollbackTier.Value(f"ROLLBACK_TIER_{'UNSPECIFIED' if tier is Tier.AUTO else tier.name}")
    return messages.TriggerRollbackRequest(tier=number, target_step=step, checkpoint_id=checkpoint_id)


@admin_command(
    admin_app, lambda admin: admin.CreateCheckpoint, timeout_s=_CHECKPOINT_TIMEOUT_S, show=answers.show_checkpoint
)
def checkpoint() -> messages.CreateCheckpointRequest:
    """Write a checkpoint and wait until it is on disk; training goes on meanwhile."""
    return messages.CreateCheckpointRequest()


@admin_command(admin_app, lambda admin: admin.CaptureProfile, timeout_s=_PROFILE_TIMEOUT_S, show=answers.show_profile)
def profile(
    steps: Annotated[
        int, typer.Option(min=0, max=_UINT32_MAX, help="Steps to trace (default: profiler.active_steps).")
    ] = 0,
    rank: Annotated[
        int,
        typer.Option(min=0, max=_UINT32_MAX, help="Rank of a group to trace, as `tolaria status` lists them."),
    ] = 0,
) -> messages.CaptureProfileRequest:
    """Trace the next steps and print the path of the trace."""
    return messages.CaptureProfileRequest(active_steps=steps, rank=rank)


@admin_command(admin_app, lambda admin: admin.ListRestorePoints, show=answers.show_restore_points)
def restore_points() -> messages.ListRestorePointsRequest:
    """List the restore points in memory and on disk, also those that a rollback has superseded."""
    return messages.ListRestorePointsRequest()


@admin_command(admin_app, lambda admin: admin.ListIncidents, show=answers.show_incidents)
def incidents(
    limit: Annotated[
        int, typer.Option(min=0, max=_UINT32_MAX, help="Newest incidents to list (default: the service's limit).")
    ] = 0,
) -> messages.ListIncidentsRequest:
    """List rollbacks, emergencies and storage faults, newest first."""
    return messages.ListIncidentsRequest(limit=limit)


@admin_command(emergency_app, lambda admin: admin.RaiseEmergency, name="raise")
def raise_(
    level: Annotated[Level, typer.Argument(help="halt stops training; conservative stops changes to seeds.")],
) -> messages.RaiseEmergencyRequest:
    """Raise an emergency; the answer lists the participants that have acknowledged it."""
    return messages.RaiseEmergencyRequest(level=EmergencyLevel.Value(f"EMERGENCY_LEVEL_{level.name}"))


@admin_command(emergency_app, lambda admin: admin.ClearEmergency, show=answers.show_clearance)
def clear() -> messages.ClearEmergencyRequest:
    """Clear the emergency; training that it halted continues when it is resumed."""
    return messages.ClearEmergencyRequest()


@admin_command(emergency_app, lambda admin: admin.GetStatus, show=answers.show_safety)
def show() -> messages.GetStatusRequest:
    """Show the emergency level, the reasons for conservative mode, and the circuit breakers."""
    return messages.GetStatusRequest()
