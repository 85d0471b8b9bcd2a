"""The reference peers' decisions in real runs."""

from __future__ import annotations

import anyio
import pytest

from leyline.v1 import enums_pb2 as e
from support.reference_peers import ReferencePeers
from support.runs import RunUnderTest, new_run, running
from tolaria.config import SeedsSettings

pytestmark = pytest.mark.anyio


async def end_of(run: RunUnderTest) -> None:
    """Trains until the run has finished or is halted, for at most a minute."""
    async with running(run):
        with anyio.fail_after(180):
            await run.status.feed.until(lambda: run.state in {"FINISHED", "HALTED"})
    assert run.state == "FINISHED"


async def test_noise_at_a_low_loss_leaves_the_learning_rate_alone() -> None:
    """Adam with dropout on digits: the loss jumps between 0.01 and 0.05, and the rate is that of the schedule."""
    peers = ReferencePeers()
    options = {"optimizer": "adam", "lr": 3e-3, "dropout": 0.3, "batch": 130}
    run = new_run(peers, job="support.user_jobs:Digits", epochs=30, options=options)
    await end_of(run)
    assert run.status.learning_rates == {"host": 3e-3}
    assert peers.decisions == []
    assert run.status.validation_accuracy > 0.95


@pytest.mark.parametrize(("job", "enabled", "grows"), [("Digits", True, 0), ("Line", False, 0), ("Line", True, 1)])
async def test_a_model_that_cannot_grow_gets_no_seeds(job: str, *, enabled: bool, grows: int) -> None:
    """Without slots, or with seeds disabled, a plateau leads to no decision, and no seed is shown."""
    peers = ReferencePeers()
    run = new_run(
        peers,
        job=f"support.user_jobs:{job}",
        epochs=5,
        sections={"seeds": SeedsSettings(enabled=enabled)},
        options={"lr": 1e-12, "batch": 64, "optimizer": "sgd"},
    )
    await end_of(run)
    assert (len(peers.decisions), len(run.run.status().seeds)) == (grows, grows)
    assert run.status.commands_rejected == 0


async def test_growth_without_a_gain_ends() -> None:
    """On a plateau that seeds do not change, two become a part of the host, and then no more is tried."""
    peers = ReferencePeers()
    options = {"lr": 1e-12, "samples": 200, "batch": 8}
    run = new_run(peers, job="support.user_jobs:Line", epochs=45, options=options)
    await end_of(run)
    operations = [e.SeedOperation.Name(decision.seed_operation.operation) for decision in peers.decisions]
    assert operations == ["SEED_OP_GERMINATE", "SEED_OP_FOSSILIZE"] * 2
    assert [seed.stage for seed in run.status.grafted] == [e.SEED_STAGE_FOSSILIZED] * 2
