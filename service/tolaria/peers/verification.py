"""What a command must be before anything acts on it, and what a set of desired seeds must be.

Owns the checks, their order and their stable reason names. Must not know how commands are carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import (
    COMMAND_CIRCUIT_BREAKER,
    COMMAND_EMERGENCY,
    COMMAND_OPTIMIZER,
    COMMAND_PAUSE,
    COMMAND_ROLLBACK,
    COMMAND_SEED,
    SEED_OP_UNKNOWN,
    SEED_STAGE_UNKNOWN,
    CommandType,
    SeedLifecycleStage,
    SeedOperation,
)
from leyline.v1.seeds_pb2 import SeedState
from tolaria.config import LeylineSettings
from tolaria.errors import CommandRejectedError, PeerProtocolError
from tolaria.peers.signing import NonceTable, is_signed

CONTRACT_VERSION = 1
COMMAND_BYTES_MAX = 64 * 1024
SEEDS_MAX = 256

# Which payload each type carries; None: it needs none. Types that are absent are refused as unsupported.
PAYLOAD_OF: dict[CommandType.ValueType, str | None] = {
    COMMAND_SEED: "seed_operation",
    COMMAND_ROLLBACK: None,
    COMMAND_OPTIMIZER: "optimizer_adjustment",
    COMMAND_CIRCUIT_BREAKER: "circuit_breaker",
    COMMAND_PAUSE: None,
    COMMAND_EMERGENCY: None,
}


@dataclass(frozen=True, slots=True)
class Trust:
    """What is asked of a command. Times in seconds; no secrets: signatures are not asked for."""

    secrets: tuple[bytes, ...] = ()
    freshness_s: float = 60.0


class CommandVerifier:
    """Checks commands one after the other; remembers their ids."""

    def __init__(self, trust: Trust, nonces: NonceTable) -> None:
        self._trust = trust
        self._nonces = nonces

    def verify(self, command: AdaptationCommand, *, wall_s: float, now_s: float) -> None:
        """Pass or raise. `wall_s` is Unix time, `now_s` a monotonic clock for the memory of ids.

        Raises:
            CommandRejectedError: with the first check that failed as its reason.
        """
        for reason, holds in _CHECKS:
            if not holds(command, self._trust, wall_s):
                raise CommandRejectedError(reason, command.command_id, _describe(command))
        # Last, so that a forged command cannot use up the id of a real one.
        if not self._nonces.first_seen(command.command_id, now_s=now_s):
            raise CommandRejectedError("replayed", command.command_id, _describe(command))


def new_verifier(leyline: LeylineSettings) -> CommandVerifier:
    """A verifier that trusts what the settings say."""
    secrets = tuple(s.get_secret_value().encode() for s in (leyline.secret, leyline.previous_secret) if s)
    trust = Trust(secrets=secrets, freshness_s=leyline.freshness_s)
    return CommandVerifier(trust, NonceTable(window_s=leyline.nonce_window_s))


def verify_seeds(peer: str, seeds: Iterable[SeedState]) -> list[SeedState]:
    """The desired seeds, if they can be meant.

    Raises:
        PeerProtocolError: on too many seeds, empty or double ids, unknown stages, numbers that are not finite.
    """
    checked: dict[str, SeedState] = {}
    for seed in seeds:
        problem = _problem_of(seed, checked)
        if problem:
            raise PeerProtocolError(peer, f"seed {seed.seed_id!r} {problem}")
        checked[seed.seed_id] = seed
    return list(checked.values())


def _problem_of(seed: SeedState, before: Mapping[str, SeedState]) -> str:
    numbers = (
        seed.gradient_norm, seed.learning_rate, seed.risk_score, seed.attribution,
        seed.alpha.start, seed.alpha.end, *seed.metrics.values(),
    )  # fmt: skip
    problems = (
        (len(before) >= SEEDS_MAX, f"is one more than {SEEDS_MAX}"),
        (not seed.seed_id, "has no id"),
        (seed.seed_id in before, "is there twice"),
        (not _is_known(SeedLifecycleStage, seed.stage, SEED_STAGE_UNKNOWN), f"has unknown stage {seed.stage}"),
        (not all(math.isfinite(n) for n in numbers), "has a number that is not finite"),
    )
    return next((problem for found, problem in problems if found), "")


def _is_small(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    return command.ByteSize() <= COMMAND_BYTES_MAX


def _is_authentic(command: AdaptationCommand, trust: Trust, _wall_s: float) -> bool:
    return not trust.secrets or is_signed(command, trust.secrets)


def _has_version(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    return command.version == CONTRACT_VERSION


def _has_id(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    return bool(command.command_id)


def _has_known_type(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    return command.command_type in CommandType.values() and command.command_type != 0


def _is_supported(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    return command.command_type in PAYLOAD_OF


def _has_its_payload(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    wanted = PAYLOAD_OF[command.command_type]
    if wanted is not None and command.WhichOneof("payload") != wanted:
        return False
    return wanted != "seed_operation" or _is_known(SeedOperation, command.seed_operation.operation, SEED_OP_UNKNOWN)


def _is_finite(command: AdaptationCommand, _trust: Trust, _wall_s: float) -> bool:
    numbers = [*command.seed_operation.parameters.values(), *command.optimizer_adjustment.hyperparameters.values()]
    return all(math.isfinite(number) for number in numbers)


def _is_fresh(command: AdaptationCommand, trust: Trust, wall_s: float) -> bool:
    # A clock ahead of ours is as suspicious as an old command: both ways of the window count.
    return command.HasField("issued_at") and abs(wall_s - _issued_s(command)) <= trust.freshness_s


def _is_in_time(command: AdaptationCommand, _trust: Trust, wall_s: float) -> bool:
    deadline_s = command.execution_deadline_ms / 1000
    return deadline_s == 0 or wall_s <= _issued_s(command) + deadline_s


def _issued_s(command: AdaptationCommand) -> float:
    return command.issued_at.seconds + command.issued_at.nanos / 1e9


def _is_known(enum: object, value: int, unknown: int) -> bool:
    return value != unknown and value in enum.values()  # type: ignore[attr-defined] # protobuf's enum wrappers share no base


def _describe(command: AdaptationCommand) -> str:
    return f"command {command.command_id!r} of type {command.command_type} by {command.issued_by!r}"


# Authenticity first: nothing else about a forged command is worth telling.
_CHECKS: tuple[tuple[str, Callable[[AdaptationCommand, Trust, float], bool]], ...] = (
    ("oversized", _is_small),
    ("unsigned", _is_authentic),
    ("wrong_version", _has_version),
    ("no_id", _has_id),
    ("unknown_type", _has_known_type),
    ("unsupported", _is_supported),
    ("malformed", _has_its_payload),
    ("not_finite", _is_finite),
    ("stale", _is_fresh),
    ("deadline_passed", _is_in_time),
)
REJECTION_REASONS = (*(reason for reason, _ in _CHECKS), "replayed")
