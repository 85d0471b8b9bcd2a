"""Packets of the field, built byte by byte from field numbers, against the generated messages.

Owns a wire encoder of its own that shares nothing with protobuf. Must not know what the messages mean.
"""

from __future__ import annotations

import struct
from typing import Generic, NamedTuple, TypeVar

import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1 import commands_pb2, emergency_pb2, enums_pb2, seeds_pb2, state_pb2, telemetry_pb2

M = TypeVar("M", bound=Message)


class Golden(NamedTuple, Generic[M]):
    """What is on the wire, and what it says."""

    raw: bytes
    message: M


def varint(number: int) -> bytes:
    """A base-128 number, low group first."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def uint(field: int, number: int) -> bytes:
    """An unsigned integer, enum or bool."""
    return varint(field << 3 | 0) + varint(number)


def double(field: int, number: float) -> bytes:
    """Eight little-endian bytes."""
    return varint(field << 3 | 1) + struct.pack("<d", number)


def chunk(field: int, payload: bytes | str) -> bytes:
    """A string, a submessage or raw bytes."""
    raw = payload.encode() if isinstance(payload, str) else payload
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def single(field: int, number: float) -> bytes:
    """A float: four little-endian bytes."""
    return varint(field << 3 | 5) + struct.pack("<f", number)


def floats(field: int, **entries: float) -> bytes:
    """A map<string, float>: one submessage an entry, key 1 and value 2."""
    return b"".join(chunk(field, chunk(1, key) + single(2, value)) for key, value in entries.items())


def texts(field: int, **entries: str) -> bytes:
    """A map<string, string>."""
    return b"".join(chunk(field, chunk(1, key) + chunk(2, value)) for key, value in entries.items())


def instant(field: int, seconds: int, nanos: int) -> bytes:
    """A google.protobuf.Timestamp."""
    return chunk(field, uint(1, seconds) + uint(2, nanos))


HARDWARE = Golden(
    chunk(1, "cuda")
    + chunk(2, "cuda:0")
    + single(3, 80.0)
    + single(4, 61.5)
    + single(5, 64.25)
    + single(6, 97.5)
    + uint(7, 90),
    state_pb2.HardwareContext(
        device_type="cuda",
        device_id="cuda:0",
        total_memory_gb=80.0,
        available_memory_gb=61.5,
        temperature_celsius=64.25,
        utilization_percent=97.5,
        compute_capability=90,
    ),
)
ALPHA = Golden(
    single(1, 0.25) + single(2, 0.75) + uint(3, 2**40 + 1) + uint(4, 300),
    seeds_pb2.AlphaSchedule(start=0.25, end=0.75, begin_step=2**40 + 1, duration_steps=300),
)
OLD_SEED = Golden(
    chunk(1, "seed-a")
    + uint(2, 4)
    + single(3, 1.5)
    + single(4, 0.125)
    + uint(5, 3)
    + floats(6, alpha=0.5)
    + uint(7, 7)
    + single(8, 0.375),
    seeds_pb2.SeedState(
        seed_id="seed-a",
        stage=enums_pb2.SEED_STAGE_BLENDING,
        gradient_norm=1.5,
        learning_rate=0.125,
        layer_depth=3,
        metrics={"alpha": 0.5},
        age_epochs=7,
        risk_score=0.375,
    ),
)
SEED = Golden(
    chunk(1, "seed-b")
    + chunk(20, "conv3x3")
    + chunk(21, "features.2")
    + chunk(22, ALPHA.raw)
    + single(23, 0.625)
    + chunk(24, "weight")
    + chunk(24, "bias"),
    seeds_pb2.SeedState(
        seed_id="seed-b",
        blueprint_id="conv3x3",
        slot="features.2",
        alpha=ALPHA.message,
        attribution=0.625,
        parameters=["weight", "bias"],
    ),
)
STATE = Golden(
    uint(1, 2)
    + uint(2, 11)
    + single(3, 0.875)
    + single(4, 0.4375)
    + uint(5, 2**63 + 5)
    + chunk(6, HARDWARE.raw)
    + floats(7, **{"kasmina.apply_ms": 0.5, "loss": 1.25})
    + chunk(8, OLD_SEED.raw)
    + chunk(8, SEED.raw)
    + chunk(9, "packet-1")
    + uint(10, 2**33 + 3)
    + single(11, 0.5625)
    + chunk(12, "tolaria")
    + chunk(13, "run-7")
    + chunk(14, "digits"),
    state_pb2.SystemStatePacket(
        version=2,
        current_epoch=11,
        validation_accuracy=0.875,
        validation_loss=0.4375,
        timestamp_ns=2**63 + 5,
        hardware_context=HARDWARE.message,
        training_metrics={"kasmina.apply_ms": 0.5, "loss": 1.25},
        seed_states=[OLD_SEED.message, SEED.message],
        packet_id="packet-1",
        global_step=2**33 + 3,
        training_loss=0.5625,
        source_subsystem="tolaria",
        training_run_id="run-7",
        experiment_name="digits",
    ),
)
SEED_OPERATION = Golden(
    uint(1, 1) + chunk(2, "conv3x3") + floats(3, blend_steps=500.0),
    commands_pb2.CommandSeedOperation(
        operation=enums_pb2.SEED_OP_GERMINATE, blueprint_id="conv3x3", parameters={"blend_steps": 500.0}
    ),
)
OPTIMIZER_ADJUSTMENT = Golden(
    chunk(1, "host") + floats(2, lr=0.0625, momentum=0.5),
    commands_pb2.CommandOptimizerAdjustment(optimizer_id="host", hyperparameters={"lr": 0.0625, "momentum": 0.5}),
)
CIRCUIT_BREAKER = Golden(
    uint(1, 3) + chunk(2, "probe"),
    commands_pb2.CommandCircuitBreaker(desired_state=enums_pb2.CIRCUIT_STATE_HALF_OPEN, rationale="probe"),
)
ROLLBACK = Golden(
    chunk(1, chunk(1, "target_step") + chunk(2, double(2, 1200.0))),
    Struct(fields={"target_step": Value(number_value=1200.0)}),
)
METRIC = Golden(
    chunk(1, "tolaria.training.loss") + double(2, 0.1) + chunk(3, "nats") + texts(4, run="r"),
    telemetry_pb2.MetricPoint(name="tolaria.training.loss", value=0.1, unit="nats", attributes={"run": "r"}),
)
EVENT = Golden(
    chunk(1, "event-1") + chunk(2, "tolaria.tamiyo_timeout") + uint(3, 2) + texts(4, peer="tamiyo"),
    telemetry_pb2.TelemetryEvent(
        event_id="event-1",
        description="tolaria.tamiyo_timeout",
        level=enums_pb2.TELEMETRY_LEVEL_WARNING,
        attributes={"peer": "tamiyo"},
    ),
)
SPAN = Golden(
    chunk(1, "span-2")
    + chunk(2, "span-1")
    + chunk(3, "boundary")
    + instant(4, 1_760_000_001, 1)
    + instant(5, 1_760_000_002, 2)
    + texts(6, epoch="3"),
    telemetry_pb2.TraceSpan(
        span_id="span-2",
        parent_span_id="span-1",
        name="boundary",
        start_time=Timestamp(seconds=1_760_000_001, nanos=1),
        end_time=Timestamp(seconds=1_760_000_002, nanos=2),
        attributes={"epoch": "3"},
    ),
)
HEALTH = Golden(
    uint(1, 2) + chunk(2, "tamiyo is slow") + texts(3, tamiyo="degraded"),
    telemetry_pb2.SystemHealth(
        status=enums_pb2.HEALTH_STATUS_DEGRADED, summary="tamiyo is slow", indicators={"tamiyo": "degraded"}
    ),
)
PACKET = Golden(
    chunk(1, "packet-2")
    + instant(2, 1_760_000_003, 999_999_999)
    + chunk(3, "tolaria")
    + uint(4, 3)
    + chunk(10, METRIC.raw)
    + chunk(20, EVENT.raw)
    + chunk(30, SPAN.raw)
    + chunk(40, HEALTH.raw)
    + uint(50, 4),
    telemetry_pb2.TelemetryPacket(
        packet_id="packet-2",
        timestamp=Timestamp(seconds=1_760_000_003, nanos=999_999_999),
        source_subsystem="tolaria",
        level=enums_pb2.TELEMETRY_LEVEL_ERROR,
        metrics=[METRIC.message],
        events=[EVENT.message],
        spans=[SPAN.message],
        system_health=HEALTH.message,
        priority=enums_pb2.MESSAGE_PRIORITY_CRITICAL,
    ),
)
SIGNAL = Golden(
    uint(1, 1)
    + uint(2, 4)
    + chunk(3, "halt")
    + chunk(4, "operator")
    + instant(5, 1_760_000_000, 250)
    + uint(6, 2**50)
    + chunk(7, "run-1")
    + texts(8, step="12")
    + chunk(9, b"\x00\xff\x80"),
    emergency_pb2.EmergencySignal(
        version=1,
        level=enums_pb2.EMERGENCY_LEVEL_HALT,
        reason="halt",
        origin="operator",
        triggered_at=Timestamp(seconds=1_760_000_000, nanos=250),
        monotonic_time_ms=2**50,
        run_id="run-1",
        attributes={"step": "12"},
        payload_checksum=b"\x00\xff\x80",
    ),
)


def command(
    type_number: int, payload_field: int, payload: bytes, expected: commands_pb2.AdaptationCommand
) -> Golden[commands_pb2.AdaptationCommand]:
    """An AdaptationCommand around one payload of the oneof; `expected` holds that payload and the type."""
    head = uint(1, 1) + chunk(2, "cmd-1") + uint(3, type_number) + chunk(4, "seed-a") + uint(5, 1500)
    issued = instant(6, 1_760_000_000, 250) + chunk(7, "tamiyo")
    rest = commands_pb2.AdaptationCommand(
        version=1,
        command_id="cmd-1",
        target_seed_id="seed-a",
        execution_deadline_ms=1500,
        issued_at=Timestamp(seconds=1_760_000_000, nanos=250),
        issued_by="tamiyo",
        annotations={"nonce": "n", "signature": "00ff"},
    )
    rest.MergeFrom(expected)
    return Golden(head + issued + chunk(payload_field, payload) + texts(20, nonce="n", signature="00ff"), rest)


SEED_COMMAND = command(
    1,
    10,
    SEED_OPERATION.raw,
    commands_pb2.AdaptationCommand(command_type=enums_pb2.COMMAND_SEED, seed_operation=SEED_OPERATION.message),
)
OPTIMIZER_COMMAND = command(
    3,
    11,
    OPTIMIZER_ADJUSTMENT.raw,
    commands_pb2.AdaptationCommand(
        command_type=enums_pb2.COMMAND_OPTIMIZER, optimizer_adjustment=OPTIMIZER_ADJUSTMENT.message
    ),
)
BREAKER_COMMAND = command(
    4,
    12,
    CIRCUIT_BREAKER.raw,
    commands_pb2.AdaptationCommand(
        command_type=enums_pb2.COMMAND_CIRCUIT_BREAKER, circuit_breaker=CIRCUIT_BREAKER.message
    ),
)
ROLLBACK_COMMAND = command(
    2,
    13,
    ROLLBACK.raw,
    commands_pb2.AdaptationCommand(command_type=enums_pb2.COMMAND_ROLLBACK, rollback_payload=ROLLBACK.message),
)

GOLDEN: list[Golden[Message]] = [
    Golden(golden.raw, golden.message)
    for golden in (
        HARDWARE, ALPHA, OLD_SEED, SEED, STATE, SEED_OPERATION, OPTIMIZER_ADJUSTMENT, CIRCUIT_BREAKER, SEED_COMMAND,
        OPTIMIZER_COMMAND, BREAKER_COMMAND, ROLLBACK_COMMAND, METRIC, EVENT, SPAN, HEALTH, PACKET, SIGNAL,
    )
]  # fmt: skip


def test_encoder_agrees_with_the_published_examples() -> None:
    """The encoder of these tests gives the bytes that the specification of the wire format prints."""
    assert uint(1, 150) == bytes.fromhex("089601")
    assert chunk(2, "testing") == bytes.fromhex("120774657374696e67")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: type(golden.message).__name__)
def test_packet_decodes_and_encodes_unchanged(golden: Golden[Message]) -> None:
    """Bytes built from field numbers mean what they should, and are written again byte for byte."""
    decoded = type(golden.message).FromString(golden.raw)

    assert decoded == golden.message
    assert decoded.SerializeToString(deterministic=True) == golden.raw


def test_every_field_of_every_fixed_message_is_on_the_wire() -> None:
    """No field is left out of the packets above: together they fill every message of the field."""
    present: dict[str, set[str]] = {}
    for golden in GOLDEN:
        names = present.setdefault(type(golden.message).__name__, set())
        names.update(field.name for field, _ in golden.message.ListFields())

    declared = {type(golden.message).__name__: set(golden.message.DESCRIPTOR.fields_by_name) for golden in GOLDEN}
    assert declared == present


def test_seed_of_an_older_peer_has_no_alpha_schedule() -> None:
    """A seed without field 22 is told from one whose schedule is all zeros."""
    schedule_of_zeros = seeds_pb2.SeedState.FromString(OLD_SEED.raw + chunk(22, b""))

    assert not seeds_pb2.SeedState.FromString(OLD_SEED.raw).HasField("alpha")
    assert schedule_of_zeros.HasField("alpha")


def test_last_payload_of_a_command_counts() -> None:
    """A command with two payloads holds the later one alone, as a oneof must."""
    decoded = commands_pb2.AdaptationCommand.FromString(chunk(10, SEED_OPERATION.raw) + chunk(12, CIRCUIT_BREAKER.raw))

    assert decoded.WhichOneof("payload") == "circuit_breaker"


def test_fields_of_a_newer_peer_survive() -> None:
    """Numbers that this version does not know, the reserved ones among them, pass through untouched."""
    raw = STATE.raw + chunk(150, "from the future")

    assert state_pb2.SystemStatePacket.FromString(raw).SerializeToString(deterministic=True) == raw


def test_enum_value_of_a_newer_peer_survives() -> None:
    """A stage without a name here keeps its number, so that it can be refused by number."""
    assert seeds_pb2.SeedState.FromString(uint(2, 77)).stage == 77


@pytest.mark.parametrize("golden", [STATE, SEED_COMMAND, PACKET], ids=["state", "command", "telemetry"])
def test_packet_cut_short_is_refused(golden: Golden[Message]) -> None:
    """Half a packet is an error, never a message with fields missing."""
    with pytest.raises(DecodeError):
        type(golden.message).FromString(golden.raw[:-1])
