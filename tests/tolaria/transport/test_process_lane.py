"""The service's side of a lane whose process is a script that misbehaves."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from support.script_lanes import running_script
from tolaria.config.ranks import RAISED
from tolaria.errors import ConfigurationError, LaneFailedError, LaneLostError
from tolaria.lane.messages import CaptureImage, Held, Hold, LaneEnded, LaneLost, LaneRestarted, Release, RunEpoch, Stop

pytestmark = pytest.mark.anyio


async def test_an_exception_of_a_rank_that_does_not_lead_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent ends with the code of that rank, and its line comes first."""
    text = "OSError: no file\\nrank 1 of 2 ended with code 85\\n"
    script = f"say_ready(); say(Held(1, 1)); os.write(2, '{text}'.encode()); os._exit({RAISED})"
    async with running_script(script, monkeypatch) as lane:
        lost = await lane.until(LaneLost)
        assert isinstance(lost, LaneLost)
        assert (lost.kind, lost.cause) == ("raised", "rank 1 of 2 ended with code 85\nOSError: no file")


@pytest.mark.parametrize(
    ("misdeed", "words"),
    [
        ("wire.sendall(b'nonsense' * 1000)", "not a frame"),
        ("wire.sendall(bytes.fromhex('0a7a0300ffffff7f'))", "not a frame"),
        ("send(wire, Frame(FrameKind.EVENTS, b'nonsense'))", "cut off"),
        ("send(wire, Frame(FrameKind.EVENTS, packed_events([b'nonsense'])))", "not a message"),
        ("send(wire, Frame(FrameKind.SEGMENTS, b'5'))", "no numbers of segments"),
        ("send(wire, Frame(FrameKind.SEGMENTS, b'[5]'))", "1 segments came with 0 descriptors"),
        ("send(wire, Frame(FrameKind.SEGMENTS_FREED, b'{}'))", "no numbers of segments"),
        ("send(wire, Frame(FrameKind.IMAGE, b'1'))", "no room for an id"),
        ("send(wire, Frame(FrameKind.ORDER, b''))", "sent a order frame"),
        ("wire.sendall(bytes.fromhex('0a7a030010000000') + b'half'); wire.close()", "within a frame"),
    ],
)
async def test_nonsense_on_the_wire_is_a_loss_with_a_reason(
    misdeed: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed whatever it does, and another one follows."""
    script = f"say_ready(); say(Held(1, 1)); time.sleep(0.3); {misdeed}; time.sleep(3600)"
    async with running_script(script, monkeypatch) as lane:
        lost = await lane.until(LaneLost)
        assert isinstance(lost, LaneLost)
        assert (lost.kind, words in lost.cause) == ("connection", True), lost
        restarted = await lane.until(LaneRestarted)
        assert isinstance(restarted, LaneRestarted)
        assert (restarted.generation, lane.plans) == (2, 1)


async def test_a_flood_of_events_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, without another limit than the lane's own waiting for room."""
    script = "say_ready()\nfor n in range(200): say(*[Held(n, k) for k in range(100)])\nwait()"
    async with running_script(script, monkeypatch) as lane:
        with anyio.fail_after(180):
            while len(lane.events) < 20_000:
                await anyio.sleep(0.01)
        assert not any(isinstance(event, LaneLost) for event in lane.events)


async def test_what_was_said_last_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that a process has sent before it died precede its loss."""
    script = "say_ready(); say(*[Held(n, n) for n in range(1000)]); os._exit(3)"
    async with running_script(script, monkeypatch, restarts_max=0) as lane:
        await lane.until(LaneEnded)
        assert len(lane.events) == 1001
        assert isinstance(ended := lane.events[-1], LaneEnded)
        assert "ended with code 3" in str(ended.failure)


async def test_commands_to_a_dead_lane_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders and holds are not: the run repeats them."""
    async with running_script(
        "say_ready(); os._exit(3)", monkeypatch, restart_pause_s=3600, restart_pause_max_s=3600
    ) as lane:
        await lane.until(LaneLost)
        lane.lane.send(1, RunEpoch(1))
        with pytest.raises(LaneLostError):
            lane.lane.send(2, CaptureImage())
        lane.lane.send(3, Stop())
        ended = await lane.until(LaneEnded)
        assert ended == LaneEnded(0, None)


async def test_deaths_are_counted_over_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than lane.restarts_max is the end."""
    async with running_script("say_ready(); os._exit(3)", monkeypatch, restarts_max=2) as lane:
        ended = await lane.until(LaneEnded)
        assert isinstance(ended, LaneEnded)
        assert "died 3 times within 3600 s" in str(ended.failure)
        assert sum(isinstance(event, LaneLost) for event in lane.events) == 2


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("os._exit(5)", LaneFailedError, "ended with code 5"),
        ("os.kill(os.getpid(), 11)", LaneFailedError, "SIGSEGV"),
        (
            "send(wire, Frame(FrameKind.READY, to_bytes(LaneEnded(0, Failure.of(ConfigurationError(['odd']))))))",
            ConfigurationError,
            "odd",
        ),
    ],
)
async def test_a_lane_that_is_never_built_is_refused(
    script: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own error if it has said one, and without another try."""
    with pytest.raises(ExceptionGroup) as caught:
        async with running_script(script, monkeypatch):
            pass
    (refused,) = caught.value.exceptions
    assert isinstance(refused, error)
    assert words in str(refused)


async def test_a_process_that_does_not_end_after_its_last_message_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the job may keep it; the next process does not wait for them for long."""
    monkeypatch.setattr("tolaria.transport.lane_process._EXIT_S", 0.2)
    script = "say_ready(); say(LaneEnded(7, Failure('OSError', ('no file',)))); time.sleep(3600)"
    async with running_script(script, monkeypatch) as lane:
        lost = await lane.until(LaneLost)
        assert isinstance(lost, LaneLost)
        assert (lost.kind, lost.cause) == ("raised", "OSError: no file")
        ended = await lane.until(LaneEnded)  # the same three times
        assert isinstance(ended, LaneEnded)
        assert "no file" in str(ended.failure)


SILENT = """
from tolaria.segments import Segment
from tolaria.signals.lane_page import LanePage
page = LanePage(Segment(0, int(options["page"])))
page.show_batch(1, 1); say_ready(); page.show_silent_rank()
while (frame := stream.next()).kind is not FrameKind.COMMAND: pass
page.show_batch(1, {batch}); stream.next(); os._exit(3)
"""


@pytest.mark.parametrize("recovers", [True, False])
async def test_stacks_of_a_rank_that_gives_heartbeats_again_are_not_in_a_later_cause(
    recovers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lane has gone on to another batch, after the rank would have ended: then the end has another cause."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tolaria.transport.lane_process.SILENT_ENDS_S", 0.0)

    async def logged(event: str) -> None:
        with anyio.fail_after(180):
            while event not in [entry["event"] for entry in logs]:
                await anyio.sleep(0.005)

    with capture_logs() as logs:
        async with running_script(SILENT.format(batch=2 if recovers else 1), monkeypatch) as lane:
            await logged("lane_stacks")
            lane.lane.send(1, RunEpoch(1))
            if recovers:
                await logged("rank_recovered")
            lane.lane.send(2, RunEpoch(2))
            lost = await lane.until(LaneLost)
            assert isinstance(lost, LaneLost)
            assert (lost.kind, "stacks" in lost.cause) == ("exited", not recovers), lost


HELD = """
from tolaria.segments import Segment
from tolaria.signals.lane_page import LanePage
page = LanePage(Segment(0, int(options["page"])))
say_ready()
while not page.hold_number(): time.sleep(0.005)
say(Held(0, page.hold_number()))
wait()
"""


@pytest.mark.parametrize("released", [False, True])
async def test_a_hold_from_before_there_is_a_process_is_kept_for_it(
    released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an operator who pauses a run at its start: the process that is ready then does not take a step."""
    wanted: list[Hold | Release] = [Hold(7), Release(), Hold(9)] if released else [Hold(7)]
    async with running_script(HELD, monkeypatch, before=wanted) as lane:
        held = await lane.until(Held)
        assert isinstance(held, Held)
        assert held.number == (9 if released else 7)
