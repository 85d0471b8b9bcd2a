"""A rendezvous on loopback, its owner, and machines that join it as the test says."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from support.pods import free_port
from tolaria import __version__
from tolaria.config import Settings
from tolaria.ranks import admission
from tolaria.ranks.admission import Joining, Ready, torch_version
from tolaria.ranks.channel import Channel
from tolaria.transport.rendezvous import Rendezvous

SECRET = b"a secret of all machines"
TORCH = torch_version()


@dataclass
class Owner:
    """What a rendezvous has reported."""

    lost: list[tuple[str, str]] = field(default_factory=list)
    ended: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)

    def on_node_lost(self, host: str, why: str) -> None:
        self.lost.append((host, why))

    def on_ranks_ended(self, host: str, code: int, lines: Sequence[str]) -> None:
        self.ended.append((host, code, tuple(lines)))


@dataclass
class Door:
    """The port at which machines join."""

    port: int

    async def connect(self) -> anyio.abc.SocketStream:
        """Returns a connection to it, once it is open."""
        with anyio.fail_after(180):
            while True:
                with suppress(OSError):
                    return await anyio.connect_tcp("127.0.0.1", self.port)
                await anyio.sleep(0.01)

    @asynccontextmanager
    async def machine(self, asked: Joining | None = None, *, ready: bool = True) -> AsyncIterator[Machine]:
        """Joins a machine."""
        async with await self.connect() as stream:
            asked = asked or joining()
            channel, answer = await Channel.open(stream, SECRET, admission.packed(asked))
            machine = Machine(channel, admission.for_machine(answer))
            if ready:
                await machine.say(Ready())
            yield machine


@dataclass
class Meeting(Door):
    """A rendezvous that runs, and where."""

    rendezvous: Rendezvous
    owner: Owner


@dataclass
class Machine:
    """One that has been answered."""

    channel: Channel
    answer: admission.ToMachine

    async def say(self, message: admission.ToService) -> None:
        """Sends a message."""
        await self.channel.send(admission.packed(message))

    async def hear(self) -> admission.ToMachine:
        """Returns the next message that is no heartbeat, and not about replicas that no service needs."""
        with anyio.fail_after(180):
            while True:
                message = admission.for_machine(await self.channel.receive())
                if not isinstance(message, admission.Alive) and message != admission.KeepReplicas(()):
                    return message


def joining(host: str = "host-b", **changes: object) -> Joining:
    """What a machine says that may join."""
    said = Joining(uuid.uuid4().hex, host, 1, __version__, TORCH)
    return replace(said, **changes)  # type: ignore[arg-type] # fields by name


@asynccontextmanager
async def meeting(directory: Path, port: int = 0, *, replicas: int = 0, **lane: object) -> AsyncIterator[Meeting]:
    """Runs a rendezvous with these settings of the lane, on a free port unless one is given."""
    await anyio.Path(directory / "secret").write_bytes(SECRET + b"\n")
    port = port or free_port()
    section = {"mode": "torchrun", "nodes": "1:2", "rendezvous": f"127.0.0.1:{port}", **lane}
    section["secret_file"] = str(directory / "secret")
    settings = Settings.model_validate({"lane": section, "rollback": {"replicas": replicas}})
    owner = Owner()
    rendezvous = Rendezvous(settings, owner)
    async with anyio.create_task_group() as tasks:
        await tasks.start(rendezvous.serve)
        yield Meeting(port, rendezvous, owner)
        tasks.cancel_scope.cancel()
