from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from tolaria.cli import demo as demo_module
from tolaria.cli.child import LINE_BYTES_MAX, LOG_LINES_MAX, serve_child
from tolaria.cli.demo import BIND_FAILURE, Demo, planned, run
from tolaria.cli.failures import DemoFailedError, PortTakenError, SignalledError, StartRefusedError, exit_code
from tolaria.errors import BindError


class Lifeline(Protocol):
    path: Path

    def until_gone(self) -> list[dict[str, Any]]: ...


_TESTS = Path(__file__).parents[2]
_FAKE = ("-m", "support.fake_serve")


@pytest.fixture(autouse=True)
def _children_find_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_TESTS))


def _demo(lifeline: Lifeline, mode: str, *overrides: str, stay: bool = False, as_json: bool = False) -> Demo:
    plan = planned(None, overrides, epochs=None, stay=stay, as_json=as_json)
    return replace(plan, program=(sys.executable, *_FAKE, mode, str(lifeline.path)))


def test_demo_follows_sums_up_and_ends_its_service(lifeline: Lifeline, capsys: pytest.CaptureFixture[str]) -> None:
    """A line an epoch, a summary with each seed's story, no address that is gone in a moment; no process is left."""
    run(_demo(lifeline, "run"))
    assert len(lifeline.until_gone()) == 1
    out = capsys.readouterr().out
    assert "epoch 3/3" in out
    assert "digits finished: accuracy 93.00% after 3 epochs (135 steps)" in out
    told = "seed-1 conv: epoch 1 germinated, 3 fossilized; accuracy 91.00% before it blended, 93.00% after"
    assert out.splitlines()[-2:] == [told, "the service ends now; --stay keeps it up to look around"]
    assert "--address" not in out


def test_demo_json_is_alone_on_stdout(lifeline: Lifeline, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs read one object; people's lines go to stderr."""
    run(_demo(lifeline, "run", as_json=True))
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert 0 < told.pop("wall_seconds") < 60
    assert told == {
        "final_accuracy": 0.93,
        "epochs": 3,
        "steps": 135,
        "boundary_ms_p50": 4.0,
        "boundary_ms_p99": 6.5,
        "seeds": [
            {
                "seed_id": "seed-1",
                "stage": "SEED_STAGE_FOSSILIZED",
                "blueprint_id": "conv",
                "epoch_germinated": 1,
                "accuracy_before": 0.91,
                "accuracy_after": 0.93,
            }
        ],
        "commands": 2,
        "rollbacks": 1,
    }
    assert "epoch 3/3" in captured.err


def test_demo_passes_on_what_was_asked_for(lifeline: Lifeline, tmp_path: Path) -> None:
    """File, settings and epochs reach the service, and the log comes in the form that the demo reads."""
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nseed = 3\n", encoding="utf-8")
    plan = planned(file, ["logging.level=error", "logging.format=console"], epochs=2, stay=False, as_json=False)
    run(replace(plan, program=(sys.executable, *_FAKE, "run", str(lifeline.path))))
    [said] = lifeline.until_gone()
    arguments = said["arguments"]
    assert arguments[:4] == ["serve", "--while-stdin", "--config", str(file)]
    values = [value for flag, value in zip(arguments[4::2], arguments[5::2], strict=True) if flag == "--set"]
    in_force = dict(value.split("=", 1) for value in values)
    assert in_force["training.epochs"] == "2"
    assert (in_force["logging.format"], in_force["logging.level"]) == ("json", "info")


def test_demo_takes_free_ports_when_the_usual_ones_are_taken(
    lifeline: Lifeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second service beside the first is no failure, and is told."""
    run(_demo(lifeline, "port-taken"))
    first, second = lifeline.until_gone()
    assert "server.listen=127.0.0.1:0" not in first["arguments"]
    assert {"server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0"} <= set(second["arguments"])
    assert "an address is in use; starting again on free ports" in capsys.readouterr().out


def test_demo_leaves_addresses_alone_that_somebody_chose(lifeline: Lifeline) -> None:
    """A port that was asked for and is taken is an error, which holds the child's own words."""
    chosen = ("server.listen=127.0.0.1:7001", "metrics.listen=127.0.0.1:7002")
    with pytest.raises(PortTakenError, match="cannot listen on"):
        run(_demo(lifeline, "port-taken", *chosen))
    assert len(lifeline.until_gone()) == 1


def test_demo_tries_free_ports_once_only(lifeline: Lifeline) -> None:
    """Where free ports cannot be had either, the demo fails."""
    with pytest.raises(PortTakenError) as caught:
        run(_demo(lifeline, "bind-fails"))
    assert exit_code(caught.value) == 1
    assert len(lifeline.until_gone()) == 2


def test_bind_failure_is_recognised_by_the_error_s_own_words() -> None:
    """The demo reads what BindError writes: both must change together."""
    assert BIND_FAILURE in str(BindError("the admin server", "127.0.0.1:1", "in use"))


def test_demo_of_a_broken_job_has_the_exit_code_of_wrong_settings(lifeline: Lifeline) -> None:
    """The service's reason for not starting is passed on with its code."""
    with pytest.raises(StartRefusedError, match="there is no job 'nope'") as caught:
        run(_demo(lifeline, "bad-job"))
    assert exit_code(caught.value) == 2
    lifeline.until_gone()


def test_demo_of_a_failing_run_fails(lifeline: Lifeline, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the reason, and the last lines of the log; nothing on stdout for programs."""
    with pytest.raises(DemoFailedError, match="the run failed: loss is NaN") as caught:
        run(_demo(lifeline, "run-fails", as_json=True))
    assert "the last words" in str(caught.value)
    assert exit_code(caught.value) == 1
    assert capsys.readouterr().out == ""
    lifeline.until_gone()


def test_demo_tells_how_its_service_died(lifeline: Lifeline) -> None:
    """A service that is gone in the middle of the run leaves its exit code and its last words."""
    with pytest.raises(DemoFailedError, match="exit code 7") as caught:
        run(_demo(lifeline, "dies"))
    assert "out of luck" in str(caught.value)
    lifeline.until_gone()


def test_demo_kills_a_service_that_will_not_end(lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that ignores SIGTERM is killed after its time to drain."""
    monkeypatch.setattr(demo_module, "_STOP_MARGIN_S", 0.1)
    run(_demo(lifeline, "stubborn", "service.drain_timeout_s=0.1"))
    lifeline.until_gone()


def test_demo_gives_up_a_service_that_never_serves(lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the start has an end."""
    monkeypatch.setattr(demo_module, "_START_TIMEOUT_S", 0.01)
    with pytest.raises(DemoFailedError, match="did not start within"):
        run(replace(_demo(lifeline, "run"), program=(sys.executable, "-c", "import time; time.sleep(60)")))


@pytest.mark.anyio
async def test_child_log_is_bounded(lifeline: Lifeline) -> None:
    """A flood of lines neither blocks the child nor fills the memory."""
    command = [sys.executable, *_FAKE, "noisy", str(lifeline.path)]
    async with serve_child(command, stop_timeout_s=10.0) as child:
        assert await child.serving(20.0) is not None
        assert len(child.log_lines) == LOG_LINES_MAX
        assert child.log_lines[-2] == "line 4999"
    lifeline.until_gone()


@pytest.mark.anyio
async def test_child_line_without_end_is_cut() -> None:
    """A child that writes a megabyte without a line break costs no more than lines of a bounded length."""
    code = "import sys; sys.stderr.write('x' * 1_000_000); sys.stdout.write('last words'); sys.exit(3)"
    async with serve_child([sys.executable, "-c", code], stop_timeout_s=10.0) as child:
        assert await child.serving(20.0) is None
        await child.ended()
        assert child.returncode == 3
        assert max(map(len, child.log_lines)) <= LINE_BYTES_MAX
        assert "last words" in child.log_lines
        assert sum(map(len, child.log_lines)) > LINE_BYTES_MAX


@pytest.mark.anyio
async def test_child_does_not_survive_an_exception(lifeline: Lifeline) -> None:
    """Whatever ends the block ends the child."""

    async def fail() -> None:
        async with serve_child([sys.executable, *_FAKE, "endless", str(lifeline.path)], stop_timeout_s=10.0) as child:
            await child.serving(20.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    lifeline.until_gone()


@pytest.mark.anyio
async def test_second_cancellation_kills_at_once(lifeline: Lifeline) -> None:
    """Somebody who presses Ctrl-C twice does not wait for the drain."""
    serving = asyncio.Event()
    stopping = asyncio.Event()

    async def keep() -> None:
        async with serve_child([sys.executable, *_FAKE, "stubborn", str(lifeline.path)], stop_timeout_s=600.0) as child:
            await child.serving(20.0)
            serving.set()
            try:
                await child.ended()
            finally:
                stopping.set()

    task = asyncio.create_task(keep())
    await serving.wait()
    task.cancel()
    await stopping.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    lifeline.until_gone()


def _in_a_process(lifeline: Lifeline, mode: str, *, stay: bool) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom dataclasses import replace\n"
        "from tolaria.cli import demo\nfrom tolaria.cli.grammar import app\n"
        "demo.SERVE = tuple(sys.argv[1:6])\n"
        "original = demo.planned\n"
        "demo.planned = lambda *a, **k: replace(original(*a, **k), program=demo.SERVE)\n"
        "app(['demo', *sys.argv[6:]])\n"
    )
    command: Sequence[str] = [sys.executable, "-c", code, sys.executable, *_FAKE, mode, str(lifeline.path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *(["--stay"] if stay else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_ended_by_a_signal_ends_its_service(lifeline: Lifeline, number: int, code: int) -> None:
    """Ctrl-C and SIGTERM in the middle of a run leave no process and have the usual exit codes."""
    with _in_a_process(lifeline, "endless", stay=False) as process:
        _until(process, "epoch 1/3")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    lifeline.until_gone()
    assert process.returncode == code
    # gRPC itself may have noted the end of the connection before.
    assert err.splitlines()[-1] == f"tolaria: {SignalledError(number)}"
    assert "Traceback" not in err


def test_service_does_not_survive_a_killed_demo(lifeline: Lifeline) -> None:
    """SIGKILL leaves no time to clean up: the child sees its standard input end."""
    with _in_a_process(lifeline, "endless", stay=False) as process:
        _until(process, "epoch 1/3")
        process.kill()
        process.communicate(timeout=30)
    lifeline.until_gone()


def test_stay_keeps_serving_until_ctrl_c(lifeline: Lifeline) -> None:
    """Where to look is told, and the end of --stay is the user's wish: exit code 0."""
    with _in_a_process(lifeline, "run", stay=True) as process:
        _until(process, "metrics  http://127.0.0.1:9/metrics")
        _until(process, "status   tolaria status --address 127.0.0.1:")
        _until(process, "still serving; Ctrl-C ends it")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    lifeline.until_gone()
    assert process.returncode == 0
    assert "tolaria:" not in err
