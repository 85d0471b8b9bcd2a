"""A status in words: labelled lines that the terminal view and the plain one share.

Owns wording, rounding and the taming of text from elsewhere. Must not know terminals, nor where a status comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.descriptor import EnumDescriptor

from leyline.v1.admin_service_pb2 import GetStatusResponse, RunState
from leyline.v1.enums_pb2 import CircuitBreakerState, EmergencyLevel, HealthStatus, RollbackTier, SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState

_NOT_YET = "not yet"
_NONE = "none"
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def rows(status: GetStatusResponse) -> list[tuple[str, str]]:
    """Everything that an operator asks first, as (label, words); what does not apply is left out."""
    optional = [
        ("health", _health(status)),
        *((label, words) for label, words in safety_rows(status) if words != _NONE),
        ("fast paths", _pairs(status.fast_paths)),
        ("metrics", f"http://{one_line(status.metrics_address)}/metrics" if status.metrics_address else ""),
        ("version", one_line(f"{status.version}, up {status.uptime_s:.0f} s") if status.version else ""),
    ]
    return [
        ("run", _run(status)),
        ("progress", progress(status)),
        ("learned", learned(status)),
        ("learning rate", _pairs({group: f"{rate:.3g}" for group, rate in status.learning_rates.items()}) or _NOT_YET),
        ("tamiyo", one_line(status.tamiyo_answer) or _NOT_YET),
        ("kasmina", one_line(status.kasmina_answer) or _NOT_YET),
        ("boundary", boundary(status)),
        ("seeds", seeds(status.seeds)),
        ("commands", commands(status)),
        *((label, words) for label, words in optional if words),
    ]


def safety_rows(status: GetStatusResponse) -> list[tuple[str, str]]:
    """What keeps the run from going on as usual, as (label, words)."""
    return [
        ("emergency", emergency_word(status) or _NONE),
        ("conservative", one_line(", ".join(status.conservative_reasons)) or _NONE),
        ("breakers", _breakers(status.breakers) if status.breakers else _NONE),
    ]


def epoch_line(status: GetStatusResponse, epoch: int) -> str:
    """One finished epoch on one line, for logs and pipes."""
    return "  ".join(
        [
            f"epoch {epoch}/{status.epochs}",
            f"step {status.global_step}",
            learned(status),
            f"boundary {status.last_boundary_ms:.1f} of {status.boundary_budget_ms:g} ms",
            f"tamiyo: {one_line(status.tamiyo_answer) or _NOT_YET}",
            f"kasmina: {one_line(status.kasmina_answer) or _NOT_YET}",
            f"seeds: {seeds(status.seeds)}",
            *([rollbacks(status)] if status.rollbacks else []),
        ]
    )


def progress(status: GetStatusResponse) -> str:
    """Epoch, step and pace."""
    return (
        f"epoch {status.epoch}/{status.epochs}, step {status.epoch_step}/{status.steps_per_epoch} of it, "
        f"{status.global_step} steps in all, {status.samples_per_s:.0f} samples/s"
    )


def learned(status: GetStatusResponse) -> str:
    """Loss and accuracy so far. Before the first validation both of its figures are the contract's zero."""
    if status.global_step == 0:
        return _NOT_YET
    validated = status.validation_loss != 0 or status.validation_accuracy != 0
    validation = (
        f"validation loss {status.validation_loss:.4f}, accuracy {status.validation_accuracy:.2%}"
        if validated
        else f"validation {_NOT_YET}"
    )
    return f"loss {status.training_loss:.4f}, {validation}"


def boundary(status: GetStatusResponse) -> str:
    """The last epoch boundary against its budget, and how the latest ones spread."""
    if status.last_boundary_ms == 0:
        return _NOT_YET
    return (
        f"{status.last_boundary_ms:.1f} of {status.boundary_budget_ms:g} ms, p50 {status.boundary_ms_p50:.1f}, "
        f"p99 {status.boundary_ms_p99:.1f}, {status.boundaries_over_budget} over budget"
    )


def seeds(states: Iterable[SeedState]) -> str:
    """Each seed with its stage and what it is built from."""
    return ", ".join(_seed(state) for state in states) or "none"


def commands(status: GetStatusResponse) -> str:
    """How many of the controller's commands were taken, how many refused, and how often the run was rolled back."""
    told = f"{status.commands_accepted} accepted, {status.commands_rejected} rejected"
    return f"{told}, {rollbacks(status)}" if status.rollbacks else told


def rollbacks(status: GetStatusResponse) -> str:
    """How often the run was rolled back."""
    return f"{status.rollbacks} rollback{'' if status.rollbacks == 1 else 's'}"


def state_word(state: int) -> str:
    """`running`, `paused`, ...: a RunState without its prefix."""
    return enum_word(RunState.DESCRIPTOR, state, "RUN_STATE_")


def emergency_word(status: GetStatusResponse) -> str:
    """The emergency level, empty while there is none."""
    return level_word(status.emergency_level) if status.emergency_level else ""


def level_word(level: int) -> str:
    """`halt`, ...: an EmergencyLevel without its prefix."""
    return enum_word(EmergencyLevel.DESCRIPTOR, level, "EMERGENCY_LEVEL_")


def tier_word(tier: int) -> str:
    """`fast` or `full`: a RollbackTier without its prefix."""
    return enum_word(RollbackTier.DESCRIPTOR, tier, "ROLLBACK_TIER_")


def enum_word(enum: EnumDescriptor, number: int, prefix: str) -> str:
    """The name of an enum's value as a lower-case word; a number that this version does not know stays a number."""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(prefix).lower().replace("_", " ") if value else f"unknown ({number})"


def stage_word(stage: int) -> str:
    """`germinated`, `training`, ...: a seed's stage without its prefix."""
    return enum_word(SeedLifecycleStage.DESCRIPTOR, stage, "SEED_STAGE_")


def size(size_bytes: int) -> str:
    """Bytes as a person reads them: `512 B`, `1.5 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    power = min((size_bytes.bit_length() - 1) // 10, len(_BINARY_UNITS))
    return f"{size_bytes / 1024**power:.1f} {_BINARY_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """A stretch of time in its largest whole unit: `42 s`, `3 min`, `5 h`, `2 d`."""
    unit, length_s = next(((unit, length_s) for unit, length_s in _TIME_UNITS if seconds >= length_s), ("s", 1))
    return f"{int(seconds // length_s)} {unit}"


def one_line(text: str, *, length_max: int = 200) -> str:
    """Text from elsewhere, made harmless to a terminal: nothing but printable characters, one line, bounded."""
    printable = "".join(character if character.isprintable() else " " for character in text[: 4 * length_max])
    joined = " ".join(printable.split())
    return joined if len(joined) <= length_max else joined[: length_max - 1] + "…"


def _run(status: GetStatusResponse) -> str:
    reason = f": {one_line(status.state_reason)}" if status.state_reason else ""
    return f"{one_line(status.run_id) or '?'}, job {one_line(status.job) or '?'}, {state_word(status.state)}{reason}"


def _health(status: GetStatusResponse) -> str:
    if not status.HasField("health"):
        return ""
    word = enum_word(HealthStatus.DESCRIPTOR, status.health.status, "HEALTH_STATUS_")
    return f"{word}: {one_line(status.health.summary)}" if status.health.summary else word


def _seed(state: SeedState) -> str:
    blueprint = f" ({one_line(state.blueprint_id)})" if state.blueprint_id else ""
    return f"{one_line(state.seed_id)} {stage_word(state.stage)}{blueprint}"


def _breakers(breakers: Mapping[str, int]) -> str:
    words = {
        name: enum_word(CircuitBreakerState.DESCRIPTOR, state, "CIRCUIT_STATE_") for name, state in breakers.items()
    }
    if set(words.values()) == {"closed"}:
        return "all closed"
    return _pairs(words)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{one_line(name)} {one_line(value)}" for name, value in sorted(values.items()))
