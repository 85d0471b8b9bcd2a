from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from leyline.v1.admin_service_pb2 import GetStatusResponse, Incident
from leyline.v1.enums_pb2 import SEED_STAGE_BLENDING as BLENDING
from leyline.v1.enums_pb2 import SEED_STAGE_CULLED as CULLED
from leyline.v1.enums_pb2 import SEED_STAGE_DORMANT as DORMANT
from leyline.v1.enums_pb2 import SEED_STAGE_FOSSILIZED as FOSSILIZED
from leyline.v1.enums_pb2 import SEED_STAGE_GERMINATED as GERMINATED
from leyline.v1.enums_pb2 import SEED_STAGE_PROBATIONARY as PROBATIONARY
from leyline.v1.enums_pb2 import SEED_STAGE_SHADOWING as SHADOWING
from leyline.v1.enums_pb2 import SEED_STAGE_TRAINING as TRAINING
from leyline.v1.seeds_pb2 import SeedState
from tolaria.cli.demo import BIND_FAILURE, Demo
from tolaria.cli.errors import CommandFailedError, PortTakenError, SignalledError, StartRefusedError, exit_code
from tolaria.cli.report import RunRecord, SeedHistory, SeedSummary, mishap_lines, summary_lines
from tolaria.cli.serve_child import LINE_LENGTH_MAX, LOG_LINES_MAX, serve_child
from tolaria.errors import BindError


class ChildFifo(Protocol):
    path: Path

    def wait_for_exit(self) -> list[dict[str, Any]]: ...


_TESTS = Path(__file__).parents[2]
_FAKE = ("-m", "support.fake_serve")


@pytest.fixture(autouse=True)
def fake_serve_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes import support.fake_serve."""
    monkeypatch.setenv("PYTHONPATH", str(_TESTS))


def demo_of(
    child_fifo: ChildFifo, mode: str, *overrides: str, stay: bool = False, as_json: bool = False, alone: bool = True
) -> Demo:
    """Returns a demo whose service is the fake in `mode`, without a second one beside it unless `alone` is false."""
    plan = Demo.plan(None, overrides, epochs=None, stay=stay, as_json=as_json, alone=alone)
    return replace(plan, program=(sys.executable, *_FAKE, mode, str(child_fifo.path)))


def test_demo_follows_its_service_prints_a_summary_and_stops_it(
    child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each epoch, a summary with each seed, no address of the stopped service, and no process left."""
    demo_of(child_fifo, "run").run()
    assert len(child_fifo.wait_for_exit()) == 1
    out = capsys.readouterr().out
    assert "epoch 3/3" in out
    assert "digits finished: accuracy 93.00% after 3 epochs (135 steps)" in out
    seed = "seed-1 conv: epoch 1 germinated, 3 fossilized; accuracy 91.00% before it blended, 93.00% after"
    assert out.splitlines()[-2:] == [seed, "the service ends now; --stay keeps it running"]
    assert "--address" not in out


def test_demo_json_is_the_only_output_on_stdout(child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]) -> None:
    """The text goes to stderr."""
    demo_of(child_fifo, "run", as_json=True).run()
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert 0 < summary.pop("wall_seconds") < 60
    assert summary == {
        "final_accuracy": 0.93,
        "final_accuracy_without_seeds": None,
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
                "weight": 0.0,
                "share": 0.0,
                "conflicts": 0.0,
            }
        ],
        "commands": 2,
        "rollbacks": 1,
        "skipped_steps": 0,
        "digests": [],
        "chaos": None,
    }
    assert "epoch 3/3" in captured.err


def test_demo_compares_with_the_same_run_without_seeds(
    child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second service gets the same settings without seeds, its own ports and directory; its result is shown."""
    demo_of(child_fifo, "run", alone=False).run()
    both = [written["arguments"] for written in child_fifo.wait_for_exit()]
    with_seeds, without = sorted(both, key=len)
    assert without[: len(with_seeds) - 2] == with_seeds[:-2]
    assert {"seeds.enabled=false", "server.listen=127.0.0.1:0", "signals.path="} <= set(without) - set(with_seeds)
    assert with_seeds[-1].startswith("state.dir=")
    assert without[-1] != with_seeds[-1]
    out = capsys.readouterr().out
    assert "the same run without seeds: accuracy 93.00%; the seeds added 0.0 points" in out
    assert "without seeds" in out


def test_demo_reports_that_the_other_run_failed(child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo itself does not fail."""
    demo_of(child_fifo, "second-fails", alone=False).run()
    assert len(child_fifo.wait_for_exit()) == 2
    assert "the same run without seeds failed: exit code 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "compare", "options"),
    [
        ([], True, True),
        (["training.epochs=3", "optimizer.policy=constant"], True, True),
        (["training.options.width=4"], False, False),
        (["training.job=mine:job"], False, False),
    ],
)
def test_only_the_own_job_gets_the_settings_of_the_demo(overrides: list[str], compare: bool, options: bool) -> None:
    """Another job, or the digits job with other options, is trained as it is; each setting can be overridden."""
    plan = Demo.plan(None, overrides, epochs=None, stay=False, as_json=False)
    assert plan.compare == compare
    assert (plan.settings.training.options.get("host") == "thumbnail") == options
    assert plan.settings.training.deterministic == options
    wanted = {name: value for name, _, value in (override.partition("=") for override in overrides)}
    assert plan.settings.training.epochs == int(wanted.get("training.epochs", "60"))
    assert plan.settings.optimizer.policy == wanted.get("optimizer.policy", "cosine" if options else "constant")


def record_of(*statuses: GetStatusResponse, incidents: Sequence[Incident] = ()) -> RunRecord:
    """Returns the record of these statuses."""
    record = RunRecord(incidents=incidents)
    for status in statuses:
        record.update(status)
    return record


@pytest.mark.parametrize(("restored", "verdict"), [("abc", "equal"), ("abd", "NOT EQUAL"), ("", "NOT EQUAL")])
def test_mishaps_are_reported_with_both_digests(restored: str, verdict: str) -> None:
    """Skipped steps are counted, and each rollback, oldest first, shows both digests and whether they are equal."""
    details = {"restored_step": "40", "state_digest": restored, "expected_digest": "abc"}
    incidents = [
        Incident(kind="rollback", global_step=90, reason="later", occurred_at=Timestamp(seconds=2), details=details),
        Incident(kind="rollback", global_step=57, reason="loss", occurred_at=Timestamp(seconds=1), details=details),
        Incident(kind="checkpoint_failed", global_step=58),
    ]
    lines = mishap_lines(record_of(GetStatusResponse(skipped_steps=2), incidents=incidents))
    digests = f"digest restored {restored or 'none'}, captured abc: {verdict}"
    assert lines == [
        "2 steps were skipped: loss or gradient was not finite or extreme, so nothing changed",
        f"rolled back from step 57 to 40: loss; {digests}",
        f"rolled back from step 90 to 40: later; {digests}",
    ]
    assert mishap_lines(record_of(GetStatusResponse())) == []


def test_merged_gradients_are_reported() -> None:
    """The largest weight and share of a seed's row, and its mean conflicts, over the epochs in which it had one."""
    statuses = [
        GetStatusResponse(
            epoch=epoch,
            seeds=[
                SeedState(
                    seed_id="s",
                    stage=BLENDING,
                    metrics={"weight": weight, "share": weight / 2, "conflict_ratio": conflicts},
                )
            ],
        )
        for epoch, weight, conflicts in [(1, 0.0, 0.0), (2, 0.25, 0.5), (2, 0.25, 0.5), (3, 0.75, 0.25)]
    ]
    assert (
        "s: its gradient was merged with the host's in 2 epochs, weight up to 0.75 (the host has 1), up to 38% of all "
        "norms; it conflicted in 38% of the steps, and PCGrad removed the conflicting part"
    ) in summary_lines(record_of(*statuses), None, 1.0)


def test_demo_passes_its_options_to_the_service(child_fifo: ChildFifo, tmp_path: Path) -> None:
    """Settings file, overrides and epochs; the log has the format and level that the demo reads."""
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nseed = 3\n", encoding="utf-8")
    overrides = ["logging.level=error", "logging.format=console"]
    plan = Demo.plan(file, overrides, epochs=2, stay=False, as_json=False, alone=True)
    replace(plan, program=(sys.executable, *_FAKE, "run", str(child_fifo.path))).run()
    [written] = child_fifo.wait_for_exit()
    arguments = written["arguments"]
    assert arguments[:4] == ["serve", "--while-stdin", "--config", str(file)]
    values = [value for flag, value in zip(arguments[4::2], arguments[5::2], strict=True) if flag == "--set"]
    effective = dict(value.split("=", 1) for value in values)
    assert effective["training.epochs"] == "2"
    assert (effective["logging.format"], effective["logging.level"]) == ("json", "info")


def test_demo_uses_free_ports_when_the_default_ports_are_taken(
    child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second service on the same machine is no failure, and the restart is reported."""
    demo_of(child_fifo, "port-taken").run()
    first, second = child_fifo.wait_for_exit()
    assert "server.listen=127.0.0.1:0" not in first["arguments"]
    assert {"server.listen=127.0.0.1:0", "metrics.listen=127.0.0.1:0"} <= set(second["arguments"])
    assert "an address is in use; starting again on free ports" in capsys.readouterr().out


def test_demo_does_not_change_given_addresses(child_fifo: ChildFifo) -> None:
    """A given port that is taken is an error with the message of the child."""
    chosen = ("server.listen=127.0.0.1:7001", "metrics.listen=127.0.0.1:7002")
    with pytest.raises(PortTakenError, match="cannot listen on"):
        demo_of(child_fifo, "port-taken", *chosen).run()
    assert len(child_fifo.wait_for_exit()) == 1


def test_demo_tries_free_ports_once(child_fifo: ChildFifo) -> None:
    """The demo fails if the second attempt fails too."""
    with pytest.raises(PortTakenError) as caught:
        demo_of(child_fifo, "bind-fails").run()
    assert exit_code(caught.value) == 2
    assert len(child_fifo.wait_for_exit()) == 2


def test_bind_failure_is_part_of_the_message_of_bind_error() -> None:
    """The demo recognises BindError in the log of the child."""
    assert BIND_FAILURE in str(BindError("the admin server", "127.0.0.1:1", "in use"))


def test_demo_of_an_unknown_job_is_exit_code_2(child_fifo: ChildFifo) -> None:
    """The reason and the exit code are those of the service."""
    with pytest.raises(StartRefusedError, match="there is no job 'nope'") as caught:
        demo_of(child_fifo, "bad-job").run()
    assert exit_code(caught.value) == 2
    child_fifo.wait_for_exit()


def test_demo_of_a_failed_run_is_exit_code_1(child_fifo: ChildFifo, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the reason and the last lines of the log; stdout is empty."""
    with pytest.raises(CommandFailedError, match="the run failed: loss is NaN") as caught:
        demo_of(child_fifo, "run-fails", as_json=True).run()
    assert "the last words" in str(caught.value)
    assert exit_code(caught.value) == 1
    assert capsys.readouterr().out == ""
    child_fifo.wait_for_exit()


def test_demo_reports_the_exit_code_of_a_service_that_exits(child_fifo: ChildFifo) -> None:
    """With the last lines of its log."""
    with pytest.raises(CommandFailedError, match="exit code 7") as caught:
        demo_of(child_fifo, "dies").run()
    assert "out of luck" in str(caught.value)
    child_fifo.wait_for_exit()


def test_demo_kills_a_service_that_does_not_stop(child_fifo: ChildFifo) -> None:
    """SIGKILL follows after the drain timeout and the margin."""
    replace(demo_of(child_fifo, "stubborn", "service.drain_timeout_s=0.1"), stop_margin_s=0.1).run()
    child_fifo.wait_for_exit()


def test_demo_of_a_service_that_never_serves_fails(child_fifo: ChildFifo) -> None:
    """The start has a timeout."""
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    demo = demo_of(child_fifo, "run", "service.drain_timeout_s=0.1")
    with pytest.raises(CommandFailedError, match="did not start within"):
        replace(demo, program=program, start_timeout_s=0.01, stop_margin_s=0.1).run()


@pytest.mark.anyio
async def test_child_log_is_bounded(child_fifo: ChildFifo) -> None:
    """Many lines neither block the child nor fill the memory."""
    command = [sys.executable, *_FAKE, "noisy", str(child_fifo.path)]
    async with serve_child(command, stop_timeout_s=10.0) as child:
        assert await child.addresses(20.0) is not None
        assert len(child.log_lines) == LOG_LINES_MAX
        assert child.log_lines[-2] == "line 4999"
    child_fifo.wait_for_exit()


@pytest.mark.anyio
async def test_child_output_without_line_breaks_is_cut() -> None:
    """A megabyte without a line break becomes lines of bounded length."""
    code = "import sys; sys.stderr.write('x' * 1_000_000 + '\\nlast words'); sys.exit(3)"
    async with serve_child([sys.executable, "-c", code], stop_timeout_s=10.0) as child:
        assert await child.addresses(20.0) is None
        await child.wait()
        assert child.returncode == 3
        assert max(map(len, child.log_lines)) <= LINE_LENGTH_MAX
        assert "last words" in child.log_lines
        assert sum(map(len, child.log_lines)) > LINE_LENGTH_MAX


@pytest.mark.anyio
async def test_child_is_stopped_by_an_exception(child_fifo: ChildFifo) -> None:
    """The child exits however the block ends."""

    async def fail() -> None:
        async with serve_child([sys.executable, *_FAKE, "endless", str(child_fifo.path)], stop_timeout_s=10.0) as child:
            await child.addresses(20.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    child_fifo.wait_for_exit()


@pytest.mark.anyio
async def test_second_cancellation_kills_the_child(child_fifo: ChildFifo) -> None:
    """A second Ctrl-C does not wait for the child to drain."""
    serving = asyncio.Event()
    stopping = asyncio.Event()

    async def keep() -> None:
        async with serve_child(
            [sys.executable, *_FAKE, "stubborn", str(child_fifo.path)], stop_timeout_s=600.0
        ) as child:
            await child.addresses(20.0)
            serving.set()
            try:
                await child.wait()
            finally:
                stopping.set()

    task = asyncio.create_task(keep())
    await serving.wait()
    task.cancel()
    await stopping.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    child_fifo.wait_for_exit()


def demo_process(child_fifo: ChildFifo, mode: str, *, stay: bool) -> subprocess.Popen[str]:
    """Starts `tolaria demo` with the fake service."""
    code = (
        "import sys\nfrom dataclasses import replace\n"
        "from tolaria.cli.commands import app\nfrom tolaria.cli.demo import Demo\n"
        "plan = Demo.plan\n"
        "Demo.plan = lambda *a, **k: replace(plan(*a, **k), program=tuple(sys.argv[1:6]), compare=False)\n"
        "app(['demo', *sys.argv[6:]])\n"
    )
    command: Sequence[str] = [sys.executable, "-c", code, sys.executable, *_FAKE, mode, str(child_fifo.path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *(["--stay"] if stay else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads lines of stdout until one contains `text`."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_demo_and_its_service(child_fifo: ChildFifo, number: int, code: int) -> None:
    """SIGINT and SIGTERM during a run leave no process and have the usual exit codes."""
    with demo_process(child_fifo, "endless", stay=False) as process:
        read_until(process, "epoch 1/3")
        process.send_signal(number)
        _, err = process.communicate(timeout=180)
    child_fifo.wait_for_exit()
    assert process.returncode == code
    # gRPC may have logged the lost connection before.
    assert err.splitlines()[-1] == f"tolaria: {SignalledError(number)}"
    assert "Traceback" not in err


def test_service_exits_when_the_demo_is_killed(child_fifo: ChildFifo) -> None:
    """SIGKILL allows no cleanup, but closes the standard input of the child."""
    with demo_process(child_fifo, "endless", stay=False) as process:
        read_until(process, "epoch 1/3")
        process.kill()
        process.communicate(timeout=180)
    child_fifo.wait_for_exit()


def test_demo_with_stay_serves_until_ctrl_c(child_fifo: ChildFifo) -> None:
    """It prints the addresses; Ctrl-C is exit code 0."""
    with demo_process(child_fifo, "run", stay=True) as process:
        read_until(process, "metrics  http://127.0.0.1:9/metrics")
        read_until(process, "status   tolaria status --address 127.0.0.1:")
        read_until(process, "still serving; Ctrl-C ends it")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=180)
    child_fifo.wait_for_exit()
    assert process.returncode == 0
    assert "tolaria:" not in err


def history_of(*shown: tuple[int, float]) -> SeedSummary:
    """Returns the history of a seed whose stage and accuracy in epochs 1, 2, ... are `shown`."""
    history = SeedHistory()
    for epoch, (stage, accuracy) in enumerate(shown, 1):
        seed = SeedState(seed_id="s", stage=stage, blueprint_id="lora")  # type: ignore[arg-type]
        history.update(GetStatusResponse(epoch=epoch, validation_accuracy=accuracy, seeds=[seed]))
    (summary,) = history.seeds.values()
    return summary


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (
            [
                (GERMINATED, 0.8),
                (TRAINING, 0.9),
                (BLENDING, 0.7),
                (PROBATIONARY, 0.91),
                (FOSSILIZED, 0.95),
                (FOSSILIZED, 0.99),
            ],
            "s lora: epoch 1 germinated, 5 fossilized; accuracy 90.00% before it blended, 95.00% after",
        ),
        (
            [
                (TRAINING, 0.9),
                (BLENDING, 0.5),
                (CULLED, 0.4),
                (DORMANT, 0.9),
            ],
            "s lora: epoch 1 germinated, 3 culled; accuracy 90.00% before it blended, 40.00% when it was culled",
        ),
        (
            [(TRAINING, 0.9), (CULLED, 0.9)],
            "s lora: epoch 1 germinated, 2 culled; it did not blend",
        ),
        ([(TRAINING, 0.9)], "s lora: epoch 1 germinated, training at the end; it did not blend"),
        (
            [(GERMINATED, 0.0), (BLENDING, 0.5), (SHADOWING, 0.6)],
            "s lora: epoch 1 germinated, shadowing at the end; accuracy unknown before it blended, 60.00% at the end",
        ),
        (
            [(FOSSILIZED, 0.9)],
            "s lora: germinated unseen, 1 fossilized; accuracy unknown before it blended, 90.00% after",
        ),
        (
            [
                (TRAINING, 0.8),
                (BLENDING, 0.9),
                (FOSSILIZED, 0.9),
                (TRAINING, 0.7),
            ],
            "s lora: epoch 1 germinated, training at the end; it did not blend",
        ),
        (
            [(TRAINING, 0.8), (DORMANT, 0.9), (GERMINATED, 0.7)],
            "s lora: epoch 3 germinated, germinated at the end; it did not blend",
        ),
    ],
)
def test_seed_history_is_one_line(shown: list[tuple[int, float]], line: str) -> None:
    """Germination, end and accuracies; a rollback reverts the end, and a second germination starts again."""
    assert history_of(*shown).line() == line


def test_accuracy_that_is_not_a_number_is_unknown() -> None:
    """So is the zero of a run without a validation."""
    assert history_of((TRAINING, math.nan)).accuracy_before is None
    assert history_of((TRAINING, 0.0)).accuracy_before is None


def test_seed_names_are_printed_without_control_characters() -> None:
    """Names come from a peer."""
    assert SeedSummary("s\x1b[2J", TRAINING, "b").line().startswith("s [2J b: ")
