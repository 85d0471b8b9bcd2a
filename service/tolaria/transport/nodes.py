"""`JoinedNode`: a machine that has joined the group, and `Formation`: those that take part in one generation of it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from tolaria.errors import ChannelError
from tolaria.ranks import admission
from tolaria.ranks.admission import Joining
from tolaria.ranks.channel import Channel, interface_of
from tolaria.transport.replica_exchange import ReplicaExchange


@dataclass(eq=False, slots=True)
class JoinedNode:
    """A machine that has joined. `ready` is whether it can start ranks, `member` whether its ranks are in the group.

    Sending to it may take `timeout_s`.
    """

    asked: Joining
    channel: Channel
    unsent: MemoryObjectSendStream[admission.ToMachine]
    scope: anyio.CancelScope
    heard_s: float
    timeout_s: float
    ready: bool = False
    member: bool = False
    gone: str = "its connection has ended"
    sending: anyio.Lock = field(default_factory=anyio.Lock)
    replicas: ReplicaExchange = field(init=False)

    def __post_init__(self) -> None:
        self.replicas = ReplicaExchange(self.send)

    @property
    def host(self) -> str:
        """Its name, as it says, and its address."""
        return f"{self.asked.host} ({self.channel.remote})"

    def drop(self, why: str) -> None:
        """Ends the connection."""
        self.gone = why
        self.scope.cancel()

    def put(self, message: admission.ToMachine) -> None:
        """Sends a message soon, or ends the connection if too many wait."""
        try:
            self.unsent.send_nowait(message)
        except (anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self.drop("it does not read what it is sent")

    async def send(self, content: bytes) -> None:
        """Sends a frame. Raises ChannelError if the connection has ended, and ends it if that takes too long."""
        try:
            async with self.sending:
                with anyio.fail_after(self.timeout_s):
                    await self.channel.send(content)
        except (ChannelError, TimeoutError):
            self.drop("it cannot be sent to")
            raise ChannelError("it cannot be sent to") from None


class Formation:
    """Who takes part in one generation of the group beside this machine, and where the store of the group listens.

    The store's address is that at which the first machine has joined; alone this machine needs none.
    """

    def __init__(self, nodes: Sequence[JoinedNode] = ()) -> None:
        """Opens the socket of the store. Raises OSError if that fails."""
        self.nodes = tuple(nodes)
        self.host = nodes[0].channel.local if nodes else ""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, 0), family=family) if nodes else None
        self.port: int = 0 if self._listener is None else self._listener.getsockname()[1]

    @property
    def descriptors(self) -> dict[str, int]:
        """Descriptors for the agent of this machine, by the names of its options."""
        return {} if self._listener is None else {"store-listener": self._listener.fileno()}

    @property
    def arguments(self) -> tuple[str, ...]:
        """Its other options."""
        if self._listener is None:
            return ()
        return (
            f"--nodes={len(self.nodes) + 1}",
            f"--store-host={self.host}",
            f"--store-port={self.port}",
            f"--interface={interface_of(self.host)}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the socket here: the agent has it, or was not started."""
        if self._listener is not None:
            self._listener.close()
