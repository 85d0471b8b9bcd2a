from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_CIRCUIT_BREAKER,
    COMMAND_OPTIMIZER,
    COMMAND_PAUSE,
    COMMAND_SEED,
    COMMAND_STRUCTURAL_PRUNING,
    SEED_STAGE_TRAINING,
    CommandType,
    SeedLifecycleStage,
)
from leyline.v1.seeds_pb2 import SeedState
from support.peers import command
from tolaria.config import LeylineSettings, Settings
from tolaria.errors import CommandRejectedError, PeerProtocolError
from tolaria.peers.verification import REJECTION_REASONS, SEEDS_MAX, CommandVerifier, sign, verify_seeds


def rejection(given_command: AdaptationCommand, *, secret: str = "", late_s: float = 0.0) -> str:
    """Returns the reason of a command's rejection; empty if it passes."""
    verifier = CommandVerifier(LeylineSettings(secret=SecretStr(secret)))
    try:
        verifier.verify(given_command, wall_s=time.time() + late_s, now_s=0.0)
    except CommandRejectedError as error:
        return error.reason
    return ""


def spoilt(kind: CommandType.ValueType, spoil: Callable[[AdaptationCommand], object]) -> AdaptationCommand:
    """Returns a valid command of the kind, changed by `spoil`."""
    made = command(kind)
    spoil(made)
    return made


def nan_parameter(made: AdaptationCommand) -> None:
    """Sets a parameter of the seed operation to NaN."""
    made.seed_operation.parameters["alpha"] = float("nan")


def infinite_rate(made: AdaptationCommand) -> None:
    """Sets an infinite learning rate."""
    made.optimizer_adjustment.hyperparameters["lr"] = float("inf")


@pytest.mark.parametrize(
    ("reason", "made"),
    [
        ("", lambda: command(COMMAND_PAUSE)),
        ("", lambda: command(COMMAND_SEED)),
        ("oversized", lambda: spoilt(COMMAND_PAUSE, lambda c: setattr(c, "issued_by", "x" * 70_000))),
        ("wrong_version", lambda: command(version=2)),
        ("wrong_version", lambda: command(version=0)),
        ("no_id", lambda: command(command_id="")),
        ("unknown_type", lambda: command(command_type=0)),
        ("unknown_type", lambda: command(command_type=99)),
        ("unsupported", lambda: command(COMMAND_STRUCTURAL_PRUNING)),
        ("malformed", lambda: command(COMMAND_OPTIMIZER)),
        ("malformed", lambda: command(COMMAND_CIRCUIT_BREAKER)),
        ("malformed", lambda: spoilt(COMMAND_SEED, lambda c: c.ClearField("seed_operation"))),
        ("malformed", lambda: spoilt(COMMAND_SEED, lambda c: setattr(c.seed_operation, "operation", 0))),
        ("malformed", lambda: spoilt(COMMAND_SEED, lambda c: setattr(c.seed_operation, "operation", 77))),
        ("not_finite", lambda: spoilt(COMMAND_SEED, nan_parameter)),
        ("not_finite", lambda: spoilt(COMMAND_OPTIMIZER, infinite_rate)),
        ("stale", lambda: spoilt(COMMAND_PAUSE, lambda c: c.ClearField("issued_at"))),
    ],
)
def test_each_check_has_its_reason(reason: str, made: Callable[[], AdaptationCommand]) -> None:
    """A rejected command gets the stable reason of the check that failed."""
    assert rejection(made()) == reason  # made here: a command ages
    assert reason in {"", *REJECTION_REASONS}


@pytest.mark.parametrize(("late_s", "reason"), [(59.0, ""), (61.0, "stale"), (-59.0, ""), (-61.0, "stale")])
def test_commands_must_be_issued_within_a_minute(late_s: float, reason: str) -> None:
    """Commands more than 60 s old, or more than 60 s in the future, are stale."""
    assert rejection(command(), late_s=late_s) == reason


@pytest.mark.parametrize(("late_s", "reason"), [(0.4, ""), (0.6, "deadline_passed")])
def test_the_execution_deadline_counts_from_the_time_of_issue(late_s: float, reason: str) -> None:
    """A command that arrives after its own deadline is rejected."""
    assert rejection(command(execution_deadline_ms=500), late_s=late_s) == reason


def test_with_a_secret_only_signed_commands_pass() -> None:
    """Unsigned and wrongly signed commands are rejected as such, whatever else is wrong with them."""
    signed = command()
    sign(signed, b"key")
    assert rejection(signed, secret="key") == ""
    assert rejection(signed, secret="other") == "unsigned"
    assert rejection(command(version=9), secret="key") == "unsigned"


def test_a_replay_is_rejected_and_a_rejected_command_does_not_use_up_its_id() -> None:
    """An accepted command is rejected the second time; a rejected one may be sent again, corrected."""
    verifier = CommandVerifier(LeylineSettings())
    good = command()
    forged = AdaptationCommand()
    forged.CopyFrom(good)
    forged.version = 7
    with pytest.raises(CommandRejectedError, match="wrong_version"):
        verifier.verify(forged, wall_s=time.time(), now_s=0.0)
    verifier.verify(good, wall_s=time.time(), now_s=1.0)
    with pytest.raises(CommandRejectedError, match="replayed"):
        verifier.verify(good, wall_s=time.time(), now_s=2.0)


@pytest.mark.parametrize("later_s", [60.0, 61.0, 119.0, 120.0, 121.0])
def test_no_replay_passes_with_the_shortest_allowed_window(later_s: float) -> None:
    """A command from a minute in the future is fresh for two minutes, for which its id is remembered."""
    leyline = Settings(leyline=LeylineSettings(freshness_s=60.0, nonce_window_s=120.0)).leyline
    verifier = CommandVerifier(leyline)
    ahead = command()
    ahead.issued_at.FromSeconds(1_700_000_060)
    verifier.verify(ahead, wall_s=1_700_000_000.0, now_s=0.0)
    with pytest.raises(CommandRejectedError) as caught:
        verifier.verify(ahead, wall_s=1_700_000_000.0 + later_s, now_s=later_s)
    assert caught.value.reason == ("replayed" if later_s <= 120 else "stale")


@given(st.binary(max_size=200))
def test_arbitrary_commands_pass_or_are_rejected(raw: bytes) -> None:
    """Any bytes that decode as a command either pass or raise CommandRejectedError."""
    made = AdaptationCommand()
    try:
        made.ParseFromString(raw)
    except Exception:  # noqa: BLE001 - bytes that do not decode never reach the verifier
        return
    assert rejection(made) in {"", *REJECTION_REASONS}


def seed(seed_id: str = "a", stage: SeedLifecycleStage.ValueType = SEED_STAGE_TRAINING) -> SeedState:
    """Returns a valid seed, unless its id or stage is invalid."""
    return SeedState(seed_id=seed_id, stage=stage)


def seed_with(**fields: float) -> SeedState:
    """Returns a seed with these numbers."""
    return SeedState(seed_id="a", stage=SEED_STAGE_TRAINING, **fields)  # type: ignore[arg-type]


def seed_with_metric(value: float) -> SeedState:
    """Returns a seed with this number among its metrics."""
    made = seed()
    made.metrics["alpha"] = value
    return made


def seed_with_alpha(value: float) -> SeedState:
    """Returns a seed whose blending ends at this alpha."""
    made = seed()
    made.alpha.end = value
    return made


NAN = float("nan")


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ("has no id", [seed("")]),
        ("is there twice", [seed("a"), seed("b"), seed("a")]),
        ("has unknown stage 0", [seed("a", 0)]),  # type: ignore[arg-type]
        ("has unknown stage 12", [seed("a", 12)]),  # type: ignore[arg-type]
        ("is not finite", [seed_with(learning_rate=NAN)]),
        ("is not finite", [seed_with(gradient_norm=float("inf"))]),
        ("is not finite", [seed_with_metric(NAN)]),
        ("is not finite", [seed_with_alpha(NAN)]),
        ("is one more than", [seed(str(number)) for number in range(SEEDS_MAX + 1)]),
    ],
)
def test_invalid_seeds_raise_a_protocol_error(words: str, seeds: list[SeedState]) -> None:
    """The error names the seed and what is wrong with it."""
    with pytest.raises(PeerProtocolError, match=words):
        verify_seeds("kasmina", seeds)


def test_valid_seeds_keep_their_order() -> None:
    """Valid seeds are returned unchanged, in order."""
    assert [s.seed_id for s in verify_seeds("kasmina", [seed("b"), seed("a")])] == ["b", "a"]
