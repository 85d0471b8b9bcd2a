from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from leyline.v1.enums_pb2 import EmergencyLevel
from support.emergency import ControllerHarness
from tolaria.emergency import Cleared, Clearer, EmergencyState, Escalated, Phase
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, SignalValueError

LEVELS = st.sampled_from([level for level in EmergencyLevel.values() if level])
REASONS = st.sampled_from(["a", "b", "c", "d"])
PEERS = ("kasmina", "tamiyo", "sentinel")
S = 1_000_000_000
LIMIT = 5


class ControllerAgainstModel(RuleBasedStateMachine):
    """The controller on a real board, and a model of two numbers: the level and the count of raised signals."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.harness = ControllerHarness(Path(self._folder.name) / "board", broadcasts_per_minute=LIMIT)
        self.peers = {name: self.harness.peer_board.claim(name) for name in PEERS}
        self.level = 0
        self.raised = 0
        self.sent_at_ns: list[int] = []

    def teardown(self) -> None:
        """Nothing was dropped: all waiting signals are sent within minutes. Removes board and folder."""
        self.harness.broadcast_error = ""
        while self.harness.controller.due_in_s is not None:
            self.harness.clock.now_ns += 60 * S
            self.harness.controller.pump()
        assert self.harness.sent == self.raised
        self.harness.close()
        self._folder.cleanup()

    @rule(level=LEVELS, reason=REASONS)
    def escalate(self, level: EmergencyLevel.ValueType, reason: str) -> None:
        """The service raises."""
        self.harness.controller.escalate(level, reason, "judge")
        self.level, self.raised = max(self.level, level), self.raised + 1

    @rule(peer=st.sampled_from(PEERS), level=LEVELS, reason=REASONS)
    def peer_raises(self, peer: str, level: EmergencyLevel.ValueType, reason: str) -> None:
        """A peer raises on the board, unless its block has a higher level."""
        try:
            self.peers[peer].raise_level(level, reason)
        except SignalValueError:
            return
        self.harness.controller.observe_board()
        self.level, self.raised = max(self.level, level), self.raised + 1

    @rule(peer=st.sampled_from(PEERS))
    def peer_clears(self, peer: str) -> None:
        """A peer clears its signal; the level stays."""
        self.peers[peer].clear()
        self.harness.controller.observe_board()

    @rule(peer=st.sampled_from(PEERS))
    def peer_acknowledges(self, peer: str) -> None:
        """A peer acknowledges the effective signal."""
        signal = self.harness.peer_board.effective()
        if signal is not None:
            self.peers[peer].acknowledge(signal.signal_id)
            self.harness.controller.observe_board()
            assert peer in {a.participant for a in self.harness.controller.state.acknowledgements}

    @rule(by=st.sampled_from(Clearer))
    def clear(self, by: Clearer) -> None:
        """A clearance; a refused one changes nothing."""
        before = self.harness.controller.state
        try:
            self.harness.controller.clear("done", "x", by=by)
        except (ClearanceRefusedError, IllegalEmergencyEventError):
            assert self.level == 0 or by is not Clearer.OPERATOR
            assert self.harness.controller.state == before
        else:
            assert by is Clearer.OPERATOR or self.level < 4 or by is Clearer.RESTARTED
            self.level = 0

    @precondition(lambda self: self.level > 0)
    @rule()
    def operator_clears_on_the_board(self) -> None:
        """By `tolaria signals clear`."""
        operator = self.harness.peer_board.claim("operator")
        operator.clear_all()
        operator.release()
        self.harness.controller.observe_board()
        self.level = 0

    @rule(seconds=st.integers(0, 70))
    def time_passes(self, seconds: int) -> None:
        """The controller does what is due."""
        self.harness.clock.now_ns += seconds * S
        self.harness.controller.pump()

    @rule(reason=st.sampled_from(["", "down"]))
    def telemetry_changes(self, reason: str) -> None:
        """Broadcasts fail from now on, or succeed again."""
        self.harness.broadcast_error = reason

    @invariant()
    def levels_agree(self) -> None:
        """The controller and the board have the model's level."""
        assert self.harness.controller.state.level == self.level
        signal = self.harness.peer_board.effective()
        assert (signal.level if signal else 0) == self.level
        assert (self.harness.controller.state == EmergencyState()) == (self.level == 0)
        assert (self.harness.controller.state.phase is Phase.CALM) == (self.level == 0)

    @invariant()
    def broadcasts_are_in_order(self) -> None:
        """No more signals are sent than raised, in order, within the rate limit."""
        assert self.harness.sent <= self.raised
        times = [notice.signal.monotonic_time_ms for notice in self.harness.broadcasts]
        assert times == sorted(times)
        self.sent_at_ns += [self.harness.clock.now_ns] * (len(self.harness.broadcasts) - len(self.sent_at_ns))
        recent = [at_ns for at_ns in self.sent_at_ns if at_ns > self.harness.clock.now_ns - 59 * S]
        assert len(recent) <= LIMIT

    @invariant()
    def escalations_rise(self) -> None:
        """Each escalation since the last clearance has a higher level than the one before it."""
        level = 0
        for report in self.harness.reports:
            if isinstance(report, Escalated):
                assert report.state.level > level
                level = report.state.level
            elif isinstance(report, Cleared):
                level = 0


TestControllerAgainstModel = ControllerAgainstModel.TestCase
TestControllerAgainstModel.settings = settings(max_examples=60, stateful_step_count=40)
