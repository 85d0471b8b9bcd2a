"""The reference Tamiyo's policy and the reference Kasmina's seeds as the peers of a run, without gRPC."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2 import ApplyCommandResponse
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.runs import FakePeers
from tolaria.reference.history import RunHistory
from tolaria.reference.kasmina import DesiredSeeds
from tolaria.reference.policy import decide_epoch
from tolaria.reference.tamiyo import command_for


class ReferencePeers(FakePeers):
    """Decides as the reference peers do. `decisions` are those of Tamiyo, oldest first."""

    def __init__(self) -> None:
        super().__init__(self._decide)
        self.history = RunHistory()
        self.desired = DesiredSeeds()
        self.decisions: list[AdaptationCommand] = []

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> ApplyCommandResponse:
        """Applies a command as the reference Kasmina does."""
        self.applied.append(command)
        outcome = self.desired.apply(command, state)
        seeds = self.desired.as_messages()
        return ApplyCommandResponse(applied=outcome.applied, detail=outcome.detail, seeds=seeds)

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """Evaluates the gates as the reference Kasmina does."""
        self.refusals = list(refusals)
        self.desired.observe(state)
        return self.desired.as_messages()

    async def _decide(self, state: SystemStatePacket) -> AdaptationCommand | None:
        self.history, decision = decide_epoch(self.history, state)
        if decision is None:
            return None
        self.decisions.append(decision)
        return command_for(decision, command_id=uuid.uuid4().hex, issued_at_ns=time.time_ns())
