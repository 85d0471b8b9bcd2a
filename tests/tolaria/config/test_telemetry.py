from __future__ import annotations

import pytest

from tolaria.config import TraceEnvironment, child_environment, load_settings, trace_environment

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("variables", "asked", "protocol"),
    [
        ({}, False, "http/protobuf"),
        ({ENDPOINT: "http://collector:4318"}, True, "http/protobuf"),
        ({ENDPOINT: "http://collector:4317"}, True, "grpc"),
        ({ENDPOINT: "collector:4317"}, True, "grpc"),
        ({ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True, "http/protobuf"),
        ({ENDPOINT: "http://c", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, True, "grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/v1/traces"}, True, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, "http/protobuf"),
        ({ENDPOINT: "http://c", "OTEL_TRACES_EXPORTER": "none"}, False, "http/protobuf"),
        ({ENDPOINT: "http://c", "OTEL_TRACES_EXPORTER": "zipkin"}, False, "http/protobuf"),
        ({ENDPOINT: "http://c", "OTEL_SDK_DISABLED": "TRUE"}, False, "http/protobuf"),
        ({ENDPOINT: "http://c:port"}, True, "http/protobuf"),
    ],
)
def test_the_variables_of_opentelemetry_ask_for_traces(variables: dict[str, str], asked: bool, protocol: str) -> None:
    """An endpoint or an exporter does; OTEL_SDK_DISABLED overrides all."""
    found = trace_environment(variables)
    assert (found.asked, found.protocol) == (asked, protocol)


@pytest.mark.parametrize(
    ("variables", "named"),
    [({}, False), ({"OTEL_SERVICE_NAME": "x"}, True), ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=x"}, True)],
)
def test_a_service_can_be_named_by_the_environment(variables: dict[str, str], named: bool) -> None:
    """Either variable of the specification names it."""
    assert trace_environment(variables).service_name is named


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this module reads it."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    assert trace_environment() == TraceEnvironment(
        asked=True, protocol="http/protobuf", service_name=False, console=True
    )


@pytest.mark.parametrize(("traces", "passed"), [("off", "off"), ("auto", None)])
def test_a_peer_exports_no_traces_if_they_are_off(
    traces: str, passed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the same variables of OpenTelemetry as the service."""
    monkeypatch.setenv(ENDPOINT, "http://collector:4318")
    environment = child_environment(load_settings(None, [f"telemetry.traces={traces}"]))
    assert environment.get("TOLARIA_TELEMETRY__TRACES") == passed
    assert environment[ENDPOINT] == "http://collector:4318"
