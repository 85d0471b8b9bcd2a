"""What came of a rollback, a checkpoint and a profile, told to people. Must not know how the answer was got."""

from __future__ import annotations

import typer

from leyline.v1.admin_service_pb2 import CaptureProfileResponse, CreateCheckpointResponse, TriggerRollbackResponse
from leyline.v1.enums_pb2 import RollbackTier
from tolaria.cli.failures import DigestsDifferError
from tolaria.cli.words import one_line, size, tier_word

_PATH_LENGTH_MAX = 4096


def show_rollback(answer: TriggerRollbackResponse) -> None:
    """Where the run stands now, how long that took, who went along, and the proof."""
    together = "coordinated" if answer.coordinated else "uncoordinated: no majority went back together"
    typer.echo(
        f"rollback: took effect at step {answer.global_step}: tier {tier_word(answer.tier)}, "
        f"restored step {answer.restored_step}, {answer.latency_ms:.1f} ms, {together}"
    )
    if _proved(answer):
        typer.echo(f"digests equal: {one_line(answer.state_digest)}")
    else:
        typer.secho(f"DIGESTS DIFFER: {_digests(answer)}", fg=typer.colors.RED, bold=True)


def digests_equal(answer: TriggerRollbackResponse) -> None:
    """Check the proof.

    Raises:
        DigestsDifferError: the state that was brought back is not the one that was captured.
    """
    if not _proved(answer):
        what = f"the rollback brought back another state than was captured ({_digests(answer)})"
        point = "full, or an earlier --step" if answer.tier == RollbackTier.ROLLBACK_TIER_FAST else "an earlier --step"
        raise DigestsDifferError(f"{what}; do not trust the run as it stands: pause it, and roll back to {point}")


def show_checkpoint(answer: CreateCheckpointResponse) -> None:
    """What is on the disk now."""
    typer.echo(
        f"checkpoint: took effect at step {answer.global_step}: id {one_line(answer.checkpoint_id)}, "
        f"{size(answer.size_bytes)}, digest {one_line(answer.digest)}"
    )


def show_profile(answer: CaptureProfileResponse) -> None:
    """Where the trace is, and how to look at it."""
    path = one_line(answer.path, length_max=_PATH_LENGTH_MAX)
    typer.echo(f"profile: took effect at step {answer.global_step}: {path}, {size(answer.size_bytes)}")
    typer.echo("the file is where the service runs; load it at https://ui.perfetto.dev or in chrome://tracing")


def _proved(answer: TriggerRollbackResponse) -> bool:
    return bool(answer.state_digest) and answer.state_digest == answer.expected_digest


def _digests(answer: TriggerRollbackResponse) -> str:
    restored, captured = (one_line(text) or "none" for text in (answer.state_digest, answer.expected_digest))
    return f"restored {restored}, captured {captured}"
