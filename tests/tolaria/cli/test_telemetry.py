from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1.telemetry_pb2 import MetricPoint, SystemHealth, TelemetryPacket, TraceSpan
from support.fake_admin import FakeAdmin, serving
from support.telemetry import packet_of
from tolaria.cli.commands import app
from tolaria.cli.telemetry import lines, unknown_prefixes

EPOCH = (
    "22:13:20.005 epoch 3 training.loss=0.5 epoch_hook.latency_ms=4.25 degraded (command_rejected); 3 metrics, 1 spans"
)
AT = Timestamp(seconds=1_700_000_000, nanos=5_000_000)


def event(name: str = "command_rejected", **response: Any) -> admin.StreamTelemetryResponse:
    """Returns the response with the packet of an event."""
    packet = packet_of("high", name)
    packet.timestamp.CopyFrom(AT)
    packet.events[0].attributes.update({"reason": "stale", "detail": "old\x1b[31m"})
    return admin.StreamTelemetryResponse(packet=packet, kind=admin.TELEMETRY_KIND_EVENT, **response)


def epoch() -> admin.StreamTelemetryResponse:
    """Returns the response with the packet of an epoch."""
    span = TraceSpan(name="tolaria.boundary", attributes={"epoch": "3"})
    span.end_time.FromMilliseconds(12)
    health = SystemHealth(status=enums.HEALTH_STATUS_DEGRADED, summary="command_rejected", indicators={"epoch": "3"})
    metrics = [
        MetricPoint(name="tolaria.training.loss", value=0.5),
        MetricPoint(name="tolaria.epoch_hook.latency_ms", value=4.25, unit="ms"),
        MetricPoint(name="tolaria.breaker.state", value=1, attributes={"breaker": "tamiyo"}),
    ]
    packet = TelemetryPacket(timestamp=AT, metrics=metrics, spans=[span], system_health=health)
    return admin.StreamTelemetryResponse(packet=packet, kind=admin.TELEMETRY_KIND_EPOCH)


@pytest.mark.parametrize(
    ("response", "each_metric", "expected"),
    [
        (event(), False, ["22:13:20.005 warning command_rejected detail=old [31m reason=stale"]),
        (event(replayed=True), False, ["22:13:20.005 earlier warning command_rejected detail=old [31m reason=stale"]),
        (
            epoch(),
            False,
            [EPOCH],
        ),
        (
            epoch(),
            True,
            [
                "22:13:20.005 metric tolaria.training.loss 0.5",
                "22:13:20.005 metric tolaria.epoch_hook.latency_ms 4.25 ms",
                "22:13:20.005 metric tolaria.breaker.state{breaker=tamiyo} 1",
                "22:13:20.005 span tolaria.boundary 12.0 ms epoch=3",
            ],
        ),
    ],
)
def test_a_packet_as_text(response: admin.StreamTelemetryResponse, each_metric: bool, expected: list[str]) -> None:
    """One line for each event, and for an epoch or each of its metrics; no control character reaches a terminal."""
    found = [" ".join(line.split()) for line in lines(response, each_metric=each_metric)]
    assert found == expected


def invoke(*arguments: str) -> Any:
    """Runs the command; returns its result."""
    return CliRunner().invoke(app, [*arguments])


class FakeStream(FakeAdmin):
    """Streams `responses` and ends, or refuses."""

    def __init__(self, responses: list[admin.StreamTelemetryResponse]) -> None:
        super().__init__([])
        self.responses = responses

    def StreamTelemetry(  # noqa: N802 - gRPC's name
        self, request: admin.StreamTelemetryRequest, context: grpc.ServicerContext
    ) -> Iterator[admin.StreamTelemetryResponse]:
        self.requests.append(request)
        if not self.responses:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "there are 32 subscribers")
        yield from self.responses


def stream_of(*responses: admin.StreamTelemetryResponse) -> FakeStream:
    """Returns a service that streams these; without any it refuses."""
    return FakeStream([*responses])  # type: ignore[abstract] # the generated type declares every method abstract


def test_the_options_become_the_request() -> None:
    """Levels and kinds have the names of the contract in lower case."""
    fake = stream_of(event())
    with serving(fake) as address:
        options = ["--level", "warning", "--name", "a", "--name", "b", "--kind", "event", "--kind", "emergency"]
        ended = invoke("telemetry", "--address", address, *options, "--replay", "0")
    (request,) = fake.requests
    assert request == admin.StreamTelemetryRequest(
        level=enums.TELEMETRY_LEVEL_WARNING,
        name_prefixes=["a", "b"],
        kinds=[admin.TELEMETRY_KIND_EVENT, admin.TELEMETRY_KIND_EMERGENCY],
        replay_critical=0,
    )
    assert ended.exit_code == 0
    assert "command_rejected" in ended.stdout
    assert "has ended" in ended.stderr


def test_json_is_a_line_for_each_packet() -> None:
    """The proto's own mapping; what was lost goes to standard error, each time that the number has changed."""
    responses = [event(dropped={"normal": 3}), event(dropped={"normal": 3}), event(dropped={"normal": 5, "high": 1})]
    with serving(stream_of(*responses)) as address:
        ended = invoke("telemetry", "--address", address, "--json")
    packets = [json.loads(line)["packet"] for line in ended.stdout.splitlines()]
    assert [packet["events"][0]["description"] for packet in packets] == ["command_rejected"] * 3
    assert ended.stderr.count("3 normal") == 1
    assert "lost packets: 1 high, 5 normal" in ended.stderr


def test_a_refusal_is_reported() -> None:
    """With the service's words."""
    with serving(stream_of()) as address:
        ended = invoke("telemetry", "--address", address)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "there are 32 subscribers" in ended.stderr


def test_no_service_is_exit_code_3() -> None:
    """As for all client commands."""
    ended = invoke("telemetry", "--address", "127.0.0.1:1", "--timeout", "2")
    assert ended.exit_code == 3


def test_a_prefix_that_matches_nothing_is_said() -> None:
    """Once, on standard error, before the stream: it would be silent for ever."""
    with serving(stream_of(event())) as address:
        done = invoke("telemetry", "--name", "nosuch", "--address", address)
        known = invoke("telemetry", "--name", "tolaria.training", "--address", address)
    assert done.stderr.splitlines()[0] == (
        "no metric, event or span of this version begins with 'nosuch': nothing may be shown"
    )
    assert "begins with" not in known.stderr


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "tolaria.",
            "tolaria.breaker",
            "tolaria_breaker_state",
            "command_rej",
            "emergency_broadcast",
            "tolaria.boundary",
        ),
        *("tamiyo/EvaluateEpoch", "kas", "tolaria.step.duration_seconds_bucket", "tolaria.epochs.total"),
    ],
)
def test_prefixes_of_known_names(prefix: str) -> None:
    """Of metrics, their samples, events and spans; dotted and with underscores."""
    assert unknown_prefixes([prefix]) == []
    assert unknown_prefixes([f"{prefix}x"]) == ([] if prefix.startswith("tamiyo/") else [f"{prefix}x"])
