"""The names, numbers and types that peers in the field rely on, compared with the descriptors.

Owns the tables of the contract, written out by hand. Must not know how messages are used.
"""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default

# Importing a service's module registers everything that it imports, which together is the whole contract.
from leyline.v1 import admin_service_pb2, emergency_pb2, kasmina_service_pb2, rollback_service_pb2, tamiyo_service_pb2

FILES = (admin_service_pb2, emergency_pb2, kasmina_service_pb2, rollback_service_pb2, tamiyo_service_pb2)

# enum -> "prefix of its values: values in the order of their numbers, from 0"
ENUMS = {
    "SeedLifecycleStage": "SEED_STAGE_: UNKNOWN DORMANT GERMINATED TRAINING BLENDING SHADOWING PROBATIONARY FOSSILIZED"
    " CULLED EMBARGOED RESETTING TERMINATED",
    "SeedLifecycleGate": "SEED_GATE_: UNKNOWN G0_SANITY G1_GRADIENT_HEALTH G2_STABILITY G3_INTERFACE G4_SYSTEM_IMPACT"
    " G5_RESET",
    "HealthStatus": "HEALTH_STATUS_: UNKNOWN HEALTHY DEGRADED UNHEALTHY CRITICAL",
    "CircuitBreakerState": "CIRCUIT_STATE_: UNKNOWN CLOSED OPEN HALF_OPEN",
    "CommandType": "COMMAND_: UNKNOWN SEED ROLLBACK OPTIMIZER CIRCUIT_BREAKER PAUSE EMERGENCY STRUCTURAL_PRUNING",
    "SeedOperation": "SEED_OP_: UNKNOWN GERMINATE START_TRAINING START_GRAFTING STABILIZE EVALUATE FINE_TUNE FOSSILIZE"
    " CULL CANCEL",
    "MessagePriority": "MESSAGE_PRIORITY_: UNSPECIFIED LOW NORMAL HIGH CRITICAL",
    "TelemetryLevel": "TELEMETRY_LEVEL_: UNSPECIFIED INFO WARNING ERROR CRITICAL",
    "EmergencyLevel": "EMERGENCY_LEVEL_: UNSPECIFIED NOTICE ELEVATED CONSERVATIVE HALT",
    "RollbackTier": "ROLLBACK_TIER_: UNSPECIFIED FAST FULL",
    "ExportFormat": "EXPORT_FORMAT_: UNSPECIFIED SAFETENSORS HF TORCH",
    "RunState": "RUN_STATE_: UNSPECIFIED STARTING RUNNING PAUSED HALTED DRAINING FINISHED FAILED RECOVERING",
    "TelemetryKind": "TELEMETRY_KIND_: UNSPECIFIED EPOCH EVENT EMERGENCY",
}

# message -> its fields as "type name number"
MESSAGES = {
    "HardwareContext": "string device_type 1, string device_id 2, float total_memory_gb 3, float available_memory_gb 4,"
    " float temperature_celsius 5, float utilization_percent 6, uint32 compute_capability 7",
    "SeedState": "string seed_id 1, SeedLifecycleStage stage 2, float gradient_norm 3, float learning_rate 4,"
    " uint32 layer_depth 5, map<string,float> metrics 6, uint32 age_epochs 7, float risk_score 8,"
    " string blueprint_id 20, string slot 21, AlphaSchedule alpha 22, float attribution 23,"
    " repeated string parameters 24",
    "AlphaSchedule": "float start 1, float end 2, uint64 begin_step 3, uint64 duration_steps 4",
    "SystemStatePacket": "uint32 version 1, uint32 current_epoch 2, float validation_accuracy 3,"
    " float validation_loss 4, uint64 timestamp_ns 5, HardwareContext hardware_context 6,"
    " map<string,float> training_metrics 7, repeated SeedState seed_states 8, string packet_id 9,"
    " uint64 global_step 10, float training_loss 11, string source_subsystem 12, string training_run_id 13,"
    " string experiment_name 14",
    "CommandSeedOperation": "SeedOperation operation 1, string blueprint_id 2, map<string,float> parameters 3",
    "CommandOptimizerAdjustment": "string optimizer_id 1, map<string,float> hyperparameters 2",
    "CommandCircuitBreaker": "CircuitBreakerState desired_state 1, string rationale 2",
    "AdaptationCommand": "uint32 version 1, string command_id 2, CommandType command_type 3, string target_seed_id 4,"
    " uint32 execution_deadline_ms 5, google.protobuf.Timestamp issued_at 6, string issued_by 7,"
    " payload: CommandSeedOperation seed_operation 10, payload: CommandOptimizerAdjustment optimizer_adjustment 11,"
    " payload: CommandCircuitBreaker circuit_breaker 12, payload: google.protobuf.Struct rollback_payload 13,"
    " map<string,string> annotations 20",
    "MetricPoint": "string name 1, double value 2, string unit 3, map<string,string> attributes 4",
    "TelemetryEvent": "string event_id 1, string description 2, TelemetryLevel level 3,"
    " map<string,string> attributes 4",
    "TraceSpan": "string span_id 1, string parent_span_id 2, string name 3, google.protobuf.Timestamp start_time 4,"
    " google.protobuf.Timestamp end_time 5, map<string,string> attributes 6",
    "SystemHealth": "HealthStatus status 1, string summary 2, map<string,string> indicators 3",
    "TelemetryPacket": "string packet_id 1, google.protobuf.Timestamp timestamp 2, string source_subsystem 3,"
    " TelemetryLevel level 4, repeated MetricPoint metrics 10, repeated TelemetryEvent events 20,"
    " repeated TraceSpan spans 30, SystemHealth system_health 40, MessagePriority priority 50",
    "EmergencySignal": "uint32 version 1, EmergencyLevel level 2, string reason 3, string origin 4,"
    " google.protobuf.Timestamp triggered_at 5, uint64 monotonic_time_ms 6, string run_id 7,"
    " map<string,string> attributes 8, bytes payload_checksum 9",
}

# What an answer or a request must hold where the contract names its fields but leaves their numbers open.
NAMED_FIELDS = {
    "EvaluateEpochRequest": "state",
    "EvaluateEpochResponse": "command",
    "EvaluateStepRequest": "state",
    "EvaluateStepResponse": "command",
    "ApplyCommandRequest": "command state",
    "ApplyCommandResponse": "seeds applied detail",
    "ExportSeedStatesResponse": "seeds",
    "TriggerRollbackRequest": "request_id tier target_step reason",
    "TriggerRollbackResponse": "rollback_id tier restored_step state_digest expected_digest latency_ms",
    "RaiseEmergencyRequest": "request_id level reason",
    "StreamTelemetryRequest": "level name_prefixes kinds replay_critical",
    "StreamTelemetryResponse": "packet",
    "GetStatusResponse": "run_id state epoch global_step training_loss validation_accuracy conservative_reasons"
    " emergency_level breakers learning_rates seeds last_boundary_ms health",
}

SERVICES = {
    "TamiyoService": "EvaluateEpoch EvaluateStep",
    "KasminaService": "ApplyCommand ExportSeedStates",
    "RollbackParticipantService": "PrepareRollback CommitRollback ConfirmRollback AbortRollback",
    "TolariaAdminService": "GetStatus WatchStatus PauseTraining ResumeTraining StopTraining TriggerRollback"
    " ListRestorePoints CreateCheckpoint RaiseEmergency ClearEmergency ListIncidents SetConservativeMode"
    " AdjustLearningRate CaptureProfile ListAdminCalls ExportModel SkipData ListDataSkips StreamTelemetry"
    " ReloadConfig Shutdown",
}
STREAMING = {"WatchStatus", "StreamTelemetry"}
READING = {
    *("GetStatus", "WatchStatus", "ListRestorePoints", "ListIncidents", "ListAdminCalls", "ListDataSkips"),
    "StreamTelemetry",
}

_kind_names: dict[int, str] = {
    number: name.removeprefix("TYPE_").lower() for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}


def _methods(service: str) -> list[MethodDescriptor]:
    return list(Default().FindServiceByName(f"leyline.v1.{service}").methods)


def _kind(field: FieldDescriptor) -> str:
    if field.enum_type is not None:
        return field.enum_type.name
    if field.message_type is not None:
        return field.message_type.full_name.removeprefix("leyline.v1.")
    return _kind_names[field.type]


def _line(field: FieldDescriptor) -> str:
    """One field in the notation of MESSAGES."""
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        key, value = (_kind(entry.fields_by_name[name]) for name in ("key", "value"))
        return f"map<{key},{value}> {field.name} {field.number}"
    repeated = "repeated " if field.is_repeated else ""
    oneof = f"{field.containing_oneof.name}: " if field.containing_oneof else ""
    return f"{oneof}{repeated}{_kind(field)} {field.name} {field.number}"


def _field(message: str, name: str) -> FieldDescriptor | None:
    return Default().FindMessageTypeByName(f"leyline.v1.{message}").fields_by_name.get(name)


@pytest.mark.parametrize("enum", ENUMS)
def test_enum_has_exactly_the_agreed_values(enum: str) -> None:
    """Each enum holds the agreed names under the agreed numbers, and nothing else."""
    prefix, names = ENUMS[enum].split(": ")
    expected = {f"{prefix}{name}": number for number, name in enumerate(names.split())}

    actual = {value.name: value.number for value in Default().FindEnumTypeByName(f"leyline.v1.{enum}").values}

    assert expected == actual


@pytest.mark.parametrize("message", MESSAGES)
def test_message_has_exactly_the_agreed_fields(message: str) -> None:
    """Each message of the field holds the agreed fields, numbers and types, and nothing else."""
    actual = [_line(field) for field in Default().FindMessageTypeByName(f"leyline.v1.{message}").fields]

    assert MESSAGES[message].split(", ") == actual


def test_no_enum_is_missing_from_the_table() -> None:
    """An enum added to the contract has to be added to the table of this file as well."""
    actual = {name for file in _file_names() for name in Default().FindFileByName(file).enum_types_by_name}

    assert set(ENUMS) == actual


def test_state_packet_reserves_100_to_199() -> None:
    """The numbers 100 to 199 of SystemStatePacket are kept for the field and are used by nothing."""
    proto = descriptor_pb2.DescriptorProto()
    Default().FindMessageTypeByName("leyline.v1.SystemStatePacket").CopyToProto(proto)

    # A descriptor's end is exclusive.
    assert [(kept.start, kept.end) for kept in proto.reserved_range] == [(100, 200)]


@pytest.mark.parametrize("message", NAMED_FIELDS)
def test_request_or_answer_holds_its_named_fields(message: str) -> None:
    """Fields that the contract names without a number exist under those names."""
    assert all(_field(message, name) for name in NAMED_FIELDS[message].split())


def test_services_are_exactly_the_agreed_ones() -> None:
    """No service is missing, none has been added unseen."""
    actual = {name for file in _file_names() for name in Default().FindFileByName(file).services_by_name}

    assert set(SERVICES) == actual


@pytest.mark.parametrize("service", SERVICES)
def test_service_has_exactly_the_agreed_calls(service: str) -> None:
    """Each call has its own request and response; only the two watching calls stream, and only their answers."""
    expected = {
        name: (f"{name}Request", f"{name}Response", False, name in STREAMING) for name in SERVICES[service].split()
    }

    actual = {
        method.name: (method.input_type.name, method.output_type.name, method.client_streaming, method.server_streaming)
        for method in _methods(service)
    }

    assert expected == actual


@pytest.mark.parametrize("call", [name for name in SERVICES["TolariaAdminService"].split() if name not in READING])
def test_mutating_call_is_idempotent_and_accountable(call: str) -> None:
    """What changes a run names its request and its reason, and is answered with the step at which it took effect."""
    fields = [
        _field(f"{call}Request", "request_id"),
        _field(f"{call}Request", "reason"),
        _field(f"{call}Response", "global_step"),
    ]

    assert [field and _kind(field) for field in fields] == ["string", "string", "uint64"]


@pytest.mark.parametrize("call", SERVICES["RollbackParticipantService"].split())
def test_rollback_call_names_rollback_step_reason_and_deadline(call: str) -> None:
    """Every phase of a rollback tells all of it, so that a participant that missed one still knows what is due."""
    actual = [_line(field) for field in Default().FindMessageTypeByName(f"leyline.v1.{call}Request").fields]

    assert actual == ["string rollback_id 1", "uint64 target_step 2", "string reason 3", "uint32 deadline_ms 4"]


def test_restore_step_can_be_absent() -> None:
    """Step 0 and no step at all are different requests to roll back."""
    field = _field("TriggerRollbackRequest", "target_step")

    assert field is not None
    assert field.has_presence


def _file_names() -> set[str]:
    """Every file of the contract that the modules above bring in."""
    seen: set[str] = set()
    waiting = [file.DESCRIPTOR for file in FILES]
    while waiting:
        file = waiting.pop()
        if file.name.startswith("leyline/") and file.name not in seen:
            seen.add(file.name)
            waiting.extend(file.dependencies)
    return seen
