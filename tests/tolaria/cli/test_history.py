from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from typer.testing import CliRunner

from leyline.v1.admin_service_pb2 import Incident, RestorePoint
from support.fake_admin import DIGEST, FakeAdmin, fake_admin, incidents_of_a_night, restore_points
from tolaria.cli import points
from tolaria.cli.grammar import app
from tolaria.cli.view import print_table

Serve = Callable[[FakeAdmin], str]

NOW_S = 1_800_000_000

runner = CliRunner()


def test_restore_points_are_a_table(serve_fake: Serve) -> None:
    """A line each under the columns' names, the latest step first, no escape sequence in a pipe."""
    admin = fake_admin([])
    admin.restore_points = restore_points(int(time.time()))
    done = runner.invoke(app, ["restore-points", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    names, fast, full = (line.split() for line in done.stdout.splitlines())
    assert tuple(names) == points.RESTORE_POINT_COLUMNS
    assert (fast[0], fast[1], fast[-2:]) == ("fast", "57", ["-", "no"])
    assert (full[0], full[1], full[3:5], full[-2:]) == ("full", "45", ["2", "h"], ["000000000045-0badcafe", "yes"])


def test_a_restore_point_s_cells() -> None:
    """Age and size as people read them, the digest cut short."""
    (fast, full) = points.restore_point_rows(restore_points(NOW_S), now_s=NOW_S + 42)
    assert full == ("full", "45", "1", "2 h", "1.5 MiB", f"{DIGEST[:11]}…", "000000000045-0badcafe", "yes")
    assert fast[3] == "42 s"


def test_ages_that_cannot_be_told() -> None:
    """A clock that was set back makes nothing younger than now; a point without a time has no age."""
    early, timeless = RestorePoint(created_at=Timestamp(seconds=NOW_S)), RestorePoint()
    assert [row[3] for row in points.restore_point_rows([early, timeless], now_s=NOW_S - 60)] == ["0 s", "?"]


@pytest.mark.parametrize(
    ("command", "told"),
    [("restore-points", "there is no restore point yet\n"), ("incidents", "there is no incident\n")],
)
def test_nothing_to_list_is_said(serve_fake: Serve, command: str, told: str) -> None:
    """No bare table head."""
    done = runner.invoke(app, [command, "--address", serve_fake(fake_admin([]))])
    assert (done.exit_code, done.stdout) == (0, told)


def test_incidents_are_told_newest_first_and_harmless(serve_fake: Serve) -> None:
    """Time in UTC, kind, step, reason and details; control characters stay away from the terminal."""
    admin = fake_admin([])
    admin.incidents = incidents_of_a_night()
    done = runner.invoke(app, ["incidents", "--address", serve_fake(admin)])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "time (UTC)           kind               step  reason",
        "2027-01-15 08:01:00  rollback           57    loss exploded (outcome restored, restored step 40, tier FAST)",
        "2027-01-15 08:00:00  checkpoint_failed  45    no space left [2J[bold]here (stage write)",
    ]


def test_an_incident_of_differing_digests_says_so() -> None:
    """Digests are left out where they are equal, and the news where they are not."""
    rollback = incidents_of_a_night()[1]
    rollback.details["state_digest"] = "f" * 32
    assert "DIGESTS DIFFER" in points.incident_rows([rollback])[0][3]


def test_a_time_beyond_all_calendars_is_no_failure() -> None:
    """What a broken service sends is shown as unknown; so is a reason that nobody gave."""
    (row,) = points.incident_rows([Incident(occurred_at=Timestamp(seconds=2**60))])
    assert (row[0], row[3]) == ("?", "no reason given")


def test_incidents_limit_and_json(serve_fake: Serve) -> None:
    """The limit is the service's to keep; JSON is the contract's own mapping, in the service's order."""
    admin = fake_admin([])
    admin.incidents = incidents_of_a_night()
    done = runner.invoke(app, ["incidents", "--limit", "1", "--json", "--address", serve_fake(admin)])
    (told,) = json.loads(done.stdout)["incidents"]
    assert (told["incidentId"], told["occurredAt"]) == ("f1", "2027-01-15T08:00:00Z")
    assert admin.requests[0].limit == 1


def test_restore_points_json(serve_fake: Serve) -> None:
    """Zeros are there too."""
    admin = fake_admin([])
    admin.restore_points = restore_points(NOW_S)
    done = runner.invoke(app, ["restore-points", "--json", "--address", serve_fake(admin)])
    assert [point["stable"] for point in json.loads(done.stdout)["restorePoints"]] == [True, False]


def test_a_table_on_a_terminal_shows_brackets_as_they_are() -> None:
    """Words of a reason are no markup, and a terminal gets a bold head."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard", _environ={})
    print_table(console, points.INCIDENT_COLUMNS, points.incident_rows(incidents_of_a_night()))
    assert isinstance(console.file, io.StringIO)
    assert "[2J[bold]here" in console.file.getvalue()
    assert "\x1b[1m" in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()
