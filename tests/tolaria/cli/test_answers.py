from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from leyline.v1.enums_pb2 import RollbackTier
from support.fake_admin import DIGEST, FakeAdmin, fake_admin
from tolaria.cli.grammar import app

Serve = Callable[[FakeAdmin], str]

runner = CliRunner()


def test_rollback_tells_where_the_run_stands_and_proves_it(serve_fake: Serve) -> None:
    """Tier, step, time, who went along, and the digest that restored and captured state share."""
    done = runner.invoke(
        app, ["rollback", "--tier", "fast", "--reason", "why", "--address", serve_fake(fake_admin([]))]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "rollback: took effect at step 57: tier fast, restored step 40, 12.3 ms, coordinated",
        f"digests equal: {DIGEST}",
    ]


@pytest.mark.parametrize(
    ("options", "tier", "step"),
    [
        (["--tier", "fast"], RollbackTier.ROLLBACK_TIER_FAST, None),
        (["--tier", "full", "--step", "0"], RollbackTier.ROLLBACK_TIER_FULL, 0),
        (["--tier", "auto", "--step", "30"], RollbackTier.ROLLBACK_TIER_UNSPECIFIED, 30),
        ([], RollbackTier.ROLLBACK_TIER_UNSPECIFIED, None),
    ],
)
def test_rollback_asks_for_tier_and_step(
    serve_fake: Serve, options: list[str], tier: RollbackTier.ValueType, step: int | None
) -> None:
    """Step 0 is a step; none at all leaves the choice to the service."""
    admin = fake_admin([])
    runner.invoke(app, ["rollback", *options, "--reason", "why", "--address", serve_fake(admin)])
    (request,) = admin.requests
    assert (request.tier, request.reason) == (tier, "why")
    assert (request.target_step if request.HasField("target_step") else None) == step


@pytest.mark.parametrize(("restored", "told"), [("f" * 32, "f" * 32), ("", "none")])
def test_digests_that_differ_are_loud(serve_fake: Serve, restored: str, told: str) -> None:
    """A rollback that is not proved is told on both streams and is exit code 1, although the service answered."""
    admin = fake_admin([])
    admin.restored_digest = restored
    done = runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 1
    assert f"DIGESTS DIFFER: restored {told}, captured {DIGEST}" in done.stdout
    assert "equal" not in done.stdout
    assert "brought back another state than was captured" in done.stderr
    assert "roll back to full" in done.stderr


def test_digests_that_differ_are_exit_code_1_with_json_too(serve_fake: Serve) -> None:
    """The answer is printed whole, and a script need not compare."""
    admin = fake_admin([])
    admin.restored_digest = "f" * 32
    done = runner.invoke(app, ["rollback", "--json", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["stateDigest"] == "f" * 32
    assert "captured" in done.stderr


def test_digests_that_neither_side_has_prove_nothing(serve_fake: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two empty digests are equal, and no proof."""
    admin = fake_admin([])
    admin.restored_digest = ""
    monkeypatch.setattr("support.fake_admin.DIGEST", "")
    assert runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)]).exit_code == 1


def test_a_rollback_without_the_peers_is_told(serve_fake: Serve) -> None:
    """It is done all the same: exit code 0."""
    admin = fake_admin([])
    admin.coordinated = False
    done = runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert "uncoordinated: no majority went back together" in done.stdout


def test_checkpoint_tells_what_is_on_the_disk(serve_fake: Serve) -> None:
    """Step, id, size and digest."""
    done = runner.invoke(app, ["checkpoint", "--reason", "why", "--address", serve_fake(fake_admin([]))])
    told = f"checkpoint: took effect at step 57: id 000000000057-0badcafe, 1.5 MiB, digest {DIGEST}\n"
    assert (done.exit_code, done.stdout) == (0, told)


def test_profile_tells_where_the_trace_is_and_what_opens_it(serve_fake: Serve) -> None:
    """The path is the service's; both viewers are named."""
    admin = fake_admin([])
    done = runner.invoke(app, ["profile", "--steps", "7", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert done.stdout.startswith("profile: took effect at step 62: /state/traces/trace-1.json, 2.0 KiB\n")
    assert "https://ui.perfetto.dev" in done.stdout
    assert "chrome://tracing" in done.stdout
    assert admin.requests[0].active_steps == 7


@pytest.mark.parametrize(("name", "least_s"), [("rollback", 20.0), ("checkpoint", 50.0), ("profile", 600.0)])
def test_slow_calls_are_waited_for(serve_fake: Serve, name: str, least_s: float) -> None:
    """A full rollback may take 12 s, a checkpoint longer, steps as long as they like; --timeout wins."""
    admin = fake_admin([])
    address = serve_fake(admin)
    runner.invoke(app, [name, "--reason", "why", "--address", address])
    assert admin.patience_s > least_s
    runner.invoke(app, [name, "--reason", "why", "--timeout", "4", "--address", address])
    assert admin.patience_s < 5.0
