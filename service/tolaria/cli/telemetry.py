"""`tolaria telemetry`: the packets of a running service, as lines of text or JSON."""

# ruff: noqa: PLC0415 - grpc is imported when the command runs, so that --help is quick
from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final

import typer

from leyline.v1 import admin_service_pb2 as messages
from leyline.v1.enums_pb2 import HealthStatus, TelemetryLevel
from leyline.v1.telemetry_pb2 import MetricPoint, TelemetryPacket
from tolaria.cli import render
from tolaria.cli.admin_commands import TIMEOUT_S, ConfigFile, Overrides, Profile, ServiceAddress, Timeout

Lowest = StrEnum("Lowest", ["INFO", "WARNING", "ERROR", "CRITICAL"])
Kind = StrEnum("Kind", ["EPOCH", "EVENT", "EMERGENCY"])

SHOWN_OF_AN_EPOCH: Final = (
    "tolaria.training.step", "tolaria.training.loss", "tolaria.validation.accuracy", "tolaria.epoch_hook.latency_ms",
)  # fmt: skip
_KEPT_MAX: Final = 2**32 - 1
_TEXT_LENGTH_MAX: Final = 300

telemetry_app = typer.Typer()


@telemetry_app.command()
def telemetry(
    *,
    level: Annotated[Lowest | None, typer.Option(help="Lowest level to show (default: all).")] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="PREFIX", help="Metrics, events and spans whose names begin with this."),
    ] = None,
    kinds: Annotated[
        list[Kind] | None, typer.Option("--kind", help="epoch: metrics and spans of each epoch (default: all kinds).")
    ] = None,
    replay: Annotated[
        int | None,
        typer.Option(min=0, max=_KEPT_MAX, help="Latest critical packets to show first (default: all that are kept)."),
    ] = None,
    address: ServiceAddress = None,
    profile: Profile = None,
    timeout_s: Timeout = TIMEOUT_S,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each packet as one line of JSON.")] = False,
) -> None:
    """Follow the events and metrics of a running service until it ends.

    An epoch is one line; with --name each metric that matches is a line.
    """
    import asyncio

    from tolaria.cli import client

    request = messages.StreamTelemetryRequest(
        level=TelemetryLevel.Value(f"TELEMETRY_LEVEL_{level.name if level else 'UNSPECIFIED'}"),
        name_prefixes=names,
        kinds=[messages.TelemetryKind.Value(f"TELEMETRY_KIND_{kind.name}") for kind in kinds or ()],
        replay_critical=replay,
    )
    lost: dict[str, int] = {}

    def show(response: messages.StreamTelemetryResponse) -> None:
        for line in [render.json_text(response, indent=None)] if as_json else lines(response, each_metric=bool(names)):
            typer.echo(line)
        if lost != (now := dict(response.dropped)):
            lost.update(now)
            total = ", ".join(f"{count} {priority}" for priority, count in sorted(lost.items()))
            typer.echo(f"this reader is too slow and has lost packets: {total}", err=True)

    for prefix in unknown_prefixes(names or ()):
        typer.echo(f"no metric, event or span of this version begins with {prefix!r}: nothing may be shown", err=True)
    target = client.target(address, timeout_s, config_file, overrides, profile)
    asyncio.run(client.follow_telemetry(target, request, show))
    typer.echo(f"the service at {target.address} has ended", err=True)


def unknown_prefixes(prefixes: Iterable[str]) -> list[str]:
    """Returns the prefixes that no name of the catalogues begins with, dotted or with underscores."""
    from tolaria.run.packet_telemetry import SPANS
    from tolaria.telemetry.events import event_names
    from tolaria.telemetry.metrics import Metrics

    metrics, calls = Metrics(), ("tamiyo/", "kasmina/")  # of any method
    families = list(metrics.registry.collect())
    samples = [f"{spec.name}{ending}" for spec in metrics.catalogue for ending in ("", "_bucket", "_sum", "_count")]
    known = [*samples, *(family.name for family in families), *event_names(), *SPANS, *calls]
    known += [name.replace(".", "_") for name in known]
    return [
        prefix
        for prefix in prefixes
        if not prefix.startswith(calls) and not any(name.startswith(prefix) for name in known)
    ]


def lines(response: messages.StreamTelemetryResponse, *, each_metric: bool) -> Iterator[str]:
    """Yields a packet as text: its events and, of an epoch, its figures; with `each_metric` its metrics and spans."""
    packet = response.packet
    at = datetime.fromtimestamp(packet.timestamp.seconds + packet.timestamp.nanos / 1e9, UTC)
    head = f"{at:%H:%M:%S.%f}"[:-3] + (" earlier" if response.replayed else "")
    for event in packet.events:
        attributes = _pairs(event.attributes.items())
        level = TelemetryLevel.Name(event.level).removeprefix("TELEMETRY_LEVEL_").lower()
        yield render.one_line(f"{head} {level:8} {event.description}  {attributes}", length_max=_TEXT_LENGTH_MAX)
    if response.kind == messages.TELEMETRY_KIND_EPOCH and not each_metric:
        yield render.one_line(f"{head} epoch    {_epoch(packet)}", length_max=_TEXT_LENGTH_MAX)
    for metric in packet.metrics if each_metric else ():
        yield render.one_line(f"{head} metric   {_metric(metric)}", length_max=_TEXT_LENGTH_MAX)
    for span in packet.spans if each_metric else ():
        took_ms = (span.end_time.ToNanoseconds() - span.start_time.ToNanoseconds()) / 1e6
        text = f"{head} span     {span.name} {took_ms:.1f} ms  {_pairs(span.attributes.items())}"
        yield render.one_line(text, length_max=_TEXT_LENGTH_MAX)


def _epoch(packet: TelemetryPacket) -> str:
    figures = {metric.name: metric.value for metric in packet.metrics if not metric.attributes}
    shown = [f"{name.removeprefix('tolaria.')}={figures[name]:.5g}" for name in SHOWN_OF_AN_EPOCH if name in figures]
    health = HealthStatus.Name(packet.system_health.status).removeprefix("HEALTH_STATUS_").lower()
    counts = f"{len(packet.metrics)} metrics, {len(packet.spans)} spans"
    summary = f" ({packet.system_health.summary})" if packet.system_health.summary else ""
    return f"{packet.system_health.indicators['epoch']} {' '.join(shown)}  {health}{summary}; {counts}"


def _metric(metric: MetricPoint) -> str:
    labels = f"{{{_pairs(metric.attributes.items(), ', ')}}}" if metric.attributes else ""
    return f"{metric.name}{labels} {metric.value:.9g} {metric.unit}".rstrip()


def _pairs(items: Iterable[tuple[str, str]], separator: str = " ") -> str:
    return separator.join(f"{key}={value}" for key, value in sorted(items))
