from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import tolaria
from leyline.v1.admin_service_pb2 import PauseTrainingRequest
from support.fake_admin import FakeAdmin, fake_admin, status_of
from tolaria.cli.change import changing
from tolaria.cli.edge import Told
from tolaria.cli.grammar import app
from tolaria.cli.options import DEMO_EPOCHS
from tolaria.config import Settings
from tolaria.errors import BindError, TolariaError, UnknownJobError

Serve = Callable[[FakeAdmin], str]

_COMMANDS = (
    *("serve", "demo", "status", "watch", "pause", "resume", "stop", "lr", "conservative"),
    *("rollback", "checkpoint", "profile", "restore-points", "incidents", "verify"),
    *("emergency", "signals", "peer", "config"),
)
_BELOW = (
    *("config check", "config show", "emergency raise", "emergency clear", "emergency show"),
    *("signals watch", "signals raise", "signals clear", "signals show"),
)
_NOBODY = "127.0.0.1:1"

runner = CliRunner()


def test_help_lists_every_command() -> None:
    """The names of the commands are an interface."""
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in _COMMANDS)


@pytest.mark.parametrize("name", [*_COMMANDS, *_BELOW])
def test_every_command_has_help(name: str) -> None:
    """--help explains each command and ends well."""
    shown = runner.invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage: tolaria" in shown.stdout or "Usage: root" in shown.stdout


def test_help_of_demo_tells_its_own_number_of_epochs() -> None:
    """The demo trains for longer than the settings' default, and says so."""
    shown = runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    assert f"else {DEMO_EPOCHS})" in shown.stdout


def test_version_is_the_package_s() -> None:
    """--version ends before anything else is asked for."""
    shown = runner.invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"tolaria {tolaria.__version__} ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["config", "check"],
        ["config", "show"],
        ["status", "--address", _NOBODY],
        ["incidents", "--address", _NOBODY],
        ["verify"],
    ],
)
def test_torch_is_never_imported(arguments: list[str]) -> None:
    """Nothing but `serve` pays for torch, told by a fresh interpreter."""
    code = (
        "import sys\nfrom tolaria.cli.grammar import app\n"
        "try:\n    app(sys.argv[1:], prog_name='tolaria')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False"


def test_module_is_the_command_too() -> None:
    """`python -m tolaria` works where the script is not on the path."""
    done = subprocess.run([sys.executable, "-m", "tolaria", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tolaria ")


def test_config_check_accepts_good_settings() -> None:
    """Good settings are one line and exit code 0."""
    done = runner.invoke(app, ["config", "check", "--set", "training.epochs=3"])
    assert (done.exit_code, done.stdout) == (0, "the configuration is valid\n")


def test_config_check_tells_every_problem() -> None:
    """Each wrong setting has a line on stderr, without a traceback, and the exit code is 2."""
    done = runner.invoke(app, ["config", "check", "--set", "trainig.epochs=3", "--set", "server.lisen=x"])
    assert done.exit_code == 2
    assert "trainig: unknown section (--set); did you mean training?" in done.stderr
    assert "server.lisen: unknown field (--set); did you mean listen?" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_show_is_read_back_as_a_file(tmp_path: Path) -> None:
    """What is shown is a settings file, with secrets masked."""
    shown = runner.invoke(app, ["config", "show", "--set", "training.epochs=3", "--set", "leyline.secret=hush"])
    assert shown.exit_code == 0
    assert "hush" not in shown.stdout
    file = tmp_path / "shown.toml"
    file.write_text(shown.stdout, encoding="utf-8")
    again = runner.invoke(app, ["config", "show", "--config", str(file)])
    assert "epochs = 3" in again.stdout


def test_missing_config_file_is_a_configuration_error() -> None:
    """A file that is asked for must be there."""
    done = runner.invoke(app, ["config", "check", "--config", "nowhere.toml"])
    assert done.exit_code == 2
    assert "no file nowhere.toml" in done.stderr


def test_status_is_plain_lines_in_a_pipe(serve_fake: Serve) -> None:
    """Without a terminal: labelled lines, exit code 0."""
    done = runner.invoke(app, ["status", "--address", serve_fake(fake_admin([status_of(2)]))])
    assert done.exit_code == 0
    assert "run            run-1, job digits, running" in done.stdout.splitlines()


def test_status_json_is_the_contract_s_mapping(serve_fake: Serve) -> None:
    """Names, enums and 64-bit numbers are as proto3's JSON has them; zeros are there too."""
    done = runner.invoke(app, ["status", "--json", "--address", serve_fake(fake_admin([status_of(2)]))])
    told = json.loads(done.stdout)
    assert (told["runId"], told["state"], told["globalStep"]) == ("run-1", "RUN_STATE_RUNNING", "45")
    assert told["boundariesOverBudget"] == 0
    assert told["seeds"][0]["stage"] == "SEED_STAGE_TRAINING"


def test_status_asks_where_the_settings_say(serve_fake: Serve) -> None:
    """Without --address it is server.listen that is asked."""
    address = serve_fake(fake_admin([status_of(2)]))
    assert runner.invoke(app, ["status", "--set", f"server.listen={address}"]).exit_code == 0


def test_nobody_there_is_exit_code_3() -> None:
    """A script can tell a service that is down from one that refuses."""
    done = runner.invoke(app, ["status", "--address", _NOBODY])
    assert done.exit_code == 3
    assert done.stderr.startswith(f"tolaria: no service answers at {_NOBODY}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--address", "nonsense"],
        ["status", "--timeout", "0"],
        ["pause"],
        ["peer", "urza", "--listen", "127.0.0.1:0"],
        ["peer", "tamiyo"],
        ["peer", "tamiyo", "--listen", "nonsense"],
        ["demo", "--epochs", "0"],
        ["demo", "--set", "training.epochs=none"],
        ["lr", "--reason", "x"],
        ["lr", "--reason", "x", "--factor", "2", "--value", "1"],
        *(["lr", "--reason", "x", f"--factor={factor}"] for factor in ("nan", "inf", "0", "-1")),
        *(["lr", "--reason", "x", f"--value={value}"] for value in ("nan", "inf", "-inf")),
        ["rollback", "--tier", "slow", "--reason", "x"],
        ["rollback"],
        *(["rollback", "--reason", "x", f"--step={step}"] for step in (-1, 2**64)),
        ["checkpoint"],
        *(["profile", "--reason", "x", f"--steps={steps}"] for steps in (-1, 2**32)),
        ["incidents", "--limit", "-1"],
        ["incidents", "--limit", str(2**32)],
        ["verify"],
        ["verify", "--state-dir", "."],
        ["unheard-of"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    """What the user typed wrongly is told on stderr, without a traceback."""
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_pause_tells_the_step_and_sends_reason_and_a_new_request_id(serve_fake: Serve) -> None:
    """The answer's step and state are shown; each call has an id of its own."""
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


def test_lost_change_tells_how_to_repeat_it() -> None:
    """A change whose answer is lost may have been made: its id is told."""
    done = runner.invoke(app, ["stop", "--reason", "x", "--request-id", "mine", "--address", _NOBODY])
    assert done.exit_code == 3
    assert "--request-id mine repeats it safely" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pause", "--reason", ""], "tolaria: reason: must not be empty (INVALID_ARGUMENT)\n"),
        (["resume", "--reason", "x"], "tolaria: the run is not held [31m (WRONG_STATE)\n"),
    ],
)
def test_refusal_is_exit_code_1(serve_fake: Serve, arguments: list[str], told: str) -> None:
    """A service that answers no is told as it says."""
    done = runner.invoke(app, [*arguments, "--address", serve_fake(fake_admin([]))])
    assert (done.exit_code, done.stderr) == (1, told)


def test_a_change_needs_its_own_options_only(serve_fake: Serve) -> None:
    """A new command is a function that fills in its request; everything shared comes with it."""
    extended = typer.Typer(cls=Told)
    extended.callback()(lambda: None)

    @changing(extended, lambda admin: admin.PauseTraining)
    def hold_on(prefix: Annotated[str, typer.Option()] = "p") -> PauseTrainingRequest:
        """Help of the new command."""
        return PauseTrainingRequest(reason=prefix)

    admin = fake_admin([])
    address = serve_fake(admin)
    done = runner.invoke(extended, ["hold-on", "--prefix", "q", "--reason", "why", "--address", address])
    assert done.stdout.startswith("hold_on: took effect at step 41")
    assert admin.requests[0].reason == "why"
    assert "Help of the new command" in runner.invoke(extended, ["hold-on", "--help"]).stdout


def _service(monkeypatch: pytest.MonkeyPatch, run: Callable[[Settings], int]) -> None:
    module = types.ModuleType("tolaria.service")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tolaria.service", module)


def test_serve_hands_over_settings_and_ends_as_the_service_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service gets the settings in force, and its exit code is the command's."""
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        return 7

    _service(monkeypatch, run)
    assert runner.invoke(app, ["serve", "--set", "training.epochs=3"]).exit_code == 7
    assert seen[0].training.epochs == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownJobError("there is no job 'nope'"), 2),
        (BindError("the admin server", "127.0.0.1:50051", "in use"), 1),
        (BaseExceptionGroup("tasks", [BindError("the admin server", "127.0.0.1:50051", "in use")]), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_of_the_service_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """What the service raises on purpose is a message, also out of a task group."""

    def run(_: Settings) -> int:
        raise error

    _service(monkeypatch, run)
    done = runner.invoke(app, ["serve"])
    assert done.exit_code == code
    assert "Traceback" not in done.stderr
    if isinstance(error, TolariaError):
        assert done.stderr == f"tolaria: {error}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), ExceptionGroup("tasks", [ZeroDivisionError()])])
def test_a_defect_is_not_disguised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What nobody raised on purpose keeps its traceback."""

    def run(_: Settings) -> int:
        raise error

    _service(monkeypatch, run)
    assert runner.invoke(app, ["serve"]).exception is error


def test_wrong_settings_stop_serve_before_the_service_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt setting is told without waiting for torch."""
    monkeypatch.setitem(sys.modules, "tolaria.service", None)
    assert runner.invoke(app, ["serve", "--set", "training.epochs=none"]).exit_code == 2


def test_serve_ends_with_its_standard_input() -> None:
    """With --while-stdin the end of whoever started it ends it by SIGTERM."""
    code = (
        "import signal, sys, types\nmodule = types.ModuleType('tolaria.service')\n"
        "def run(settings):\n"
        "    print('up', flush=True)\n"
        "    signal.sigwait({signal.SIGTERM})\n"
        "    return 5\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "module.run = run\nsys.modules['tolaria.service'] = module\n"
        "from tolaria.cli.grammar import app\napp(['serve', '--while-stdin'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 5


def test_peer_announces_its_address_on_stdout() -> None:
    """The one line of stdout tells where the peer listens; it ends with its standard input."""
    command = [sys.executable, "-m", "tolaria", "peer", "kasmina", "--listen", "127.0.0.1:0", "--while-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=30)
    host, _, port = json.loads(done.stdout)["listening"].partition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
