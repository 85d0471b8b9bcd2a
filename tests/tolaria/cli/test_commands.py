from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tolaria
from faults.small_training import new_training
from leyline.v1.admin_service_pb2 import RunState
from support.fake_admin import FakeAdmin, fake_admin, serving, status_of, whole_run
from tolaria.checkpoint.storage import open_storage
from tolaria.checkpoint.store import Retention
from tolaria.cli.admin_commands import CHAOS_EPOCHS, DEMO_EPOCHS
from tolaria.cli.commands import app
from tolaria.config import Settings
from tolaria.errors import BindError, StateHeldError, TolariaError, UnknownJobError
from tolaria.values.training import Position

Serve = Callable[[FakeAdmin], str]

_COMMANDS = (
    *("serve", "demo", "status", "watch", "pause", "resume", "stop", "lr", "conservative"),
    *("rollback", "checkpoint", "profile", "restore-points", "incidents", "verify", "doctor"),
    *("export", "new-job", "check-job"),
    *("emergency", "signals", "peer", "config", "audit", "certs", "token"),
    *("backup", "restore-backup", "state"),
)
_SUBCOMMANDS = (
    *("config check", "config show", "emergency raise", "emergency clear", "emergency show"),
    *("signals watch", "signals raise", "signals clear", "signals show"),
    *("state show", "state downgrade"),
    *("certs init", "certs client", "token new", "token list", "token revoke"),
)
NO_SERVICE = "127.0.0.1:1"

runner = CliRunner()


def test_help_lists_every_command() -> None:
    """The names of the commands are part of the interface."""
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in _COMMANDS)


@pytest.mark.parametrize("name", [*_COMMANDS, *_SUBCOMMANDS])
def test_every_command_has_help(name: str) -> None:
    """--help works for each command and subcommand."""
    shown = runner.invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage: tolaria" in shown.stdout or "Usage: root" in shown.stdout


def test_help_of_demo_shows_its_default_epochs() -> None:
    """The demo has another default than the settings."""
    shown = runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    assert f"else {DEMO_EPOCHS}, {CHAOS_EPOCHS} with chaos)" in shown.stdout


def test_version_is_that_of_the_package() -> None:
    """--version needs no command."""
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
        ["status", "--address", NO_SERVICE],
        ["incidents", "--address", NO_SERVICE],
        ["verify"],
    ],
)
def test_torch_is_not_imported(arguments: list[str]) -> None:
    """Only `serve` imports torch, as a new interpreter shows."""
    code = (
        "import sys\nfrom tolaria.cli.commands import app\n"
        "try:\n    app(sys.argv[1:], prog_name='tolaria')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False"


def test_config_check_accepts_good_settings() -> None:
    """Good settings are one line and exit code 0."""
    done = runner.invoke(app, ["config", "check", "--set", "training.epochs=3"])
    assert (done.exit_code, done.stdout) == (0, "the configuration is valid\n")


def test_config_check_reports_every_problem() -> None:
    """Each wrong setting has a line on stderr, without a traceback, and the exit code is 2."""
    done = runner.invoke(app, ["config", "check", "--set", "trainig.epochs=3", "--set", "server.lisen=x"])
    assert done.exit_code == 2
    assert "trainig: unknown section (--set); did you mean training?" in done.stderr
    assert "server.lisen: unknown field (--set); did you mean listen?" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_show_prints_a_settings_file(tmp_path: Path) -> None:
    """The output can be read back with --config; secrets are masked."""
    shown = runner.invoke(app, ["config", "show", "--set", "training.epochs=3", "--set", "leyline.secret=hush"])
    assert shown.exit_code == 0
    assert "hush" not in shown.stdout
    file = tmp_path / "shown.toml"
    file.write_text(shown.stdout, encoding="utf-8")
    again = runner.invoke(app, ["config", "show", "--config", str(file)])
    assert "epochs = 3" in again.stdout


def test_missing_config_file_is_a_configuration_error() -> None:
    """The file given with --config must exist."""
    done = runner.invoke(app, ["config", "check", "--config", "nowhere.toml"])
    assert done.exit_code == 2
    assert "no file nowhere.toml" in done.stderr


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
        *(["demo", "--ranks", ranks] for ranks in ("0", "-1", "17", "1000", "two", "1.5")),
        ["demo", "--chaos", "--stay"],
        ["demo", "--chaos", "--alone"],
        ["demo", "--chaos", "--set", "lane.mode=thread"],
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
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    """The message is on stderr, without a traceback."""
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def _service(monkeypatch: pytest.MonkeyPatch, run: Callable[[Settings, object], int]) -> None:
    module = types.ModuleType("tolaria.service")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tolaria.service", module)


def test_serve_passes_settings_and_returns_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service gets the effective settings; its exit code is that of the command."""
    seen: list[Settings] = []

    def run(settings: Settings, reread: object) -> int:
        seen.append(settings)
        return 7

    _service(monkeypatch, run)
    assert runner.invoke(app, ["serve", "--set", "training.epochs=3"]).exit_code == 7
    assert seen[0].training.epochs == 3


def test_serve_takes_a_name_and_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag's value is text, also where it looks like a number or has an equals sign."""
    seen: list[Settings] = []

    def run(settings: Settings, reread: object) -> int:
        seen.append(settings)
        return 0

    _service(monkeypatch, run)
    arguments = ["--run-name", "my run", "--tag", "team=vision", "--tag", "n=3", "--tag", "x=a=b"]
    assert runner.invoke(app, ["serve", *arguments]).exit_code == 0
    assert seen[0].training.run_name == "my run"
    assert seen[0].training.tags == {"team": "vision", "n": "3", "x": "a=b"}
    for wrong in ("team", "=x", "a.b=c"):
        assert runner.invoke(app, ["serve", "--tag", wrong]).exit_code == 2
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownJobError("there is no job 'nope'"), 2),
        (BindError("the admin server", "127.0.0.1:50051", "in use"), 2),
        (StateHeldError("state", 7), 2),
        (BaseExceptionGroup("tasks", [BindError("the admin server", "127.0.0.1:50051", "in use")]), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_of_the_service_have_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """A TolariaError is reported on one line, also if a task group raises it."""

    def run(_settings: Settings, _reread: object) -> int:
        raise error

    _service(monkeypatch, run)
    done = runner.invoke(app, ["serve"])
    assert done.exit_code == code
    assert "Traceback" not in done.stderr
    if isinstance(error, TolariaError):
        assert done.stderr == f"tolaria: {error}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), ExceptionGroup("tasks", [ZeroDivisionError()])])
def test_other_exceptions_are_not_caught(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """An exception that is not a TolariaError keeps its traceback."""

    def run(_settings: Settings, _reread: object) -> int:
        raise error

    _service(monkeypatch, run)
    assert runner.invoke(app, ["serve"]).exception is error


def test_serve_checks_the_settings_before_it_imports_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting is reported without waiting for torch."""
    monkeypatch.setitem(sys.modules, "tolaria.service", None)
    assert runner.invoke(app, ["serve", "--set", "training.epochs=none"]).exit_code == 2


def test_serve_exits_when_standard_input_is_closed() -> None:
    """With --while-stdin the end of the parent process causes SIGTERM."""
    code = (
        "import signal, sys, types\nmodule = types.ModuleType('tolaria.service')\n"
        "def run(settings, reread):\n"
        "    print('up', flush=True)\n"
        "    signal.sigwait({signal.SIGTERM})\n"
        "    return 5\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "module.run = run\nsys.modules['tolaria.service'] = module\n"
        "from tolaria.cli.commands import app\napp(['serve', '--while-stdin'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=180) == 5


def test_peer_prints_its_address() -> None:
    """The address is the only line of stdout; the peer exits when its standard input is closed."""
    command = [sys.executable, "-m", "tolaria", "peer", "kasmina", "--listen", "127.0.0.1:0", "--while-stdin"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=180)
    host, _, port = json.loads(done.stdout)["listening"].partition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_peer_serves_with_the_garbage_collector() -> None:
    """Which is off while modules are imported, and leaves them out afterwards."""
    code = (
        "import gc, tolaria.reference.server as server\n"
        "async def show(*_, **__): print(gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects()))\n"
        "server.serve_peer = show\nfrom tolaria.cli.main import main\nmain()"
    )
    command = [sys.executable, "-c", code, "peer", "kasmina", "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout == "True True\n"


def test_watch_follows_the_run_to_its_end(serve_fake: Serve) -> None:
    """Without a terminal, each epoch is a line; a finished run is exit code 0 although the service keeps serving."""
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin(whole_run()))])
    assert done.exit_code == 0
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "state running",
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
        "state finished",
    ]


def test_watch_json_prints_one_status_per_line(serve_fake: Serve) -> None:
    """Each line is the proto3 mapping of a status."""
    done = runner.invoke(app, ["watch", "--json", "--address", serve_fake(fake_admin(whole_run()))])
    assert [json.loads(line)["epoch"] for line in done.stdout.splitlines()] == [1, 2, 3, 3]


def test_watch_of_a_failed_run_is_exit_code_1(serve_fake: Serve) -> None:
    """The message holds the reason of the failure."""
    failed = status_of(1, state=RunState.RUN_STATE_FAILED)
    failed.state_reason = "loss is NaN"
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin([failed]))])
    assert (done.exit_code, done.stderr) == (1, "tolaria: the run failed: loss is NaN\n")


def test_watch_of_a_service_that_stops_is_exit_code_3(serve_fake: Serve) -> None:
    """The stream ends before the run is over."""
    done = runner.invoke(app, ["watch", "--address", serve_fake(fake_admin([status_of(1)], ends=True))])
    assert done.exit_code == 3
    assert "gone before its run was over" in done.stderr


def test_watch_waits_for_a_service_that_starts_later() -> None:
    """With --wait the command reports once that it waits."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "tolaria", "watch", "--wait", "--address", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"waiting: no service answers at {address}")
    with process, serving(fake_admin(whole_run()), address):
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "state finished"
    assert err == ""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with a journal and two checkpoints."""
    directory = tmp_path / "kept"
    training = new_training()
    storage = open_storage(directory, run_id="run", retention=Retention(last=3, best="highest"))
    with storage.journal:
        for step in (10, 20):
            training.position = Position(step, 1)
            storage.checkpoints.write(training.state().copy())
    return directory


def test_verify_of_an_intact_directory_is_exit_code_0(state: Path) -> None:
    """One line for the journal, then one for each checkpoint with its step and epoch."""
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert (done.exit_code, done.stderr) == (0, "")
    journal, first, second = done.stdout.splitlines()
    assert journal == "journal: whole, 2 committed checkpoints"
    assert first.startswith("000000000010-")
    assert ": whole, step 20, epoch 1, " in second


def test_verify_of_a_damaged_directory_is_exit_code_1(state: Path) -> None:
    """Everything is inspected; standard error has the number of damaged items and the consequence."""
    (oldest, _) = sorted((state / "checkpoints").iterdir())
    shutil.rmtree(oldest)
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert done.exit_code == 1
    assert f"{oldest.name}: damaged, manifest: missing" in done.stdout
    assert ": whole, step 20" in done.stdout
    assert done.stderr.startswith("tolaria: 1 of 3 are not what was written; the next start")


def test_verify_uses_the_directory_of_the_settings(state: Path) -> None:
    """Without --state-dir it reads state.dir."""
    assert runner.invoke(app, ["verify", "--set", f"state.dir={state}"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state-dir", "nowhere"], "--state-dir: there is no directory nowhere"),
        (["--set", "state.dir=nowhere"], "state.dir: there is no directory nowhere; give --state-dir"),
        (["--state-dir", "."], "--state-dir: . holds no journal.sqlite3"),
    ],
)
def test_verify_without_a_state_directory_is_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    """A script can distinguish a wrong path from damage; nothing is created."""
    done = runner.invoke(app, ["verify", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_prints_file_names_without_control_characters(state: Path) -> None:
    """A file that the journal does not know is reported, but is no damage."""
    (state / "checkpoints" / "x\x1b[2Jy\n").write_text("hello")
    done = runner.invoke(app, ["verify", "--state-dir", str(state)])
    assert done.exit_code == 0
    assert "x [2Jy: unknown, the journal names no such checkpoint" in done.stdout
    assert "\x1b" not in done.stdout
