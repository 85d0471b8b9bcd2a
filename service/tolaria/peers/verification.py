"""Verification of what the peers answer: signatures and content of commands, and sets of desired seeds.

A signature is the hex HMAC-SHA256 of the command's deterministic serialization without the signature.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

from leyline.v1 import enums_pb2 as enums
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.config import LeylineSettings, SeedsSettings
from tolaria.errors import CommandRejectedError, PeerProtocolError
from tolaria.values.seeds import FOSSILIZED, GROWING, SLOTS_FREE, count_in

CONTRACT_VERSION = 1
SIGNATURE = "signature"
COMMAND_BYTES_MAX = 64 * 1024
SEEDS_MAX = 256

# The payload that each supported type requires; None: no payload.
PAYLOADS: Mapping[enums.CommandType.ValueType, str | None] = {
    enums.COMMAND_SEED: "seed_operation",
    enums.COMMAND_ROLLBACK: None,
    enums.COMMAND_OPTIMIZER: "optimizer_adjustment",
    enums.COMMAND_CIRCUIT_BREAKER: "circuit_breaker",
    enums.COMMAND_PAUSE: None,
    enums.COMMAND_EMERGENCY: None,
}


def sign(command: AdaptationCommand, secret: bytes) -> None:
    """Adds the signature to the command's annotations."""
    command.annotations[SIGNATURE] = _digest(command, secret)


def is_signed(command: AdaptationCommand, secrets: tuple[bytes, ...]) -> bool:
    """Returns whether the command's signature was made with one of `secrets`. Compares in constant time."""
    if SIGNATURE not in command.annotations:  # reading a missing key of a map field would create it
        return False
    given = command.annotations[SIGNATURE].encode()
    return any(hmac.compare_digest(given, _digest(command, secret).encode()) for secret in secrets)


def _digest(command: AdaptationCommand, secret: bytes) -> str:
    unsigned = AdaptationCommand()
    unsigned.CopyFrom(command)
    unsigned.annotations.pop(SIGNATURE, None)
    return hmac.new(secret, unsigned.SerializeToString(deterministic=True), hashlib.sha256).hexdigest()


class NonceTable:
    """Remembers command ids for `window_s`, at most `capacity` of them; the oldest are forgotten first."""

    def __init__(self, *, window_s: float, capacity: int = 4096) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._seen: OrderedDict[str, float] = OrderedDict()

    def first_seen(self, nonce: str, *, now_s: float) -> bool:
        """Remembers `nonce` and returns whether it is new within the window."""
        while self._seen and next(iter(self._seen.values())) < now_s - self._window_s:
            self._seen.popitem(last=False)
        if nonce in self._seen:
            return False
        self._seen[nonce] = now_s
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return True


class CommandVerifier:
    """Verifies commands and remembers their ids. Without a secret in the settings signatures are not required."""

    def __init__(self, settings: LeylineSettings) -> None:
        self._nonces = NonceTable(window_s=settings.nonce_window_s)
        self.adopt(settings)

    def adopt(self, settings: LeylineSettings) -> None:
        """Verifies by these secrets, and this freshness, from now on."""
        secrets = (settings.secret, settings.previous_secret)
        self._secrets = tuple(secret.get_secret_value().encode() for secret in secrets if secret)
        self._freshness_s = settings.freshness_s

    def verify(self, command: AdaptationCommand, *, wall_s: float, now_s: float) -> None:
        """Checks one command. `wall_s` is Unix time; `now_s` is a monotonic clock for the window of command ids.

        Raises:
            CommandRejectedError: its `reason` names the first check that failed.
        """
        reason = next(self._failed_checks(command, wall_s), None)
        # Last, so that a forged command cannot use up the id of a genuine one.
        if reason is None and not self._nonces.first_seen(command.command_id, now_s=now_s):
            reason = "replayed"
        if reason is not None:
            issuer = f"of type {command.command_type} by {command.issued_by!r}"
            raise CommandRejectedError(reason, command.command_id, f"command {command.command_id!r} {issuer}")

    def _failed_checks(self, command: AdaptationCommand, wall_s: float) -> Iterator[str]:
        """Yields the reason of each failed check. Only the first is meaningful: a check may rely on those before."""
        if command.ByteSize() > COMMAND_BYTES_MAX:
            yield "oversized"
        # Before the content: nothing in a forged command is worth reporting.
        if self._secrets and not is_signed(command, self._secrets):
            yield "unsigned"
        for reason, passes in _CONTENT_CHECKS:
            if not passes(command):
                yield reason
        issued_s = command.issued_at.seconds + command.issued_at.nanos / 1e9
        # A clock ahead of this one is as suspicious as an old command: the window extends both ways.
        if not command.HasField("issued_at") or abs(wall_s - issued_s) > self._freshness_s:
            yield "stale"
        deadline_s = command.execution_deadline_ms / 1000
        if deadline_s and wall_s > issued_s + deadline_s:
            yield "deadline_passed"


def verify_growth(command: AdaptationCommand, state: SystemStatePacket, seeds: SeedsSettings) -> None:
    """Refuses a seed command that would let the model grow beyond what the settings allow, or where it cannot grow.

    `state` is the packet that the command answers.

    Raises:
        CommandRejectedError: its `reason` is one of GROWTH_REASONS.
    """
    if command.command_type != enums.COMMAND_SEED:
        return
    operation = command.seed_operation.operation
    germinates, fossilizes = operation == enums.SEED_OP_GERMINATE, operation == enums.SEED_OP_FOSSILIZE
    growing, fossilized = count_in(GROWING, state.seed_states), count_in(FOSSILIZED, state.seed_states)
    slots_free = state.training_metrics.get(SLOTS_FREE, 1.0)
    problems = (
        (not seeds.enabled, "seeds_disabled", "seeds.enabled is off"),
        (germinates and slots_free < 1.0, "no_slot", "the model has no free slot"),
        (
            germinates and growing >= seeds.active_max,
            "seeds_active_max",
            f"{growing} seeds grow already, of at most {seeds.active_max} (seeds.active_max)",
        ),
        (
            (germinates or fossilizes) and fossilized >= seeds.fossilized_max,
            "seeds_fossilized_max",
            f"{fossilized} seeds are fossilized, of at most {seeds.fossilized_max} (seeds.fossilized_max)",
        ),
    )
    for found, reason, detail in problems:
        if found:
            raise CommandRejectedError(reason, command.command_id, detail)


def verify_seeds(peer: str, seeds: Iterable[SeedState]) -> list[SeedState]:
    """Returns the desired seeds, unchanged.

    Raises:
        PeerProtocolError: too many seeds, empty or duplicate ids, unknown stages, or numbers that are not finite.
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
    stages = set(enums.SeedLifecycleStage.values()) - {enums.SEED_STAGE_UNKNOWN}
    problems = (
        (len(before) >= SEEDS_MAX, f"is one more than {SEEDS_MAX}"),
        (not seed.seed_id, "has no id"),
        (seed.seed_id in before, "is there twice"),
        (seed.stage not in stages, f"has unknown stage {seed.stage}"),
        (not all(map(math.isfinite, numbers)), "has a number that is not finite"),
    )
    return next((problem for found, problem in problems if found), "")


def _has_its_payload(command: AdaptationCommand) -> bool:
    payload = PAYLOADS[command.command_type]
    if payload is not None and command.WhichOneof("payload") != payload:
        return False
    operations = set(enums.SeedOperation.values()) - {enums.SEED_OP_UNKNOWN}
    return payload != "seed_operation" or command.seed_operation.operation in operations


def _is_finite(command: AdaptationCommand) -> bool:
    numbers = [*command.seed_operation.parameters.values(), *command.optimizer_adjustment.hyperparameters.values()]
    return all(map(math.isfinite, numbers))


_CONTENT_CHECKS: tuple[tuple[str, Callable[[AdaptationCommand], bool]], ...] = (
    ("wrong_version", lambda command: command.version == CONTRACT_VERSION),
    ("no_id", lambda command: bool(command.command_id)),
    ("unknown_type", lambda command: command.command_type != 0 and command.command_type in enums.CommandType.values()),
    ("unsupported", lambda command: command.command_type in PAYLOADS),
    ("malformed", _has_its_payload),
    ("not_finite", _is_finite),
)
GROWTH_REASONS = ("seeds_disabled", "no_slot", "seeds_active_max", "seeds_fossilized_max")
REJECTION_REASONS = (
    "oversized", "unsigned", *(reason for reason, _ in _CONTENT_CHECKS), "stale", "deadline_passed", "replayed"
)  # fmt: skip
