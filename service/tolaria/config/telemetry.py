"""Settings of telemetry packets and traces, and what OpenTelemetry's environment variables ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from tolaria.config.fields import LIVE, Section

_GRPC_PORT = 4317


class TelemetrySettings(Section):
    """The stream of telemetry packets, and traces."""

    queue_packets: Annotated[int, LIVE] = Field(default=256, ge=16, le=100_000)
    """Packets that wait for one subscriber; beyond it the oldest are lost, NORMAL ones first. 256: minutes of events.

    CRITICAL packets have a queue to themselves.
    """

    critical_kept: int = Field(default=64, ge=0, le=1024)
    """Latest CRITICAL packets that a new subscriber gets first. 64: a night's emergencies."""

    subscribers_max: Annotated[int, LIVE] = Field(default=32, ge=1, le=10_000)
    """Subscribers at the same time; a further one is refused. 32: each may hold a queue of packets in memory."""

    latency_factor: float = Field(default=3.0, gt=1.0, le=1000.0)
    """How many times as long as usual the steps of an epoch take when `latency_high` is reported.

    3.0: other work on the machine often doubles the time. Less than a second more is not reported.
    """

    traces: Literal["auto", "on", "off"] = "auto"
    """Export traces by OTLP, which needs tolaria[otel]. auto: if OTEL_EXPORTER_OTLP_ENDPOINT or another variable of
    OpenTelemetry asks for it, so that nothing is sent that is not expected."""


@dataclass(frozen=True, slots=True)
class TraceEnvironment:
    """What the OTEL_* variables say that OpenTelemetry's SDK does not read itself.

    `asked`: they ask for traces. `service_name`: whether they name the service. `console`: spans are printed.
    """

    asked: bool
    protocol: Literal["grpc", "http/protobuf"]
    service_name: bool
    console: bool


def trace_environment(variables: Mapping[str, str] | None = None) -> TraceEnvironment:
    """Reads the variables, by default those of this process. An unknown exporter asks for nothing.

    Without OTEL_EXPORTER_OTLP_PROTOCOL the protocol is HTTP, as OpenTelemetry's specification prefers, unless the port
    is 4317, which is that of gRPC.
    """
    given = os.environ if variables is None else variables
    endpoint = given.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or given.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""
    exporter = given.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    disabled = given.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    wanted = exporter in {"otlp", "console"} or (not exporter and bool(endpoint))
    protocol = given.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or given.get("OTEL_EXPORTER_OTLP_PROTOCOL") or ""
    grpc = protocol == "grpc" or (not protocol and _port(endpoint) == _GRPC_PORT)
    named = "OTEL_SERVICE_NAME" in given or "service.name=" in given.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return TraceEnvironment(
        asked=wanted and not disabled,
        protocol="grpc" if grpc else "http/protobuf",
        service_name=named,
        console=exporter == "console",
    )


def _port(endpoint: str) -> int | None:
    try:
        return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").port
    except ValueError:
        return None
