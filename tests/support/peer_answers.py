"""Hypothesis strategies for valid, invalid and malformed answers of Tamiyo and Kasmina."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.protobuf.message import Message
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from leyline.v1.commands_pb2 import (
    AdaptationCommand,
    CommandCircuitBreaker,
    CommandOptimizerAdjustment,
    CommandSeedOperation,
)
from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse, ExportSeedStatesResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.tamiyo_service_pb2 import EvaluateEpochResponse
from support.fuzz import messages, weighted, wire
from support.raw_peers import Answer
from tolaria.peers.verification import sign

SECRET = b"key"
EXPIRES_AFTER = "lr_expires_after_steps"

# Values with which most commands pass the first checks.
PLAUSIBLE: dict[str, SearchStrategy[Any]] = {
    "AdaptationCommand.version": st.sampled_from([1] * 9 + [0, 2]),
    "AdaptationCommand.command_id": st.sampled_from(["one", "two", "three", "", "🜍" * 50]),
    "AdaptationCommand.execution_deadline_ms": st.sampled_from([0, 0, 0, 1, 60_000, 2**32 - 1]),
    "AdaptationCommand.issued_by": st.sampled_from(["", "tamiyo", "x" * 300] * 6 + ["x" * 70_000]),
    "AdaptationCommand.annotations": st.dictionaries(
        st.sampled_from(["reason", "signature", "x"]), st.text(max_size=9)
    ).flatmap(
        lambda others: st.builds(
            dict,
            st.just(others),
            breaker=st.sampled_from(["tamiyo", "optimizer", "lr_integrity", "unknown"]),
            level=st.sampled_from(["halt", "2", "EMERGENCY_LEVEL_CONSERVATIVE", "notice", "9", "", "é"]),
        )
    ),
    "CommandOptimizerAdjustment.optimizer_id": st.sampled_from(["", "host", "seed:a", "unknown"]),
    "CommandOptimizerAdjustment.hyperparameters": weighted(
        (
            1,
            st.sampled_from(
                [
                    {"lr": 0.01},
                    {"lr_factor": 0.9},
                    {"momentum": 0.5},
                    {"weight_decay": 0.1},
                    {"lr": 0.02, EXPIRES_AFTER: 3e38},
                ]
            ),
        ),
        (
            1,
            st.dictionaries(
                st.sampled_from(["lr", "lr_factor", EXPIRES_AFTER, "momentum", "weight_decay", "beta1", ""]),
                st.one_of(st.sampled_from([0.5, 0.01, 1.0, 0.0, 3e38, -1.0]), st.floats(width=32)),
                max_size=2,
            ),
        ),
    ),
    "CommandSeedOperation.operation": st.sampled_from([1, 2, 3, 7, 8, 9, 0, 77]),
    "CommandSeedOperation.parameters": st.sampled_from([{}, {}, {}, {"alpha": 1.0}, {"alpha": math.nan}]),
    "CommandCircuitBreaker.desired_state": st.sampled_from([0, 1, 2, 2, 3, 7]),
}
# Mostly valid seeds; a few have one invalid value.
PLAUSIBLE_SEED: dict[str, SearchStrategy[Any]] = {
    "SeedState.seed_id": st.sampled_from(["a", "a", "b", "c"]),
    "SeedState.stage": st.sampled_from([2, 3, 3, 4, 4, 4, 6, 6, 7, 8, 11]),
    "SeedState.blueprint_id": st.sampled_from(["residual_mlp"] * 6 + ["", "lora", "depthwise_conv_adapter", "x"]),
    "SeedState.slot": st.sampled_from(["middle"] * 5 + ["", "unknown"]),
    "SeedState.alpha": st.one_of(
        st.none(),
        st.builds(
            dict,
            start=st.sampled_from([0.0] * 6 + [1.0, -1.0]),
            end=st.sampled_from([1.0, 1.0, 0.5, 2.0]),
            begin_step=st.sampled_from([0, 5, 2**64 - 1]),
            duration_steps=st.sampled_from([0, 1, 3, 2**64 - 1]),
        ),
    ),
    "SeedState.gradient_norm": st.just(0.0),
    "SeedState.learning_rate": st.just(0.0),
    "SeedState.attribution": st.sampled_from([0.0] * 5 + [0.5, -1.0, 3e38]),
    "SeedState.risk_score": st.just(0.0),
    "SeedState.metrics": st.sampled_from([{}, {}, {"alpha": 0.25}, {"alpha": 9.0}]),
}
INVALID_SEED = PLAUSIBLE_SEED | {
    "SeedState.seed_id": st.sampled_from(
        ["a.b", "", "keys", "forward", "__class__", "_modules", "x" * 300, "\0", "é/"]
    ),
    "SeedState.stage": st.sampled_from([*SeedLifecycleStage.values(), 77, -1]),
    "SeedState.learning_rate": st.sampled_from([0.0, 0.0, 0.0, math.inf]),
    "SeedState.metrics": st.sampled_from([{}, {}, {}, {"": math.nan}]),
}
SEEDS = st.lists(
    weighted((12, messages(SeedState, PLAUSIBLE_SEED)), (1, messages(SeedState, INVALID_SEED))), max_size=3
)
KASMINA_FIELDS = {"ApplyCommandResponse.seeds": SEEDS, "ExportSeedStatesResponse.seeds": SEEDS}

# The payload that each type of command requires; other types have none.
PAYLOADS: dict[int, tuple[str, type[Message]]] = {
    1: ("seed_operation", CommandSeedOperation),
    3: ("optimizer_adjustment", CommandOptimizerAdjustment),
    4: ("circuit_breaker", CommandCircuitBreaker),
}


def commands(kind: int) -> SearchStrategy[AdaptationCommand]:
    """Returns a strategy for commands of one type, with its payload."""
    fixed: dict[str, SearchStrategy[Any]] = {"AdaptationCommand.command_type": st.just(kind)}
    if kind in PAYLOADS:
        name, payload = PAYLOADS[kind]
        fixed |= {f"AdaptationCommand.{other}": st.none() for other, _ in PAYLOADS.values()}
        fixed |= {"AdaptationCommand.rollback_payload": st.none()}
        fixed |= {f"AdaptationCommand.{name}": messages(payload, PLAUSIBLE)}
    return messages(AdaptationCommand, PLAUSIBLE | fixed)


@dataclass(frozen=True)
class SentCommand:
    """A command that gets its time, signature and, if `fresh`, a new id when it is sent."""

    command: AdaptationCommand
    age_s: float | None
    signature: Literal["right", "wrong", "none"]
    fresh: bool

    def sent(self) -> EvaluateEpochResponse:
        """Returns the response with the command. Without an age the generated time is kept."""
        made = AdaptationCommand()
        made.CopyFrom(self.command)
        if self.fresh:
            made.command_id = uuid.uuid4().hex
        if self.age_s is not None:
            made.issued_at.FromNanoseconds(time.time_ns() - int(self.age_s * 1e9))
        if self.signature != "none":
            sign(made, SECRET if self.signature == "right" else b"another")
        return EvaluateEpochResponse(command=made)

    @property
    def must_be_refused(self) -> bool:
        """Whether it must be refused regardless of its other fields; signatures are not considered."""
        good_type = 0 < self.command.command_type < 7
        fresh = self.age_s is not None and abs(self.age_s) < 60
        undated = self.age_s is None and not self.command.HasField("issued_at")
        return (
            self.command.version != 1
            or not (self.command.command_id or self.fresh)
            or not good_type
            or undated
            or (self.age_s is not None and not fresh)
            or len(self.command.issued_by) > 64 * 1024
        )


@dataclass(frozen=True)
class Case:
    """The answer of each method in one consultation.

    `late`: the state is too old when the consultation settles. `replayed`: Tamiyo repeats the last applied command.
    """

    tamiyo: SentCommand | Answer
    apply: Answer
    export: Answer
    late: bool
    replayed: bool


def _errors() -> SearchStrategy[Answer]:
    return st.sampled_from([grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED])


def _raw(kind: type[Message], weight_of_plausible: int) -> SearchStrategy[Answer]:
    plausible = messages(kind, KASMINA_FIELDS).map(lambda message: message.SerializeToString())
    arbitrary = messages(kind).map(lambda message: message.SerializeToString())
    return weighted((weight_of_plausible, plausible), (1, arbitrary), (1, wire(kind, KASMINA_FIELDS)), (1, _errors()))


SENT_COMMANDS = st.builds(
    SentCommand,
    weighted(*[(2 if kind in PAYLOADS else 1, commands(kind)) for kind in (1, 2, 3, 4, 5, 6, 7, 0, 99)]),
    st.sampled_from([0.0] * 12 + [59.0, 61.0, -59.0, -61.0, 1e9, None]),
    st.sampled_from(["right"] * 6 + ["wrong", "none"]),
    st.sampled_from([True] * 5 + [False]),
)
CASES = st.builds(
    Case,
    weighted((6, SENT_COMMANDS), (1, _raw(EvaluateEpochResponse, 0))),
    _raw(ApplyCommandResponse, 8),
    _raw(ExportSeedStatesResponse, 8),
    st.sampled_from([False] * 5 + [True]),
    st.sampled_from([False] * 5 + [True]),
)
