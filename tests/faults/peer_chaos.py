"""Trains digits beside peers that are killed, hang, restart and lie: `peer_chaos.py [--minutes N] [--seed N]`.

Tamiyo asks for no change that could be valid: the run is deterministic, so its last digest must equal that of a run
whose peers answer properly, and no step may be lost. With `--peers` it is the child process that serves the peers.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import anyio
import grpc

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1.admin_service_pb2_grpc import TolariaAdminServiceStub
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import Context, FakeKasmina, FakeParticipant, FakeTamiyo, command, serving
from support.processes import Serve, python_path, serve

SETTINGS = [
    "training.job=support.user_jobs:Digits",
    "training.options.batch=130",
    "training.device=cpu",
    "training.deterministic=true",
    "leyline.secret=key",  # so that no lie of Tamiyo is valid
    "tamiyo.timeout_s=0.2",
    "kasmina.timeout_s=0.2",
    "checkpoint.keep_last=2",
    "emergency.sentinel=false",
]
LIES: list[SeedState] = [
    SeedState(),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_TRAINING, blueprint_id="no such thing"),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_FOSSILIZED, blueprint_id="lora"),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_CULLED, blueprint_id="lora"),
    SeedState(seed_id="a", gradient_norm=math.nan, stage=enums.SEED_STAGE_TRAINING),
]


class Moods:
    """What a peer does with a call, at random."""

    def __init__(self, seed: int, *, honest: bool) -> None:
        self.random = random.Random(seed)
        self._honest = honest

    async def lies(self, context: Context) -> bool:
        """Answers at once, late, never or with an error; returns whether the answer is to be a lie."""
        mood = "" if self._honest else self.random.choice(["", "", "lie", "late", "hang", "error"])
        if mood == "hang":
            await anyio.sleep(3600)
        elif mood == "late":
            await anyio.sleep(self.random.random() / 4)
        elif mood == "error":
            codes = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
            await context.abort(self.random.choice(codes), "as it likes")
        return mood == "lie"


class MoodyTamiyo(FakeTamiyo):
    """Asks for no change, or lies: a forged command of any kind."""

    def __init__(self, moods: Moods) -> None:
        super().__init__(self._decide)
        self.moods = moods

    async def EvaluateEpoch(self, request, context):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, N802
        self.lying = await self.moods.lies(context)
        return await super().EvaluateEpoch(request, context)

    async def _decide(self, _state: SystemStatePacket) -> AdaptationCommand | None:
        if not self.lying:
            return None
        made = command(self.moods.random.choice(enums.CommandType.values()[1:]))
        made.annotations.update({"signature": "forged", "level": "halt", "breaker": "tamiyo"})
        return made


class MoodyKasmina(FakeKasmina):
    """Desires no seeds, or lies: sets of seeds that cannot be."""

    def __init__(self, moods: Moods) -> None:
        super().__init__()
        self.moods = moods

    async def ExportSeedStates(  # noqa: N802
        self, request: kasmina.ExportSeedStatesRequest, context: Context
    ) -> kasmina.ExportSeedStatesResponse:
        lie = await self.moods.lies(context)
        return kasmina.ExportSeedStatesResponse(seeds=self.moods.random.choices(LIES, k=2) if lie else [])


async def serve_peers(port: int, seed: int, *, honest: bool) -> None:
    """Serves both peers on a port until killed; prints their address."""
    moods = Moods(seed, honest=honest)
    async with serving(MoodyTamiyo(moods), MoodyKasmina(moods), FakeParticipant(), port=port) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


class PeerProcess:
    """The peers in a child process, which is killed, frozen and started again on one port."""

    def __init__(self, seed: int, *, honest: bool) -> None:
        self._options = ["--honest"] if honest else []
        self._seed = seed
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Starts the process and waits until it serves."""
        self._seed += 1
        port = self.address.rpartition(":")[2]
        arguments = [sys.executable, __file__, "--peers", port, "--seed", str(self._seed), *self._options]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def kill(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def disturb(self, choice: random.Random) -> None:
        """Kills and restarts the process, or freezes it for a while."""
        if choice.random() < 0.5:
            self.kill()
            time.sleep(choice.random())
            self.start()
        else:
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(choice.random())
            self.process.send_signal(signal.SIGCONT)


def settings_with(peers: PeerProcess) -> list[str]:
    """Returns the settings of a run with these peers."""
    return [*SETTINGS, f"tamiyo.target={peers.address}", f"kasmina.target={peers.address}"]


def disturbed_run(directory: Path, seconds: float, seed: int) -> int:
    """Trains beside moody peers for a time, then a little further in a second process; returns the number of epochs."""
    choice = random.Random(seed)
    peers = PeerProcess(seed, honest=False)
    try:
        with serve(*settings_with(peers), "training.epochs=100000000", cwd=directory) as service:
            with grpc.insecure_channel(service.addresses()[0]) as channel:
                stub, until_s = TolariaAdminServiceStub(channel), time.monotonic() + seconds
                while time.monotonic() < until_s:
                    peers.disturb(choice)
                    time.sleep(choice.random())
                status = stub.GetStatus(admin.GetStatusRequest(), timeout=10)
            service.terminate()
            check(service.wait() == 0, f"the service drains, not {service.lines[-3:]}")
        check(status.state == admin.RUN_STATE_RUNNING, f"training goes on, not {status.state_reason}")
        check(status.rollbacks == 0, f"no rollback, not {status.rollbacks}")
        epochs = int(status.epoch) + 3
        finish(directory, peers, epochs)
        return epochs
    finally:
        peers.kill()


def finish(directory: Path, peers: PeerProcess, epochs: int) -> Serve:
    """Trains up to a number of epochs."""
    with serve(*settings_with(peers), f"training.epochs={epochs}", "service.exit_when_done=true", cwd=directory) as run:
        check(run.wait(3600) == 0, f"the run ends, not {run.lines[-3:]}")
    return run


def last_checkpoint(directory: Path) -> tuple[int, str]:
    """Returns step and digest of the newest committed checkpoint."""
    with closing(sqlite3.connect(directory / "state" / "journal.sqlite3")) as journal:
        query = "SELECT global_step, digest FROM checkpoints WHERE state = 'committed' ORDER BY at_ns DESC"
        step, digest = journal.execute(query).fetchone()
    return step, digest


def check(holds: bool, what: str) -> None:
    """Ends the program with exit code 1 unless `holds`."""
    if not holds:
        raise SystemExit(f"expected: {what}")


def main() -> None:
    """Compares a disturbed run with an undisturbed one, or serves the peers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=int, default=None)
    parser.add_argument("--honest", action="store_true")
    options = parser.parse_args()
    if options.peers is not None:
        with suppress(KeyboardInterrupt):
            anyio.run(lambda: serve_peers(options.peers, options.seed, honest=options.honest))
        return
    with tempfile.TemporaryDirectory() as place:
        disturbed, alone = Path(place) / "disturbed", Path(place) / "alone"
        disturbed.mkdir()
        alone.mkdir()
        epochs = disturbed_run(disturbed, options.minutes * 60, options.seed)
        peers = PeerProcess(options.seed, honest=True)
        try:
            finish(alone, peers, epochs)
        finally:
            peers.kill()
        check(last_checkpoint(disturbed) == last_checkpoint(alone), "the same last step and digest")
        sys.stdout.write(f"{epochs} epochs, step and digest {last_checkpoint(alone)}\n")


if __name__ == "__main__":
    main()
