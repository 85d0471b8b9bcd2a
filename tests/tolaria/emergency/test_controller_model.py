from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from leyline.v1.enums_pb2 import EmergencyLevel
from support.emergency import Stage
from tolaria.emergency import Clearer, EmergencyPolicy, EmergencyState, Escalated, Phase
from tolaria.errors import ClearanceRefusedError, IllegalEmergencyEventError, SignalValueError

LEVELS = st.sampled_from([level for level in EmergencyLevel.values() if level])
REASONS = st.sampled_from(["a", "b", "c", "d"])
PEERS = ("kasmina", "tamiyo", "sentinel")
S = 1_000_000_000
CAP = 5


class ControllerAgainstModel(RuleBasedStateMachine):
    """The controller on a real board beside a model of two numbers: the level, and how many signals were raised."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.stage = Stage(Path(self._folder.name) / "board", EmergencyPolicy(broadcasts_per_minute=CAP))
        self.peers = {name: self.stage.other.claim(name) for name in PEERS}
        self.level = 0
        self.raised = 0
        self.told_at_ns: list[int] = []

    def teardown(self) -> None:
        """Nothing is left behind."""
        self.stage.close()
        self._folder.cleanup()

    @rule(level=LEVELS, reason=REASONS)
    def escalate(self, level: EmergencyLevel.ValueType, reason: str) -> None:
        """The service raises."""
        self.stage.controller.escalate(level, reason, "judge")
        self.level, self.raised = max(self.level, level), self.raised + 1

    @rule(peer=st.sampled_from(PEERS), level=LEVELS, reason=REASONS)
    def peer_raises(self, peer: str, level: EmergencyLevel.ValueType, reason: str) -> None:
        """A peer raises on the board, unless its own block stands higher."""
        try:
            self.peers[peer].raise_level(level, reason)
        except SignalValueError:
            return
        self.stage.controller.observe_board()
        self.level, self.raised = max(self.level, level), self.raised + 1

    @rule(peer=st.sampled_from(PEERS))
    def peer_takes_back(self, peer: str) -> None:
        """A peer changes its mind; the level stays."""
        self.peers[peer].clear()
        self.stage.controller.observe_board()

    @rule(peer=st.sampled_from(PEERS))
    def peer_acknowledges(self, peer: str) -> None:
        """A peer acts on what counts on the board."""
        signal = self.stage.other.effective()
        if signal is not None:
            self.peers[peer].acknowledge(signal.signal_id)
            self.stage.controller.observe_board()
            assert peer in {a.participant for a in self.stage.controller.state.acknowledgements}

    @rule(by=st.sampled_from(Clearer))
    def clear(self, by: Clearer) -> None:
        """Somebody clears; what is refused changes nothing."""
        before = self.stage.controller.state
        try:
            self.stage.controller.clear("done", "x", by=by)
        except (ClearanceRefusedError, IllegalEmergencyEventError):
            assert self.level == 0 or by is not Clearer.OPERATOR
            assert self.stage.controller.state == before
        else:
            assert by is Clearer.OPERATOR or self.level < 4 or by is Clearer.RESTARTED
            self.level = 0

    @precondition(lambda self: self.level > 0)
    @rule()
    def operator_clears_on_the_board(self) -> None:
        """By `tolaria signals clear`."""
        operator = self.stage.other.claim("operator")
        operator.clear_all()
        operator.release()
        self.stage.controller.observe_board()
        self.level = 0

    @rule(seconds=st.integers(0, 70))
    def time_goes_by(self, seconds: int) -> None:
        """What is due is done."""
        self.stage.clock.now_ns += seconds * S
        self.stage.controller.pump()

    @rule(reason=st.sampled_from(["", "down"]))
    def the_collector(self, reason: str) -> None:
        """Telemetry fails from now on, or works again."""
        self.stage.broken = reason

    @invariant()
    def levels_agree(self) -> None:
        """The controller and every reader of the board see the model's level."""
        assert self.stage.controller.state.level == self.level
        signal = self.stage.other.effective()
        assert (signal.level if signal else 0) == self.level
        assert (self.stage.controller.state == EmergencyState()) == (self.level == 0)
        assert (self.stage.controller.state.phase is Phase.CALM) == (self.level == 0)

    @invariant()
    def nothing_is_dropped(self) -> None:
        """Signals told and signals that wait add up to those raised, in order, within the cap."""
        statistics = self.stage.controller.statistics()
        assert statistics.raised == self.raised
        assert statistics.signals_told + statistics.signals_waiting == self.raised
        assert sum(notice.count for notice in self.stage.told) == statistics.signals_told
        times = [notice.signal.timestamp_ms for notice in self.stage.told]
        assert times == sorted(times)
        self.told_at_ns += [self.stage.clock.now_ns] * (len(self.stage.told) - len(self.told_at_ns))
        recent = [at_ns for at_ns in self.told_at_ns if at_ns > self.stage.clock.now_ns - 59 * S]
        assert len(recent) <= CAP

    @invariant()
    def escalations_go_up(self) -> None:
        """Each report of an escalation is of a higher level than the one before it."""
        assert all(report.state.level > report.before.level for report in self.stage.reports_of(Escalated))


TestControllerAgainstModel = ControllerAgainstModel.TestCase
TestControllerAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
