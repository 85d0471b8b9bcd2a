"""Trains digits beside peers that are killed, hang, restart and lie: `peer_chaos.py [--minutes N] [--seed N]`.

Tamiyo asks for no change that could be valid: the run is deterministic, so its last digest must equal that of a run
whose peers answer properly, and no step may be lost. Every kind of fault happens once, until the service itself has
counted it, and then all happen at random for N minutes. With `--peers` it is the child process that serves the peers.
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
import urllib.request
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import anyio
import grpc
from prometheus_client.parser import text_string_to_metric_families

from leyline.v1 import admin_service_pb2 as admin
from leyline.v1 import enums_pb2 as enums
from leyline.v1 import kasmina_service_pb2 as kasmina
from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.seeds_pb2 import SeedState
from leyline.v1.state_pb2 import SystemStatePacket
from support.peers import Context, FakeKasmina, FakeParticipant, FakeTamiyo, command, serving
from support.processes import Serve, python_path, serve, status, stub_of
from support.waiting import wait_for

SETTINGS = [
    "training.job=support.user_jobs:Digits",
    "training.options.batch=130",
    "training.options.optimizer=sgd",  # Adam's updates become unstable when the loss has been near 0 for a long time
    "training.options.lr=0.03",
    "training.device=cpu",
    "training.deterministic=true",
    "leyline.secret=key",  # so that no lie of Tamiyo is valid
    "tamiyo.timeout_s=0.2",
    "kasmina.timeout_s=0.2",
    "checkpoint.keep_last=2",
    "checkpoint.every_epochs=10",
    "emergency.sentinel=false",
]
SLOWLY: Final = "training.options.step_s=0.03"
"""For the disturbed run: the other one repeats at full speed what is trained while breakers cool down."""
LIES: list[SeedState] = [
    SeedState(),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_TRAINING, blueprint_id="no such thing"),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_FOSSILIZED, blueprint_id="lora"),
    SeedState(seed_id="a", stage=enums.SEED_STAGE_CULLED, blueprint_id="lora"),
    SeedState(seed_id="a", gradient_norm=math.nan, stage=enums.SEED_STAGE_TRAINING),
]


PEERS: Final = ("tamiyo", "kasmina")
AT_RANDOM: Final = ("honest",) * 12 + ("lie", "late", "hang", "error")
"""Mostly honest: breakers that are open most of the time keep the faults away."""
UNDER_ORDERS: Final = "as ordered"
LATE_BEYOND: Final = "0.1"
"""The bucket of `tolaria_peer_call_duration_seconds` above which an answer is late, in seconds."""
SCHEDULE: Final = (
    ("error", tuple(f"{peer} failed" for peer in PEERS)),
    ("lie", ("tamiyo forged", "kasmina lied", "kasmina asked for an impossible seed")),
    ("late", tuple(f"{peer} late" for peer in PEERS)),
    ("hang", tuple(f"{peer} timed out" for peer in PEERS)),
    ("frozen", tuple(f"{peer} timed out" for peer in PEERS)),
    ("killed", tuple(f"{peer} unavailable" for peer in PEERS)),
    ("hang tamiyo", ("tamiyo breaker opened",)),
    ("hang kasmina", ("kasmina breaker opened",)),
)
"""What is done to the peers, and what the service has to count because of it."""
RECOVERY_S: Final = 150.0
"""A bound for what takes a breaker's cooldown of 30 s at most."""


class Moods:
    """What a peer does with a call: what the file `mood` says, for both or one peer, or anything at random."""

    def __init__(self, seed: int, mood: Path) -> None:
        self.random = random.Random(seed)
        self._mood = mood

    async def lies(self, peer: str, context: Context) -> bool:
        """Answers at once, late, never or with an error; returns whether the answer is to be a lie."""
        mood, _, only = self._mood.read_text().partition(" ")
        if only not in {"", peer}:
            return False
        if mood == "random":
            mood = self.random.choice(AT_RANDOM)
        if mood == "hang":
            await anyio.sleep_forever()
        elif mood == "late":
            await anyio.sleep(self.random.random() / 4)
        elif mood == "error":
            codes = set(grpc.StatusCode) - {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
            await context.abort(self.random.choice(sorted(codes, key=str)), UNDER_ORDERS)
        return mood == "lie"


class MoodyTamiyo(FakeTamiyo):
    """Asks for no change, or lies: a forged command of any kind."""

    def __init__(self, moods: Moods) -> None:
        super().__init__(self._decide)
        self.moods = moods

    async def EvaluateEpoch(self, request, context):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, N802
        self.lying = await self.moods.lies("tamiyo", context)
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
        lie = await self.moods.lies("kasmina", context)
        return kasmina.ExportSeedStatesResponse(
            seeds=self.moods.random.sample(LIES, k=self.moods.random.choice((1, 2))) if lie else []
        )


async def serve_peers(port: int, seed: int, mood: Path) -> None:
    """Serves both peers on a port until killed; prints their address."""
    moods = Moods(seed, mood)
    async with serving(MoodyTamiyo(moods), MoodyKasmina(moods), FakeParticipant(), port=port) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


class PeerProcess:
    """The peers in a child process, which is killed, frozen and started again on one port."""

    def __init__(self, seed: int, mood: Path) -> None:
        self._mood, self._seed = mood, seed
        self.address = "127.0.0.1:0"
        self.set_mood("honest")
        self.start()

    def set_mood(self, mood: str) -> None:
        """Sets what the peers do with the next calls."""
        self._mood.write_text(mood)

    def start(self) -> None:
        """Starts the process and waits until it serves."""
        self._seed += 1
        port = self.address.rpartition(":")[2]
        arguments = [sys.executable, __file__, "--peers", port, "--seed", str(self._seed), "--mood", str(self._mood)]
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

    def begin(self, fault: str) -> None:
        """Begins a fault, which lasts until `end`."""
        if fault == "killed":
            self.kill()
        elif fault == "frozen":
            self.process.send_signal(signal.SIGSTOP)
        else:
            self.set_mood(fault)

    def end(self, fault: str, mood: str) -> None:
        """Ends a fault; the peers are of this mood afterwards."""
        self.set_mood(mood)
        if fault == "killed":
            self.start()
        elif fault == "frozen":
            self.process.send_signal(signal.SIGCONT)


class Sightings:
    """What the service has counted of its peers' faults, by its metrics and its log."""

    def __init__(self, service: Serve) -> None:
        self._service = service
        self._url = f"http://{service.addresses()[1]}/metrics"

    def counts(self) -> dict[str, int]:
        """Returns the counts by kind."""
        with urllib.request.urlopen(self._url, timeout=30) as answer:  # noqa: S310
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        calls, log = "tolaria_peer_call_duration_seconds", self._service.events()

        def total(name: str, **labels: str) -> int:
            return int(sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items()))

        def lines(event: str, **values: str) -> int:
            found = [line for line in log if line["event"] == event]
            return sum(all(value in line[key] for key, value in values.items()) for line in found)

        counted = {
            "tamiyo forged": total("tolaria_command_rejected_total", reason="unsigned"),
            "kasmina lied": lines("tolaria.kasmina_error", method="answer"),
            "kasmina asked for an impossible seed": lines("seed_refused"),
        }
        for peer in PEERS:
            answered = total(f"{calls}_count", peer=peer, outcome="ok")
            counted |= {
                f"{peer} answered": answered,
                f"{peer} late": answered - total(f"{calls}_bucket", peer=peer, outcome="ok", le=LATE_BEYOND),
                f"{peer} failed": lines(f"tolaria.{peer}_error", detail=UNDER_ORDERS),
                f"{peer} timed out": total(f"tolaria_timeout_{peer}_total"),
                f"{peer} unavailable": total("tolaria_peer_retries_total", peer=peer),
                f"{peer} breaker opened": lines("tolaria.breaker_opened", breaker=peer),
                f"{peer} breaker closed": lines("tolaria.breaker_closed", breaker=peer),
            }
        return counted

    def wait_for_more(self, kinds: Iterable[str], than: dict[str, int]) -> None:
        """Waits until each of the kinds has been counted again."""
        wanted = set(kinds)

        def all_counted() -> bool:
            now = self.counts()
            wanted.difference_update([kind for kind in wanted if now[kind] > than[kind]])
            return not wanted

        try:
            wait_for(all_counted, RECOVERY_S, every_s=0.2)
        except AssertionError:
            raise SystemExit(f"expected: the service sees {sorted(wanted)}") from None


def settings_with(peers: PeerProcess) -> list[str]:
    """Returns the settings of a run with these peers."""
    return [*SETTINGS, f"tamiyo.target={peers.address}", f"kasmina.target={peers.address}"]


def cause_every_fault(peers: PeerProcess, sightings: Sightings) -> None:
    """Causes each kind of fault until the service has counted it, and ends it until the peers' answers count again."""
    for fault, kinds in SCHEDULE:
        before = sightings.counts()
        peers.begin(fault)
        sightings.wait_for_more(kinds, before)
        before = sightings.counts()
        peers.end(fault, "honest")
        sightings.wait_for_more([f"{peer} answered" for peer in PEERS], before)
    check(all(sightings.counts()[f"{peer} breaker closed"] for peer in PEERS), "breakers close again by themselves")


def cause_faults_at_random(peers: PeerProcess, seconds: float, choice: random.Random) -> None:
    """Lets the peers do as they like for a time; now and then they are killed and restarted, or frozen."""
    until_s = time.monotonic() + seconds
    peers.set_mood("random")
    while time.monotonic() < until_s:
        time.sleep(choice.random() * 10)
        fault = choice.choice(("killed", "frozen"))
        peers.begin(fault)
        time.sleep(choice.random() ** 2)
        peers.end(fault, "random")


def disturbed_run(directory: Path, peers: PeerProcess, seconds: float, seed: int) -> int:
    """Trains beside moody peers for a time, then a little further in a second process; returns the number of epochs."""
    with serve(*settings_with(peers), SLOWLY, "training.epochs=100000000", cwd=directory) as service:
        with stub_of(service) as stub:
            sightings = Sightings(service)
            cause_every_fault(peers, sightings)
            cause_faults_at_random(peers, seconds, random.Random(seed))
            state, counts = status(stub), sightings.counts()
        service.terminate()
        check(service.wait() == 0, f"the service drains, not {service.lines[-3:]}")
    sys.stderr.writelines(f"{line}\n" for line in service.lines if state.rollbacks and "_finished" not in line)
    check(state.state == admin.RUN_STATE_RUNNING, f"training goes on, not {state.state_reason}")
    check(state.rollbacks == 0, f"no rollback, not {state.rollbacks}")
    sys.stdout.writelines(f"{count:8} {kind}\n" for kind, count in sorted(counts.items()))
    # Training went on until the drain, for more epochs on a fast machine.
    epochs = last_checkpoint(directory)[0] // int(state.steps_per_epoch) + 3
    finish(directory, peers, epochs)
    return epochs


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
    parser.add_argument("--mood", type=Path, default=None)
    options = parser.parse_args()
    if options.peers is not None:
        with suppress(KeyboardInterrupt):
            anyio.run(serve_peers, options.peers, options.seed, options.mood)
        return
    with tempfile.TemporaryDirectory() as place:
        disturbed, alone = Path(place) / "disturbed", Path(place) / "alone"
        disturbed.mkdir()
        alone.mkdir()
        peers = PeerProcess(options.seed, Path(place) / "mood")
        try:
            epochs = disturbed_run(disturbed, peers, options.minutes * 60, options.seed)
            peers.set_mood("honest")
            finish(alone, peers, epochs)
        finally:
            peers.kill()
        found, expected = last_checkpoint(disturbed), last_checkpoint(alone)
        check(found == expected, f"the last step and digest {expected}, not {found}")
        sys.stdout.write(f"{epochs} epochs, step and digest {last_checkpoint(alone)}\n")


if __name__ == "__main__":
    main()
