"""The executor as Tolaria calls it. Must not know how desired seeds get into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.kasmina_service_pb2 import ApplyCommandRequest, ExportSeedStatesRequest, SeedRefusal
from leyline.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from tolaria.peers.verification import verify_seeds
from tolaria.resilience.deadline import DeadlineCaller


@dataclass(frozen=True, slots=True)
class Applied:
    """Kasmina's answer to a command: whether it took it, why, and the whole set of seeds it now desires."""

    applied: bool
    detail: str
    seeds: list[SeedState]


class KasminaClient:
    """Asks Kasmina. Every method raises `PeerError`s; answers that break the contract are `PeerProtocolError`s."""

    def __init__(
        self, channel: grpc.aio.Channel, caller: DeadlineCaller, *, apply_timeout_s: float, export_timeout_s: float
    ) -> None:
        self._stub = KasminaServiceStub(channel)
        self._caller = caller
        self._apply_timeout_s, self._export_timeout_s = apply_timeout_s, export_timeout_s

    async def apply(self, command: AdaptationCommand, state: SystemStatePacket) -> Applied:
        """Hand a verified seed command over."""
        request = ApplyCommandRequest(command=command, state=state)
        # Not repeatable: the contract does not say that a command_id is carried out once. The reference Kasmina sees to
        # that, but only for ids that it remembers. A command that was lost is decided again; one done twice stays.
        response = await self._caller.call(
            self._stub.ApplyCommand, request, name="ApplyCommand", timeout_s=self._apply_timeout_s
        )
        return Applied(response.applied, response.detail, verify_seeds(self._caller.peer, response.seeds))

    async def export_seeds(self, state: SystemStatePacket, refusals: Sequence[tuple[str, str]] = ()) -> list[SeedState]:
        """The seeds that Kasmina desires, given this state; `refusals` tells her by seed what could not be done."""
        # Repeatable: gates are judged once for an epoch's state, and refusals are facts that stay what they are.
        told = [SeedRefusal(seed_id=seed_id, reason=reason) for seed_id, reason in refusals]
        response = await self._caller.call(
            self._stub.ExportSeedStates,
            ExportSeedStatesRequest(state=state, refusals=told),
            name="ExportSeedStates",
            timeout_s=self._export_timeout_s,
            repeatable=True,
        )
        return verify_seeds(self._caller.peer, response.seeds)
