from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from leyline.v1.admin_service_pb2 import PauseTrainingRequest
from leyline.v1.enums_pb2 import RollbackTier
from support.fake_admin import DIGEST, FakeAdmin, fake_admin, restore_points, status_of, two_incidents
from tolaria.cli.admin_commands import admin_command
from tolaria.cli.answers import RESTORE_POINT_COLUMNS
from tolaria.cli.commands import CommandGroup, app

Serve = Callable[[FakeAdmin], str]

NOW_S = 1_800_000_000
NO_SERVICE = "127.0.0.1:1"

runner = CliRunner()


def test_status_is_plain_lines_in_a_pipe(serve_fake: Serve) -> None:
    """Without a terminal: labelled lines, exit code 0."""
    done = runner.invoke(app, ["status", "--address", serve_fake(fake_admin([status_of(2)]))])
    assert done.exit_code == 0
    assert "run            run-1, job digits, running" in done.stdout.splitlines()


def test_status_json_is_the_proto3_mapping(serve_fake: Serve) -> None:
    """Names, enums and 64-bit numbers are as in proto3's JSON; zeros are included."""
    done = runner.invoke(app, ["status", "--json", "--address", serve_fake(fake_admin([status_of(2)]))])
    answer = json.loads(done.stdout)
    assert (answer["runId"], answer["state"], answer["globalStep"]) == ("run-1", "RUN_STATE_RUNNING", "45")
    assert answer["boundariesOverBudget"] == 0
    assert answer["seeds"][0]["stage"] == "SEED_STAGE_TRAINING"


def test_status_uses_the_address_of_the_settings(serve_fake: Serve) -> None:
    """Without --address it calls server.listen."""
    address = serve_fake(fake_admin([status_of(2)]))
    assert runner.invoke(app, ["status", "--set", f"server.listen={address}"]).exit_code == 0


def test_no_service_is_exit_code_3() -> None:
    """A script can distinguish a service that is down from one that refuses."""
    done = runner.invoke(app, ["status", "--address", NO_SERVICE])
    assert done.exit_code == 3
    assert done.stderr.startswith(f"tolaria: no service answers at {NO_SERVICE}")
    assert len(done.stderr.splitlines()) == 1


def test_pause_sends_its_reason_and_a_new_request_id(serve_fake: Serve) -> None:
    """Step and state of the answer are printed; each call has a new id."""
    admin = fake_admin([])
    address = serve_fake(admin)
    for _ in range(2):
        done = runner.invoke(app, ["pause", "--reason", "lunch", "--address", address])
        assert (done.exit_code, done.stdout) == (0, "pause: took effect at step 41: state PAUSED\n")
    assert [request.reason for request in admin.requests] == ["lunch", "lunch"]
    assert len({request.request_id for request in admin.requests} - {""}) == 2


def test_request_id_can_be_given(serve_fake: Serve) -> None:
    """A repeat of a lost call carries the id of the first."""
    admin = fake_admin([])
    address = serve_fake(admin)
    done = runner.invoke(app, ["pause", "--reason", "x", "--request-id", "mine", "--json", "--address", address])
    assert [request.request_id for request in admin.requests] == ["mine"]
    assert json.loads(done.stdout) == {"globalStep": "41", "state": "RUN_STATE_PAUSED"}


def test_lost_answer_of_a_change_reports_the_request_id() -> None:
    """The change may have been made: the message says how to repeat it safely."""
    done = runner.invoke(app, ["stop", "--reason", "x", "--request-id", "mine", "--address", NO_SERVICE])
    assert done.exit_code == 3
    assert "--request-id mine repeats it safely" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pause", "--reason", ""], "tolaria: reason: must not be empty (INVALID_ARGUMENT)\n"),
        (["resume", "--reason", "x"], "tolaria: the run is not held [31m (WRONG_STATE)\n"),
    ],
)
def test_refusal_is_exit_code_1(serve_fake: Serve, arguments: list[str], message: str) -> None:
    """The message is the one of the service."""
    done = runner.invoke(app, [*arguments, "--address", serve_fake(fake_admin([]))])
    assert (done.exit_code, done.stderr) == (1, message)


def test_admin_command_adds_the_shared_options(serve_fake: Serve) -> None:
    """A new command is a function that builds a request; the help, name and shared options are derived."""
    extended = typer.Typer(cls=CommandGroup)
    extended.callback()(lambda: None)

    @admin_command(extended, lambda admin: admin.PauseTraining)
    def hold_on(prefix: Annotated[str, typer.Option()] = "p") -> PauseTrainingRequest:
        """Help of the new command."""
        return PauseTrainingRequest(reason=prefix)

    admin = fake_admin([])
    address = serve_fake(admin)
    done = runner.invoke(extended, ["hold-on", "--prefix", "q", "--reason", "why", "--address", address])
    assert done.stdout.startswith("hold_on: took effect at step 41")
    assert admin.requests[0].reason == "why"
    assert "Help of the new command" in runner.invoke(extended, ["hold-on", "--help"]).stdout


def test_rollback_prints_the_restored_step_and_equal_digests(serve_fake: Serve) -> None:
    """Tier, step, latency, coordination, and the digest of the restored and the captured state."""
    done = runner.invoke(
        app, ["rollback", "--tier", "fast", "--reason", "why", "--address", serve_fake(fake_admin([]))]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        (
            "rollback: took effect at step 40: tier fast, the newest proven one: the snapshot, "
            "waited 700.0 ms for the step boundary, kept the state that was left in 31.4 ms, restored in 12.3 ms, "
            "coordinated"
        ),
        (
            "step 57 is kept as checkpoint 000000000057-0badcafe until 2027-01-15 08:00:00 UTC "
            "(checkpoint.keep_superseded_s), and while it is among the newest 2 superseded ones: "
            "tolaria rollback --checkpoint 000000000057-0badcafe --reason ... returns to it"
        ),
        "checkpoints superseded: 2; rollback --checkpoint ID goes back to one",
        f"digests equal: {DIGEST}",
    ]


def test_rollback_says_why_it_cannot_be_undone(serve_fake: Serve) -> None:
    """In one line, without an id."""
    done = runner.invoke(app, ["rollback", "--reason", "no room", "--address", serve_fake(fake_admin([]))])
    assert "step 57 is not kept: the disk is full" in done.stdout.splitlines()
    assert "0badcafe" not in done.stdout


@pytest.mark.parametrize(
    ("options", "tier", "step"),
    [
        (["--tier", "fast"], RollbackTier.ROLLBACK_TIER_FAST, None),
        (["--tier", "full", "--step", "0"], RollbackTier.ROLLBACK_TIER_FULL, 0),
        (["--tier", "auto", "--step", "30"], RollbackTier.ROLLBACK_TIER_UNSPECIFIED, 30),
        ([], RollbackTier.ROLLBACK_TIER_UNSPECIFIED, None),
    ],
)
def test_rollback_request_has_tier_and_step(
    serve_fake: Serve, options: list[str], tier: RollbackTier.ValueType, step: int | None
) -> None:
    """Step 0 is a step; without --step the field is absent, and the service chooses."""
    admin = fake_admin([])
    runner.invoke(app, ["rollback", *options, "--reason", "why", "--address", serve_fake(admin)])
    (request,) = admin.requests
    assert (request.tier, request.reason) == (tier, "why")
    assert (request.target_step if request.HasField("target_step") else None) == step


@pytest.mark.parametrize(("restored", "shown"), [("f" * 32, "f" * 32), ("", "none")])
def test_different_digests_are_exit_code_1(serve_fake: Serve, restored: str, shown: str) -> None:
    """Both streams report them, although the service answered without an error."""
    admin = fake_admin([])
    admin.restored_digest = restored
    done = runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 1
    assert f"DIGESTS DIFFER: restored {shown}, captured {DIGEST}" in done.stdout
    assert "equal" not in done.stdout
    assert "the restored state is not the one that was captured" in done.stderr
    assert "roll back to full" in done.stderr


def test_different_digests_are_exit_code_1_with_json(serve_fake: Serve) -> None:
    """The whole answer is printed; a script does not have to compare the digests."""
    admin = fake_admin([])
    admin.restored_digest = "f" * 32
    done = runner.invoke(app, ["rollback", "--json", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["stateDigest"] == "f" * 32
    assert "captured" in done.stderr


def test_missing_digests_are_exit_code_1(serve_fake: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two empty digests are equal, but prove nothing."""
    admin = fake_admin([])
    admin.restored_digest = ""
    monkeypatch.setattr("support.fake_admin.DIGEST", "")
    assert runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)]).exit_code == 1


def test_uncoordinated_rollback_is_reported(serve_fake: Serve) -> None:
    """It has succeeded: exit code 0."""
    admin = fake_admin([])
    admin.coordinated = False
    done = runner.invoke(app, ["rollback", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert "uncoordinated: no majority went back together" in done.stdout


def test_checkpoint_prints_step_id_size_and_digest(serve_fake: Serve) -> None:
    """All four are on one line."""
    done = runner.invoke(app, ["checkpoint", "--reason", "why", "--address", serve_fake(fake_admin([]))])
    line = f"checkpoint: took effect at step 57: id 000000000057-0badcafe, 1.5 MiB, digest {DIGEST}\n"
    assert (done.exit_code, done.stdout) == (0, line)


def test_profile_prints_the_path_and_the_viewers(serve_fake: Serve) -> None:
    """The path is on the machine of the service; both viewers are named."""
    admin = fake_admin([])
    done = runner.invoke(app, ["profile", "--steps", "7", "--reason", "why", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert done.stdout.startswith("profile: took effect at step 62: /state/traces/trace-1.json, 2.0 KiB\n")
    assert "https://ui.perfetto.dev" in done.stdout
    assert "chrome://tracing" in done.stdout
    assert admin.requests[0].active_steps == 7


@pytest.mark.parametrize(("name", "least_s"), [("rollback", 20.0), ("checkpoint", 50.0), ("profile", 600.0)])
def test_slow_calls_have_long_timeouts(serve_fake: Serve, name: str, least_s: float) -> None:
    """A full rollback takes up to 12 s, a checkpoint longer, and steps any time; --timeout overrides the default."""
    admin = fake_admin([])
    address = serve_fake(admin)
    runner.invoke(app, [name, "--reason", "why", "--address", address])
    assert admin.timeout_s > least_s
    runner.invoke(app, [name, "--reason", "why", "--timeout", "4", "--address", address])
    assert admin.timeout_s < 5.0


def test_restore_points_are_a_table(serve_fake: Serve) -> None:
    """One line for each under the column names, the latest step first, without escape sequences in a pipe."""
    admin = fake_admin([])
    admin.restore_points = restore_points(int(time.time()))
    done = runner.invoke(app, ["restore-points", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    names, fast, full = (line.split() for line in done.stdout.splitlines())
    assert tuple(names) == RESTORE_POINT_COLUMNS
    assert (fast[0], fast[1], fast[-2:]) == ("fast", "57", ["2", "suspect"])
    assert (full[0], full[1], full[3:5], full[-2:]) == ("full", "45", ["2", "h"], ["1", "proven"])


@pytest.mark.parametrize(
    ("command", "message"),
    [("restore-points", "there is no restore point yet\n"), ("incidents", "there is no incident\n")],
)
def test_empty_list_prints_a_message(serve_fake: Serve, command: str, message: str) -> None:
    """An empty table is not printed."""
    done = runner.invoke(app, [command, "--address", serve_fake(fake_admin([]))])
    assert (done.exit_code, done.stdout) == (0, message)


def test_incidents_are_listed_newest_first_without_control_characters(serve_fake: Serve) -> None:
    """Time in UTC, kind, step, reason and details."""
    admin = fake_admin([])
    admin.incidents = two_incidents()
    done = runner.invoke(app, ["incidents", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "time (UTC)           kind               step  reason",
        "2027-01-15 08:01:00  rollback           57    loss exploded (outcome restored, restored step 40, tier FAST)",
        "2027-01-15 08:00:00  checkpoint_failed  45    no space left [2J[bold]here (stage write)",
    ]


def test_incidents_limit_and_json(serve_fake: Serve) -> None:
    """The limit is sent to the service; JSON is the proto3 mapping, in the service's order."""
    admin = fake_admin([])
    admin.incidents = two_incidents()
    done = runner.invoke(app, ["incidents", "--limit", "1", "--json", "--address", serve_fake(admin)])
    (incident,) = json.loads(done.stdout)["incidents"]
    assert (incident["incidentId"], incident["occurredAt"]) == ("f1", "2027-01-15T08:00:00Z")
    assert admin.requests[0].limit == 1


def test_restore_points_json(serve_fake: Serve) -> None:
    """False and zero are included."""
    admin = fake_admin([])
    admin.restore_points = restore_points(NOW_S)
    done = runner.invoke(app, ["restore-points", "--json", "--address", serve_fake(admin)])
    assert [point["stable"] for point in json.loads(done.stdout)["restorePoints"]] == [True, False]


def test_reload_prints_what_has_changed_and_what_waits(serve_fake: Serve) -> None:
    """With both values, and a line for each setting that is retired."""
    done = runner.invoke(app, ["reload", "--reason", "more", "--address", serve_fake(fake_admin([]))])
    assert (done.exit_code, done.stdout.splitlines()) == (
        0,
        [
            "reload: took effect at step 57: 1 changed",
            "  checkpoint.keep_last: 3 -> 5",
            "waiting for a restart:",
            "  training.epochs: 20 -> 30",
            "  rollback.loss_factor is retired and has no effect: remove it",
        ],
    )


def test_a_service_that_stops_refuses_and_is_not_unreachable(serve_fake: Serve) -> None:
    """Exit code 1 with its reason: it has answered."""
    address = serve_fake(fake_admin([]))
    done = runner.invoke(app, ["shutdown", "--reason", "bye", "--address", address])
    assert (done.exit_code, done.stdout) == (0, "shutdown: took effect at step 57: state DRAINING\n")
    done = runner.invoke(app, ["shutdown", "--reason", "again", "--address", address])
    assert (done.exit_code, done.stderr) == (1, "tolaria: the service is stopping: SIGTERM (DRAINING)\n")
