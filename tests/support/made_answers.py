"""Answers of a Tamiyo and a Kasmina that lie, rave or stammer: strategies for hypothesis, dated as they are sent."""

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
from tolaria.peers.signing import sign

SECRET = b"key"
LASTS = "lr_expires_after_steps"

# What gets a command past the first checks, most of the time.
SENSE: dict[str, SearchStrategy[Any]] = {
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
            breaker=st.sampled_from(["tamiyo", "optimizer", "lr_integrity", "nobody"]),
            level=st.sampled_from(["halt", "2", "EMERGENCY_LEVEL_CONSERVATIVE", "notice", "9", "", "é"]),
        )
    ),
    "CommandOptimizerAdjustment.optimizer_id": st.sampled_from(["", "host", "seed:a", "nobody"]),
    "CommandOptimizerAdjustment.hyperparameters": weighted(
        (
            1,
            st.sampled_from(
                [{"lr": 0.01}, {"lr_factor": 0.9}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"lr": 0.02, LASTS: 3e38}]
            ),
        ),
        (
            1,
            st.dictionaries(
                st.sampled_from(["lr", "lr_factor", LASTS, "momentum", "weight_decay", "beta1", ""]),
                st.one_of(st.sampled_from([0.5, 0.01, 1.0, 0.0, 3e38, -1.0]), st.floats(width=32)),
                max_size=2,
            ),
        ),
    ),
    "CommandSeedOperation.operation": st.sampled_from([1, 2, 3, 7, 8, 9, 0, 77]),
    "CommandSeedOperation.parameters": st.sampled_from([{}, {}, {}, {"alpha": 1.0}, {"alpha": math.nan}]),
    "CommandCircuitBreaker.desired_state": st.sampled_from([0, 1, 2, 2, 3, 7]),
}
# Seeds that can live, mostly, and a few of which one thing cannot be meant.
SEED_SENSE: dict[str, SearchStrategy[Any]] = {
    "SeedState.seed_id": st.sampled_from(["a", "a", "b", "c"]),
    "SeedState.stage": st.sampled_from([2, 3, 3, 4, 4, 4, 6, 6, 7, 8, 11]),
    "SeedState.blueprint_id": st.sampled_from(["residual_mlp"] * 6 + ["", "lora", "depthwise_conv_adapter", "x"]),
    "SeedState.slot": st.sampled_from(["middle"] * 5 + ["", "nowhere"]),
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
SEED_NONSENSE = SEED_SENSE | {
    "SeedState.seed_id": st.sampled_from(
        ["a.b", "", "keys", "forward", "__class__", "_modules", "x" * 300, "\0", "é/"]
    ),
    "SeedState.stage": st.sampled_from([*SeedLifecycleStage.values(), 77, -1]),
    "SeedState.learning_rate": st.sampled_from([0.0, 0.0, 0.0, math.inf]),
    "SeedState.metrics": st.sampled_from([{}, {}, {}, {"": math.nan}]),
}
SEEDS = st.lists(weighted((12, messages(SeedState, SEED_SENSE)), (1, messages(SeedState, SEED_NONSENSE))), max_size=3)
KASMINAS = {"ApplyCommandResponse.seeds": SEEDS, "ExportSeedStatesResponse.seeds": SEEDS}

# The payload that goes with each type of command; of no matter for the others.
PAYLOADS: dict[int, tuple[str, type[Message]]] = {
    1: ("seed_operation", CommandSeedOperation),
    3: ("optimizer_adjustment", CommandOptimizerAdjustment),
    4: ("circuit_breaker", CommandCircuitBreaker),
}


def commands(kind: int) -> SearchStrategy[AdaptationCommand]:
    """Commands of one type, with its payload."""
    fixed: dict[str, SearchStrategy[Any]] = {"AdaptationCommand.command_type": st.just(kind)}
    if kind in PAYLOADS:
        name, payload = PAYLOADS[kind]
        fixed |= {f"AdaptationCommand.{other}": st.none() for other, _ in PAYLOADS.values()}
        fixed |= {"AdaptationCommand.rollback_payload": st.none()}
        fixed |= {f"AdaptationCommand.{name}": messages(payload, SENSE)}
    return messages(AdaptationCommand, SENSE | fixed)


@dataclass(frozen=True)
class Meant:
    """A command that is dated, signed and, if it is to be `fresh`, numbered as it is sent."""

    command: AdaptationCommand
    age_s: float | None
    signature: Literal["right", "wrong", "none"]
    fresh: bool

    def sent(self) -> EvaluateEpochResponse:
        """The answer that carries it. Without an age, its date is what was made up."""
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
    def doomed(self) -> bool:
        """Whether it must be refused, whatever else there is to it; signatures apart."""
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
    """What each method answers in one consultation.

    `late`: training has moved on too far when it settles. `replayed`: Tamiyo sends what was last carried out once more.
    """

    tamiyo: Meant | Answer
    apply: Answer
    export: Answer
    late: bool
    replayed: bool


def _errors() -> SearchStrategy[Answer]:
    return st.sampled_from([grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED])


def _raw(kind: type[Message], sense: int) -> SearchStrategy[Answer]:
    sensible = messages(kind, KASMINAS).map(lambda message: message.SerializeToString())
    mad = messages(kind).map(lambda message: message.SerializeToString())
    return weighted((sense, sensible), (1, mad), (1, wire(kind, KASMINAS)), (1, _errors()))


MEANT = st.builds(
    Meant,
    weighted(*[(2 if kind in PAYLOADS else 1, commands(kind)) for kind in (1, 2, 3, 4, 5, 6, 7, 0, 99)]),
    st.sampled_from([0.0] * 12 + [59.0, 61.0, -59.0, -61.0, 1e9, None]),
    st.sampled_from(["right"] * 6 + ["wrong", "none"]),
    st.sampled_from([True] * 5 + [False]),
)
CASES = st.builds(
    Case,
    weighted((6, MEANT), (1, _raw(EvaluateEpochResponse, 0))),
    _raw(ApplyCommandResponse, 8),
    _raw(ExportSeedStatesResponse, 8),
    st.sampled_from([False] * 5 + [True]),
    st.sampled_from([False] * 5 + [True]),
)
