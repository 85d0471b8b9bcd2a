from __future__ import annotations

import pytest

from leyline.v1.enums_pb2 import ROLLBACK_TIER_FAST
from support.rollbacks import FakeParticipant, Response
from support.runs import FakePeers, new_run, running
from tolaria.errors import PeerUnavailableError, TolariaError
from tolaria.rollback.protocol import Call, Rollback

pytestmark = pytest.mark.anyio

BUDGET_S = 1.0
PHASES = [Call.PREPARE, Call.COMMIT, Call.CONFIRM]
ANSWERS: dict[str, Response | TolariaError | None] = {
    "accepts": Response(),
    "refuses": Response(accepted=False, detail="not now"),
    "is silent": None,
    "is unreachable": PeerUnavailableError("kasmina", "connection refused"),
}


@pytest.mark.parametrize("since", PHASES)
@pytest.mark.parametrize("kasminas", list(ANSWERS))
@pytest.mark.parametrize("tamiyos", ["accepts", "is unreachable"])
async def test_a_run_rolls_back_whatever_the_participants_answer(kasminas: str, tamiyos: str, since: Call) -> None:
    """The state is restored within the budget; two of three are a quorum; a peer that failed is not called again."""
    tamiyo = FakeParticipant(dict.fromkeys(PHASES, ANSWERS[tamiyos]), punctual=False)
    failing = PHASES[PHASES.index(since) :]
    kasmina = FakeParticipant(dict.fromkeys(failing, ANSWERS[kasminas]), punctual=False)
    peers = FakePeers()
    peers.participants = {"tamiyo": tamiyo, "kasmina": kasmina}
    rollback = {"automatic": False, "every_steps": 1, "snapshots_max": 1000, "fast_budget_s": BUDGET_S}
    run = new_run(peers, epochs=10**6, sections={"rollback": rollback})
    async with running(run):
        await run.until(lambda: run.status.global_step > 10)
        back = await run.run.roll_back(Rollback(ROLLBACK_TIER_FAST, 7, "odd", "operator"))
        assert back.state_digest == back.expected_digest != ""
        assert back.latency_ms <= BUDGET_S * 1000
        assert back.coordinated == ("accepts" in {kasminas, tamiyos})
        last = PHASES.index(Call.CONFIRM if kasminas == "accepts" else since)
        assert [(call, request.target_step) for call, request in kasmina.calls] == [
            (call, back.restored_step) for call in PHASES[: last + 1]
        ]
        step = run.module.global_step
        await run.until(lambda: run.module.global_step > step + 3)
        await run.run.stop("enough")
